"""Several data set directories as one: their samples one after the other, their classes united by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitds.data.cache import Cache, named_cache
from vitds.data.index import Index
from vitds.data.prefetch import RemoteShard
from vitds.data.reader import EncodedSample, ShardReader, SplitMissing, read_classes
from vitds.data.remote import RemoteReader
from vitds.dataset_facts import split_paths, united
from vitds.errors import DataError
from vitds.stream_facts import is_stream
from vitds.transport import Url, location

_NUMBERS = ("offset", "size", "width", "height", "crc32")


def open_split(path: str, split: str, cache: Cache | None = None, max_lost: float = 0.0) -> ShardReader:
    """A split of the data that `--data` names, one directory or several; shards from URLs are kept in `cache`, and
    `max_lost` is the share of samples that may have gone with shards of a directory.

    Raises: DataError as `ShardReader` does, and for a stream of tar shards.
    """
    if is_stream(path):
        raise DataError(
            "tar shards without an index can be trained on, and nothing else",
            where=path,
            fix="make a data set of them: tools/shard_imagenet.py PATTERN OUT, or --index-only DIR where they are",
        )
    cache = cache or named_cache()
    directories = split_paths(path)
    if len(directories) > 1:
        return Mixture(directories, split, cache, max_lost)
    return _open(path, split, cache, max_lost)


def _open(directory: str, split: str, cache: Cache, max_lost: float) -> ShardReader:
    place = location(directory)
    return RemoteReader(place, split, cache) if isinstance(place, Url) else ShardReader(place, split, max_lost)


class Mixture(ShardReader):
    """A split of several directories, read like that of one: sample ids count on from each directory to the next.

    Directories without validation are passed over, but their classes count; each has something to train on, as the
    weights, one a directory, ask for. Keys are led by their directory.
    """

    def __init__(self, directories: Sequence[str], split: str, cache: Cache, max_lost: float = 0.0) -> None:
        """Open the split of every directory.

        Raises: DataError when a directory is no data set or lacks the training split, or none of them has the split.
        """
        self.split, self.directory, self.cache = split, Path(",".join(directories)), cache
        of_each = [read_classes(directory) for directory in directories]
        self.classes = united(of_each)
        numbers = {name: number for number, name in enumerate(self.classes)}
        readers: list[ShardReader] = []
        label_maps: list[np.ndarray] = []
        missing: list[SplitMissing] = []
        for directory, classes in zip(directories, of_each, strict=True):
            try:
                readers.append(_open(directory, split, cache, max_lost))
                label_maps.append(np.array([numbers[name] for name in classes], dtype=np.int64))
            except SplitMissing as error:
                if split == "train":
                    raise
                missing.append(error)
        if not readers:
            raise missing[0]
        self._readers = readers
        self._first_ids = np.cumsum([0] + [len(reader) for reader in readers])
        self.index = _joined(readers, label_maps)
        for reader, first, end in zip(readers, self._first_ids, self._first_ids[1:], strict=False):
            columns = {name: getattr(self.index, name)[first:end] for name in (*_NUMBERS, "label")}  # held once
            labels = None if self.index.labels is None else self.index.labels[first:end]
            reader.index = replace(reader.index, labels=labels, **columns)

    @property
    def indexes(self) -> list[Index]:
        """The index of each directory, with the labels of the mixture."""
        return [reader.index for reader in self._readers]

    @property
    def remote_shards(self) -> list[RemoteShard | None]:
        """What of each shard has to be fetched, nothing of those on disk."""
        return [shard for reader in self._readers for shard in reader.remote_shards]

    def read(self, sample_id: int) -> EncodedSample:
        """Read one sample.

        Raises: DataError naming shard and key when its bytes are not those that were indexed.
        """
        reader, own_id = self._reader_of(sample_id)
        return reader.read(own_id)

    def where(self, sample_id: int) -> tuple[str, str]:
        """The path of a sample's shard, and its key there."""
        reader, own_id = self._reader_of(sample_id)
        return reader.where(own_id)

    def directory_of(self, sample_id: int) -> int:
        """Which of the directories that this reads a sample lies in."""
        return int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1

    def _reader_of(self, sample_id: int) -> tuple[ShardReader, int]:
        number = self.directory_of(sample_id)
        return self._readers[number], int(sample_id - self._first_ids[number])

    def close(self) -> None:
        """Close the shards that this process opened; the next read opens them again."""
        for reader in self._readers:
            reader.close()

    def __getstate__(self) -> dict:
        return self.__dict__


def _joined(readers: Sequence[ShardReader], label_maps: Sequence[np.ndarray]) -> Index:
    """The indexes of several directories end to end, with labels that count through the classes of all."""
    indexes = [reader.index for reader in readers]
    first_shards = np.cumsum([0] + [len(index.shards) for index in indexes])[:-1]
    pairs = [index.label_pairs() for index in indexes]
    label = np.concatenate([of_old[classes] for of_old, (_, classes) in zip(label_maps, pairs, strict=True)])
    labels = None
    if any(index.labels is not None for index in indexes):
        counts = [np.bincount(ids, minlength=len(index)) for index, (ids, _) in zip(indexes, pairs, strict=True)]
        ends = np.cumsum(np.concatenate([[0], *counts]))
        label, labels = np.empty(0, dtype=np.int64), pa.ListArray.from_arrays(pa.array(ends, pa.int32()), label)
    keys = [
        pc.binary_join_element_wise(str(reader.directory.parent), reader.index.key, "/").cast(pa.string())
        for reader in readers
    ]
    return Index(
        shards=[str(reader.directory / shard) for reader in readers for shard in reader.index.shards],
        shard=np.concatenate([index.shard + first for index, first in zip(indexes, first_shards, strict=True)]),
        key=pa.concat_arrays(keys),
        label=label,
        labels=labels,
        **{name: np.concatenate([getattr(index, name) for index in indexes]) for name in _NUMBERS},
    )
