"""The index of a split: one row per sample, in the order of the shards. It is what makes the data set exact.

`index.parquet` has the columns sample_id, shard, key, offset, size, label, width, height, crc32. Offset and size span
all of a sample in its tar, headers and label included, and crc32 is zlib's over that span. The image is the span's
first member: its ustar header, at the offset, says its extension and length (see `vitds.data.ustar`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.errors import DataError

INDEX_NAME = "index.parquet"
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


@dataclass(frozen=True)
class Index:
    """The columns of an index, a row per sample id; `shard` holds positions in `shards`.

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

    def __len__(self) -> int:
        return len(self.label)

    def class_counts(self, num_classes: int) -> list[int]:
        """How many samples each label has."""
        return np.bincount(self.label, minlength=num_classes).tolist()

    def shard_lengths(self) -> list[int]:
        """How many samples each shard holds."""
        return np.bincount(self.shard, minlength=len(self.shards)).tolist()

    def shard_ends(self) -> list[int]:
        """Where the last sample of each shard ends, in bytes."""
        ends = np.zeros(len(self.shards), dtype=np.int64)
        np.maximum.at(ends, self.shard, self.offset + self.size)
        return ends.tolist()


def write_index(path: Path, index: Index) -> None:
    """Write an index as Parquet; the same index gives the same bytes."""
    columns = [np.arange(len(index)), pa.DictionaryArray.from_arrays(pa.array(index.shard, pa.int32()), index.shards)]
    columns += [getattr(index, name) for name in _SCHEMA.names[2:]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), path, compression="zstd")


def read_index(path: Path) -> Index:
    """Read `index.parquet`.

    Raises: DataError when it is missing, is no Parquet file or lacks a column.
    """
    try:
        table = pq.read_table(path, columns=_SCHEMA.names).cast(_SCHEMA).combine_chunks()
    except FileNotFoundError:
        raise DataError("the split has no index.parquet", where=str(path.parent)) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"index cannot be read: {error}", where=str(path)) from None
    shard = table["shard"].combine_chunks()
    numbers = {name: table[name].to_numpy() for name in ("offset", "size", "label", "width", "height", "crc32")}
    return Index(shard.dictionary.to_pylist(), shard.indices.to_numpy(), table["key"].combine_chunks(), **numbers)
