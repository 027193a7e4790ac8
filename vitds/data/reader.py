"""Shards to encoded samples: any sample of a split by its id, checked against the crc32 in the index on every read."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np

from vitds.data.index import INDEX_NAME, Index, read_index
from vitds.data.ustar import Label, checksum, image_in
from vitds.errors import DataError, DataUnavailable
from vitds.transport import Url, location

if TYPE_CHECKING:
    from vitds.data.cache import Cache
    from vitds.data.prefetch import RemoteShard

_MAX_OPEN_SHARDS = 256  # of all readers of a process; fewer where it may have few descriptors
_ABSENT = (FileNotFoundError, NotADirectoryError)  # the data's fault; whatever else opening says is the machine's


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it lies in its shard."""

    key: str
    shard: str
    extension: str
    data: bytes
    label: Label


class SplitMissing(DataError):
    """A data set directory has no such split."""


class BytesDiffer(DataError):
    """A sample is not as it was when it was indexed."""


class _OpenShards(dict[int, int]):
    """The descriptor of each shard that a reader has open, oldest first; they are closed with the reader."""

    def close_oldest(self) -> None:
        os.close(self.pop(next(iter(self))))

    def __del__(self) -> None:
        while self:
            self.close_oldest()


class ShardReader:
    """A split of a data set directory: its length, its labels, and `read(sample_id)`.

    Shards are opened at their first read and read by position, so the object may cross a fork or a pickle.
    """

    directory: Path | Url  # of the split
    cache: Cache | None = None  # where shards from elsewhere are kept

    def __init__(self, dataset_dir: str | Path, split: str, max_lost: float = 0.0) -> None:
        """Read classes and index, and compare the size of each shard with the index.

        Raises: DataError when the data set or the split is missing or empty, or a larger share of its samples than
        `max_lost` has gone with shards that are missing or too short; DataUnavailable when a shard cannot be looked at.
        """
        root = Path(dataset_dir)
        self.split = split
        self.directory = directory = root / split
        self.classes = read_classes(root)
        if not directory.is_dir():
            found = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{INDEX_NAME}"))) or "none"
            raise SplitMissing(f'has no split "{split}"', where=str(root), fix=f"splits found: {found}")
        self._take(read_index(directory / INDEX_NAME))
        self._check_sizes(max_lost)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def multi_label(self) -> bool:
        """Samples have any number of classes, not one each."""
        return self.index.labels is not None

    def read(self, sample_id: int) -> EncodedSample:
        """Read one sample.

        Raises: DataError naming shard and key when its bytes are not those that were indexed, DataUnavailable naming
        the shard when it is there and cannot be read now.
        """
        try:
            return self._read(sample_id)
        except DataError as error:
            error.where = error.where or " ".join(self.where(sample_id))
            raise
        except OSError as error:
            raise DataUnavailable(f"cannot be read: {error.strerror}", where=self.where(sample_id)[0]) from None

    def _read(self, sample_id: int) -> EncodedSample:
        index, size = self.index, int(self.index.size[sample_id])
        shard = int(index.shard[sample_id])
        try:
            span = os.pread(self._descriptor(shard), size, int(index.offset[sample_id]))
        except _ABSENT as error:
            raise DataError(f"cannot be read: {error.strerror}") from None
        if len(span) != size:
            raise BytesDiffer("shard is truncated")
        if checksum(span) != index.crc32[sample_id]:
            raise BytesDiffer("bytes differ from the index (crc32)")
        try:
            extension, data = image_in(span)
        except ValueError as error:
            raise DataError(str(error)) from None
        return EncodedSample(self.key(sample_id), index.shards[shard], extension, data, index.label_of(sample_id))

    def key(self, sample_id: int) -> str:
        """The sample's name inside its tar, without extension."""
        return self.index.key[sample_id].as_py()

    def where(self, sample_id: int) -> tuple[str, str]:
        """The path of a sample's shard, and its key there."""
        return str(self.directory / self.index.shards[self.index.shard[sample_id]]), self.index.key[sample_id].as_py()

    def directory_of(self, sample_id: int) -> int:
        """Which of the directories that this reads a sample lies in."""
        return 0

    @property
    def indexes(self) -> list[Index]:
        """The index of each directory that this reads: one."""
        return [self.index]

    @property
    def remote_shards(self) -> list[RemoteShard | None]:
        """What of each shard would have to be fetched: nothing."""
        return [None] * len(self.index.shards)

    def _take(self, index: Index) -> None:
        """Raises: DataError when the index is empty or has labels without a name."""
        if not len(index):
            raise DataError("the split is empty", where=str(self.directory))
        self.index = index
        self._check_labels()
        self._descriptors = _OpenShards()

    def _check_labels(self) -> None:
        sample_ids, labels = self.index.label_pairs()
        outside = (labels < 0) | (labels >= len(self.classes))
        if outside.any():
            first = int(outside.argmax())
            sample_id, label = int(sample_ids[first]), labels[first]
            where = " ".join(self.where(sample_id))
            raise DataError(f"label {label}, and classes.json names {len(self.classes)}", where=where)

    def _check_sizes(self, max_lost: float) -> None:
        found, sizes = [], []
        for shard, end in zip(self.index.shards, self.index.shard_ends(), strict=True):
            path = Path(self.directory) / shard
            try:
                sizes.append(path.stat().st_size)
            except _ABSENT as error:
                sizes.append(0)
                found.append((path, f"shard cannot be opened: {error.strerror}"))
            except OSError as error:
                raise DataUnavailable(f"shard cannot be opened: {error.strerror}", where=str(path)) from None
            else:
                if sizes[-1] < end:
                    found.append((path, f"shard is truncated: {sizes[-1]} bytes, the index knows {end}"))
        num_lost = int((self.index.offset + self.index.size > np.array(sizes)[self.index.shard]).sum())
        if num_lost > max_lost * len(self):
            path, what = found[0]
            others = "".join(f"\n  {other}: {its}" for other, its in found[1:6]) + "\n  ..." * (len(found) > 6)
            raise DataError(
                f"{what}{others}\n  {num_lost} of {len(self)} samples are lost, allowed share {max_lost:g}",
                where=str(path),
                fix="bring the shards back; training goes on without them as far as --max-bad-samples allows",
            )

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            _readers.add(self)
            _make_room()
            descriptor = self._descriptors[shard] = self._open(shard)
        return descriptor

    def _open(self, shard: int) -> int:
        return os.open(Path(self.directory) / self.index.shards[shard], os.O_RDONLY)

    def close(self) -> None:
        """Close the shards that this process opened; the next read opens them again."""
        while self._descriptors:
            self._descriptors.close_oldest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": _OpenShards()}


_readers: WeakSet[ShardReader] = WeakSet()  # of this process, that have opened shards


def _make_room() -> None:
    """Let one more shard be opened: a quarter of the descriptors that this process may have are for shards."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN_SHARDS, limit // 4))
    while sum(len(reader._descriptors) for reader in _readers) >= most:
        max(_readers, key=lambda reader: len(reader._descriptors))._descriptors.close_oldest()


def read_classes(dataset_dir: str | Path) -> list[str]:
    """The names of the labels of a data set directory.

    Raises: DataError when it is none.
    """
    root = location(dataset_dir)
    try:
        classes = json.loads((root / "classes.json").read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("it is no list of names")
        return classes
    except FileNotFoundError:
        is_there = isinstance(root, Url) or root.is_dir()
        what = "has no classes.json: not a data set of vitds" if is_there else "no such directory"
        raise DataError(what, where=str(root), fix="make one with tools/shard_imagenet.py SOURCE OUT") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"classes.json cannot be read: {error}", where=str(root)) from None
