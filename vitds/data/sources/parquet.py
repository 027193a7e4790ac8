"""Hugging Face's Parquet: encoded images inside the table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.data.decode import BadImage
from vitds.data.index import INDEX_NAME
from vitds.data.sources.base import MAX_CLASSES, Labels, Source, files_by_split, key_of, split_in_name
from vitds.errors import DataError

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SPOOL_ROWS = 256  # read from Parquet at a time


@dataclass(kw_only=True)
class ParquetSource(Source):
    """Encoded images in a column `image: {bytes, path}` (or plain binary), classes in a column of integers.

    Parquet cannot be read row by row in any order, so the images are first copied, in theirs, to one plain file.

    Shapes: numbers (N,), the rows' places in the tables laid end to end.
    """

    parquet_files: list[Path]
    numbers: np.ndarray
    image_column: str
    _spool: BinaryIO | None = None

    def prepare(self, scratch: Path) -> None:
        """Copy the image bytes to one file; once, also where parts of this source are written one after the other."""
        if self._spool:
            return
        sizes = []
        with open(scratch / "images", "wb") as spool:
            for path in self.parquet_files:
                for batch in pq.ParquetFile(path).iter_batches(_SPOOL_ROWS, columns=[self.image_column]):
                    images = batch.column(0)
                    if pa.types.is_struct(images.type):
                        images = images.field("bytes")
                    for image in images.to_pylist():
                        sizes.append(spool.write(image or b""))
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._spool = open(scratch / "images", "rb")  # stays open: every worker reads from it by position

    def read(self, row: int) -> bytes:
        """The image's bytes, from the copy.

        Raises: BadImage when the table has none.
        """
        assert self._spool, "prepare() comes first"
        number = self.numbers.item(row)
        first, end = self._offsets[number : number + 2].tolist()
        if first == end:
            raise BadImage("its bytes are not in the table, only its path at most")
        return os.pread(self._spool.fileno(), end - first, first)

    def sizes(self) -> np.ndarray:
        """The images' lengths, known once they were copied."""
        return np.diff(self._offsets)[self.numbers]

    def sizes_at_rest(self) -> np.ndarray:
        """The tables' sizes."""
        return np.array([path.stat().st_size for path in self.parquet_files], np.int64)

    def files(self) -> list[Path]:
        """The tables."""
        return self.parquet_files

    def where(self, row: int) -> str:
        """The row's number in the split."""
        return f"{self.name} row {self.numbers[row]} ({self.keys[row]})"


def parquet(path: Path, split: str | None, classes: list[str] | None = None) -> dict[str, Source]:
    """The splits in a Parquet file or a directory of them; nothing when there is no such file."""
    root = path if path.is_dir() else path.parent
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] * (path.suffix == ".parquet")
    named = {file: split_in_name(file, root) for file in files if file.name != INDEX_NAME}  # ours lies beside shards
    return parquet_files(str(path), named, split, classes)


def parquet_files(name: str, named: dict[Path, str], split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits that files make, each with the split in its name."""
    splits = files_by_split(named, split)
    sources: dict[str, Source] = {ours: _parquet_source(name, files, classes) for ours, files in splits.items()}
    unused = [file.name for file in named if not any(file in of_split for of_split in splits.values())]
    if unused:
        next(iter(sources.values())).notes.append(f"{name}: not used: {', '.join(unused)}")
    return sources


def _parquet_source(name: str, files: list[Path], classes: list[str] | None) -> ParquetSource:
    name = name if len(files) == 1 else f"{name} ({files[0].name} ...)"
    try:
        schema = pq.read_schema(files[0])
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        image_column = _column(schema, features, _IMAGE_COLUMNS, "Image", holds_bytes, name)
        label_column = _column(schema, features, _LABEL_COLUMNS, "ClassLabel", _holds_labels, name)
        has_paths = pa.types.is_struct(schema.field(image_column).type)
        columns = [label_column, f"{image_column}.path"] if has_paths else [label_column]
        table = pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in files])
        labels, flat, is_labelled = _labels(table[label_column].combine_chunks())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=name) from None
    paths = table[image_column].combine_chunks().field("path").to_pylist() if has_paths else [None] * len(table)
    keys = [key_of(path or "") or f"row-{row:08d}" for row, path in enumerate(paths)]
    classes = classes or _innermost(features.get(label_column)).get("names")
    if not classes and flat.max(initial=-1) >= MAX_CLASSES:
        raise DataError(
            f"label {flat.max()} is no position in a list of classes", where=name, fix="number the classes from 0"
        )
    classes = classes or [str(label) for label in range(flat.max(initial=-1) + 1)]
    if flat.max(initial=-1) >= len(classes):
        raise DataError(f"label {flat.max()}, but only {len(classes)} class names", where=name)
    numbers = np.flatnonzero(is_labelled)
    return ParquetSource(
        name=name,
        classes=classes,
        keys=[keys[row] for row in numbers.tolist()],
        labels=labels,
        bad=[f"{name} row {row} ({keys[row]}): no label" for row in np.flatnonzero(~is_labelled).tolist()],
        parquet_files=files,
        image_column=image_column,
        numbers=numbers,
    )


def _labels(column: pa.Array) -> tuple[Labels, np.ndarray, np.ndarray]:
    """The labels of the rows that have one, or each one's list of them; all of them laid end to end; which rows those
    are. A list may be empty; null or a negative number, alone or in a list, is no label.

    Shapes: column M -> labels N, (any,) integers, (M,) bool.
    """
    if pa.types.is_integer(column.type):
        flat = _integers(column)
        return flat[flat >= 0], flat, flat >= 0
    lists = [tuple(sorted({-1 if label is None else label for label in row or ()})) for row in column.to_pylist()]
    is_labelled = np.array([not row or row[0] >= 0 for row in lists], bool)
    kept = [row for row in lists if not row or row[0] >= 0]
    return kept, _integers(column.flatten()), is_labelled


def _integers(column: pa.Array) -> np.ndarray:
    """Integers of any width as int64, and -1 for null, which unsigned ones could not hold.

    Raises: ArrowInvalid for one beyond int64.
    """
    return column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def _innermost(feature: Any) -> dict[str, Any]:
    """What Hugging Face's metadata say of a column, or of the things in its lists."""
    if isinstance(feature, list):
        return _innermost(feature[0]) if feature else {}
    if not isinstance(feature, dict):
        return {}
    return _innermost(feature["feature"]) if "feature" in feature else feature


def _holds_labels(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return pa.types.is_integer(kind.value_type if is_list else kind)


def _column(
    schema: pa.Schema,
    features: dict,
    names: Sequence[str],
    feature: str,
    fits: Callable[[pa.DataType], bool],
    where: str,
) -> str:
    """The column with a usual name, else the only one that the metadata declare, else the only one that fits at all."""
    fitting = [column.name for column in schema if fits(column.type)]
    declared = [name for name in fitting if _innermost(features.get(name)).get("_type") == feature]
    usual = [name for name in names if name in fitting]
    for candidates in (usual, declared, fitting):
        if candidates and (candidates is usual or len(candidates) == 1):
            return candidates[0]
    expected = "{bytes, path}" if feature == "Image" else "an integer, or a list of them"
    raise DataError(
        f"no column for the {feature} among {', '.join(schema.names)}",
        where=where,
        fix=f"expected {' or '.join(names)}: {expected}",
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
