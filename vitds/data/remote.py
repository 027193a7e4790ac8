"""A split of a data set behind a URL, read as one on disk: its index once, its shards through the cache."""

from __future__ import annotations

import os
import time

from vitds.data.cache import Cache, used
from vitds.data.index import INDEX_NAME, Index, read_index
from vitds.data.prefetch import RemoteShard
from vitds.data.reader import BytesDiffer, EncodedSample, ShardReader, SplitMissing, read_classes
from vitds.errors import DataError, DataMissing
from vitds.transport import Url

_NOTE_USE_S = 1.0  # how exactly the cache knows when a shard was last read


class RemoteReader(ShardReader):
    """A split of a data set behind a URL: each shard is fetched when it is first read, unless it is in the cache.

    Wrong bytes are fetched once more before a sample is held to be bad. What cannot be had is no bad sample, but a
    DataUnavailable.
    """

    cache: Cache

    def __init__(self, dataset: Url, split: str, cache: Cache) -> None:
        """Read classes and the index as they are now.

        Raises: DataError when they cannot be had, or the index names files elsewhere.
        """
        self.split, self.cache = split, cache
        self._address = dataset / split
        self.directory = Url(self._address.shown)
        self.classes = read_classes(dataset)
        self._take(self._fetched_index())
        self._ends = self.index.shard_ends()
        self._noted: dict[int, float] = {}  # shard -> when its use was last noted

    @property
    def remote_shards(self) -> list[RemoteShard | None]:
        """What of each shard has to be fetched."""
        return [self._shard(number) for number in range(len(self._ends))]

    def read(self, sample_id: int) -> EncodedSample:
        """Read one sample.

        Raises: DataError naming shard and key when its bytes are not those that were indexed, DataUnavailable when its
        shard cannot be had.
        """
        try:
            return super().read(sample_id)
        except BytesDiffer:
            number = int(self.index.shard[sample_id])
            shard = self._shard(number)
            descriptor = self._descriptors.pop(number)
            try:
                if not self.cache.renew(shard.url, descriptor, shard.at_least):
                    raise
            finally:
                os.close(descriptor)
            return super().read(sample_id)

    def _fetched_index(self) -> Index:
        """Raises: DataError when there is none, or none that can be read."""
        url = self._address / INDEX_NAME
        for is_second in (False, True):
            try:
                descriptor = self.cache.open(url, is_checked=not is_second)
            except DataMissing as error:
                what = f'has no split "{self.split}": {error.what}'
                raise SplitMissing(what, where=error.where) from None
            with open(descriptor, "rb") as file:
                try:
                    return read_index(self.directory / INDEX_NAME, file)
                except DataError:
                    if is_second or not self.cache.renew(url, descriptor):
                        raise
        raise AssertionError("neither read nor refused")

    def _shard(self, number: int) -> RemoteShard:
        return RemoteShard(self._address / self.index.shards[number], self._ends[number])

    def _descriptor(self, shard: int) -> int:
        descriptor, now = super()._descriptor(shard), time.monotonic()
        if now - self._noted.get(shard, 0.0) > _NOTE_USE_S:
            self._noted[shard] = now
            used(descriptor)
        return descriptor

    def _open(self, shard: int) -> int:
        for number, descriptor in list(self._descriptors.items()):
            if not os.fstat(descriptor).st_nlink:  # no longer in the cache: its room is free once nobody has it open
                os.close(self._descriptors.pop(number))
        return self.cache.open(*self._shard(shard))
