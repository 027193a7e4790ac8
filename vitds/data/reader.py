"""Shards to encoded samples: any sample of a split by its id, checked against the crc32 in the index on every read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vitds.data.index import INDEX_NAME, Index, read_index
from vitds.data.ustar import Label, checksum, image_in
from vitds.errors import DataError

_MAX_OPEN_SHARDS = 256  # of the 1024 descriptors that a process usually has


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


class ShardReader:
    """A split of a data set directory: its length, its labels, and `read(sample_id)`.

    Shards are opened at their first read and read by position, so the object may cross a fork or a pickle.
    """

    def __init__(self, dataset_dir: str | Path, split: str) -> None:
        """Read classes and index, and compare the size of each shard with the index.

        Raises: DataError when the data set or the split is missing or empty, or a shard is missing or too short.
        """
        root = Path(dataset_dir)
        self.split = split
        self.directory = root / split
        self.classes = read_classes(root)
        if not self.directory.is_dir():
            found = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{INDEX_NAME}"))) or "none"
            raise SplitMissing(f'has no split "{split}"', where=str(root), fix=f"splits found: {found}")
        self.index = read_index(self.directory / INDEX_NAME)
        if not len(self.index):
            raise DataError("the split is empty", where=str(self.directory))
        self._check_labels()
        for shard, end in zip(self.index.shards, self.index.shard_ends(), strict=True):
            self._check_size(shard, end)
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def multi_label(self) -> bool:
        """Samples have any number of classes, not one each."""
        return self.index.labels is not None

    def read(self, sample_id: int) -> EncodedSample:
        """Read one sample.

        Raises: DataError naming shard and key when its bytes are not those that were indexed.
        """
        index = self.index
        shard, key = self.where(sample_id)
        size = int(index.size[sample_id])
        try:
            span = os.pread(self._descriptor(int(index.shard[sample_id])), size, int(index.offset[sample_id]))
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=f"{shard} {key}") from None
        if len(span) != size:
            raise DataError("shard is truncated", where=f"{shard} {key}")
        if checksum(span) != index.crc32[sample_id]:
            raise DataError("bytes differ from the index (crc32)", where=f"{shard} {key}")
        try:
            extension, data = image_in(span)
        except ValueError as error:
            raise DataError(str(error), where=f"{shard} {key}") from None
        return EncodedSample(key, Path(shard).name, extension, data, index.label_of(sample_id))

    def key(self, sample_id: int) -> str:
        """The sample's name inside its tar, without extension."""
        return self.index.key[sample_id].as_py()

    def where(self, sample_id: int) -> tuple[str, str]:
        """The path of a sample's shard, and its key there."""
        return str(self.directory / self.index.shards[self.index.shard[sample_id]]), self.index.key[sample_id].as_py()

    @property
    def indexes(self) -> list[Index]:
        """The index of each directory that this reads: one."""
        return [self.index]

    def _check_labels(self) -> None:
        sample_ids, labels = self.index.label_pairs()
        outside = (labels < 0) | (labels >= len(self.classes))
        if outside.any():
            first = int(outside.argmax())
            sample_id, label = int(sample_ids[first]), labels[first]
            where = " ".join(self.where(sample_id))
            raise DataError(f"label {label}, and classes.json names {len(self.classes)}", where=where)

    def _check_size(self, shard: str, end: int) -> None:
        path = self.directory / shard
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"shard cannot be opened: {error.strerror}", where=str(path)) from None
        if size < end:
            raise DataError(f"shard is truncated: {size} bytes, the index knows {end}", where=str(path))

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(self.directory / self.index.shards[shard], os.O_RDONLY)
            self._descriptors[shard] = descriptor
        return descriptor

    def close(self) -> None:
        """Close the shards that this process opened; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}


def read_classes(dataset_dir: str | Path) -> list[str]:
    """The names of the labels of a data set directory.

    Raises: DataError when it is none.
    """
    root = Path(dataset_dir)
    try:
        return json.loads((root / "classes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "has no classes.json: not a data set of vitds" if root.is_dir() else "no such directory"
        raise DataError(what, where=str(root), fix="make one with tools/shard_imagenet.py SOURCE OUT") from None
    except (OSError, ValueError) as error:
        raise DataError(f"classes.json cannot be read: {error}", where=str(root)) from None
