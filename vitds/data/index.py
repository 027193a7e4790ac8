"""The index of a split: one row per sample, in the order of the shards. It is what makes the data set exact.

`index.parquet` has the columns sample_id, shard, key, offset, size, label, width, height, crc32. Offset and size span
all of a sample in its tar, headers and label included, and crc32 is zlib's over that span. The image is the span's
first member that is named like one, in our own shards the very first (see `vitds.data.ustar.image_in`). The label is an
int64, or a list of them where samples have any number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitds.data.ustar import Label
from vitds.errors import DataError
from vitds.transport import Url

INDEX_NAME = "index.parquet"
_NUM_NAMED = 20  # of the samples whose key comes twice
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.uint32()),
    ]
)
_LABEL_LISTS = _SCHEMA.set(_SCHEMA.get_field_index("label"), pa.field("label", pa.list_(pa.int64())))


@dataclass(frozen=True)
class Index:
    """The columns of an index, a row per sample id; `shard` holds positions in `shards`.

    Where samples have any number of classes, `labels` holds a list for each and `label` is empty.

    Shapes: every column (N,).
    Units:  offset and size in bytes, width and height in pixels.
    """

    shards: list[str]
    shard: np.ndarray
    key: pa.StringArray  # keys stay in Arrow: a million Python strings would cost each rank 100 MB
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    width: np.ndarray
    height: np.ndarray
    crc32: np.ndarray
    labels: pa.ListArray | None = None

    def __len__(self) -> int:
        return len(self.offset)

    def label_of(self, sample_id: int) -> Label:
        """The class of a sample, or all its classes."""
        return int(self.label[sample_id]) if self.labels is None else tuple(self.labels[sample_id].as_py())

    def label_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every sample with each of its classes, in the order of sample ids.

        Shapes: -> (M,) sample ids, (M,) classes; M is N where samples have one class each.
        """
        if self.labels is None:
            return np.arange(len(self)), self.label
        return np.repeat(np.arange(len(self)), self.labels.value_lengths().to_numpy()), self.labels.flatten().to_numpy()

    def class_counts(self, num_classes: int) -> list[int]:
        """How many samples each class has."""
        return np.bincount(self.label_pairs()[1], minlength=num_classes).tolist()

    def shard_lengths(self) -> list[int]:
        """How many samples each shard holds."""
        return np.bincount(self.shard, minlength=len(self.shards)).tolist()

    def rows_by_shard(self) -> list[np.ndarray]:
        """The sample ids in each shard, in their order."""
        by_shard = np.argsort(self.shard, kind="stable")
        return np.split(by_shard, np.cumsum(self.shard_lengths())[:-1])

    def shard_ends(self) -> list[int]:
        """Where the last sample of each shard ends, in bytes."""
        ends = np.zeros(len(self.shards), dtype=np.int64)
        np.maximum.at(ends, self.shard, self.offset + self.size)
        return ends.tolist()


def repeated(keys: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose key an earlier row has, and the first row of each one's key.

    Shapes: keys (N,) -> (M,), (M,)
    """
    codes = keys.dictionary_encode().indices.to_numpy()  # counted in the order in which keys come first
    is_first = np.diff(np.maximum.accumulate(codes), prepend=-1) > 0
    rows = np.flatnonzero(~is_first)
    return rows, np.flatnonzero(is_first)[codes[rows]]


def repeated_keys(directory: Path, index: Index) -> list[str]:
    """A line for each sample of a split's directory whose key an earlier one has; after some, how many more."""
    rows, firsts = repeated(index.key)
    lines = [
        f"{directory / index.shards[index.shard[row]]} {index.key[row]}: duplicate key, first in "
        f"{index.shards[index.shard[first]]}"
        for row, first in zip(rows[:_NUM_NAMED].tolist(), firsts[:_NUM_NAMED].tolist(), strict=True)
    ]
    more = len(rows) - len(lines)
    return lines + [f"{directory}: {more:,} more samples have a key that an earlier one has"] * (more > 0)


def write_index(path: Path, index: Index) -> None:
    """Write an index as Parquet; the same index gives the same bytes."""
    schema = _SCHEMA if index.labels is None else _LABEL_LISTS
    columns: dict[str, Any] = {name: getattr(index, name) for name in schema.names[2:]}
    if index.labels is not None:
        columns["label"] = index.labels
    shard = pa.DictionaryArray.from_arrays(pa.array(index.shard, pa.int32()), index.shards)
    columns = {"sample_id": np.arange(len(index)), "shard": shard} | columns
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")


def read_index(path: Path | Url, file: BinaryIO | None = None) -> Index:
    """Read `index.parquet`, or the open `file` that came from there.

    Raises: DataError when it is missing, is no Parquet file, lacks a column or a value, or names a shard elsewhere.
    """
    try:
        table = pq.read_table(file or path, columns=_SCHEMA.names)
        has_lists = pa.types.is_list(table.schema.field("label").type)
        table = table.cast(_LABEL_LISTS if has_lists else _SCHEMA).combine_chunks()
        table.validate(full=True)  # that text is UTF-8, and every shard's number that of a name
    except FileNotFoundError:
        raise DataError("the split has no index.parquet", where=str(path.parent)) from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"index cannot be read: {error}", where=str(path)) from None
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count or (has_lists and name == "label" and pc.list_flatten(column).null_count):
            raise DataError(f'index has rows without a value in "{name}"', where=str(path))
    shard = table["shard"].combine_chunks()
    for name in shard.dictionary.to_pylist():
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise DataError(f'index names a shard outside of its directory: "{name}"', where=str(path))
    numbers = {name: table[name].to_numpy() for name in ("offset", "size", "width", "height", "crc32")}
    label, labels = label_columns(table["label"].combine_chunks())
    return Index(
        shard.dictionary.to_pylist(),
        shard.indices.to_numpy(),
        table["key"].combine_chunks(),
        label=label,
        labels=labels,
        **numbers,
    )


def label_columns(label: Sequence[Label] | pa.Array) -> tuple[np.ndarray, pa.ListArray | None]:
    """`label` and `labels` of an Index, from each sample's class, or list of classes."""
    if not isinstance(label, pa.Array):
        has_lists = len(label) > 0 and not isinstance(label[0], int | np.integer)
        label = pa.array(label, pa.list_(pa.int64()) if has_lists else pa.int64())
    if pa.types.is_list(label.type):
        return np.empty(0, dtype=np.int64), label
    return label.to_numpy(), None
