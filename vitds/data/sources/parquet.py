"""Hugging Face's Parquet: encoded images inside the table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.data.decode import BadImage
from vitds.data.index import INDEX_NAME
from vitds.data.sources.base import MAX_CLASSES, Labels, Source, files_by_split, key_of, split_in_name
from vitds.data.sources.labels import Numbering
from vitds.errors import DataError

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_LABEL_TYPES = "integers from 0, or names, or lists of either"
_NUM_SHOWN = 3  # files of other splits; those of a test split may be dozens
_SPOOL_ROWS = 256  # read from Parquet at a time


@dataclass(kw_only=True)
class ParquetSource(Source):
    """Encoded images in a column `image: {bytes, path}` (or plain binary), classes in a column of integers or names.

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
    tables = {ours: _read(name, files) for ours, files in splits.items()}
    places: dict[str, str] = {}  # of names, which are numbered through all splits
    for table in tables.values():
        for row, texts in enumerate(table.texts or ()):
            for text in texts or ():
                if text not in places:
                    places[text] = f"{table.name} row {row}"
    sources: dict[str, Source] = {ours: _source(table, places, classes) for ours, table in tables.items()}
    unused = [file.name for file in named if not any(file in of_split for of_split in splits.values())]
    if unused:
        others = f" and {len(unused) - _NUM_SHOWN} more" if len(unused) > _NUM_SHOWN else ""
        next(iter(sources.values())).notes.append(f"{name}: not used: {', '.join(unused[:_NUM_SHOWN])}{others}")
    return sources


@dataclass(frozen=True)
class _Table:
    """The rows of one split without their images: `keys` and, where labels are text, each row's; None for no label."""

    name: str
    files: list[Path]
    image_column: str
    keys: list[str]
    labels: pa.Array
    texts: list[tuple[str, ...] | None] | None
    class_names: list[str] | None  # that Hugging Face's metadata say


def _read(name: str, files: list[Path]) -> _Table:
    name = name if len(files) == 1 else f"{name} ({files[0].name} ...)"
    try:
        schema = pq.read_schema(files[0])
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        image_column = _image_column(schema, features, name)
        label_column = _label_column(schema, features, name)
        has_paths = pa.types.is_struct(schema.field(image_column).type)
        columns = [label_column, f"{image_column}.path"] if has_paths else [label_column]
        tables = [_decoded(pq.ParquetFile(file).read(columns=columns), label_column) for file in files]
        table = pa.concat_tables(tables)
        labels = table[label_column].combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=name) from None
    paths = table[image_column].combine_chunks().field("path").to_pylist() if has_paths else [None] * len(table)
    keys = [key_of(path or "") or f"row-{row:08d}" for row, path in enumerate(paths)]
    texts = _texts(labels) if _is_text(_item_type(labels.type)) else None
    return _Table(name, files, image_column, keys, labels, texts, _innermost(features.get(label_column)).get("names"))


def _source(table: _Table, places: dict[str, str], classes: list[str] | None) -> ParquetSource:
    """Raises: DataError for an integer that is no position in the list of classes."""
    if table.texts is None:
        labels, classes, wrong = _from_integers(table, classes or table.class_names)
    else:
        labels, classes, wrong = _from_texts(table, Numbering(places, classes or table.class_names, table.name))
    numbers = np.array([row for row in range(len(table.keys)) if row not in wrong], np.int64)
    return ParquetSource(
        name=table.name,
        classes=classes,
        keys=[table.keys[row] for row in numbers.tolist()],
        labels=labels,
        bad=[f"{table.name} row {row} ({table.keys[row]}): {what}" for row, what in wrong.items()],
        parquet_files=table.files,
        image_column=table.image_column,
        numbers=numbers,
    )


def _from_integers(table: _Table, classes: list[str] | None) -> tuple[Labels, list[str], dict[int, str]]:
    """The labels of the rows that have one, the names of all classes, and what is wrong with the other rows."""
    try:
        labels, flat, is_labelled = _labels(table.labels)
    except pa.ArrowException as error:
        raise DataError(f"cannot be read: {error}", where=table.name) from None
    largest = flat.max(initial=-1)
    if not classes and largest >= MAX_CLASSES:
        raise DataError(
            f"label {largest} is no position in a list of classes", where=table.name, fix="number the classes from 0"
        )
    classes = classes or [str(label) for label in range(largest + 1)]
    if largest >= len(classes):
        raise DataError(f"label {largest}, but only {len(classes)} class names", where=table.name)
    return labels, classes, dict.fromkeys(np.flatnonzero(~is_labelled).tolist(), "no label")


def _from_texts(table: _Table, numbering: Numbering) -> tuple[Labels, list[str], dict[int, str]]:
    """As `_from_integers`."""
    labels: list[tuple[int, ...]] = []
    wrong: dict[int, str] = {}
    for row, texts in enumerate(table.texts or ()):
        numbers, what = numbering.numbers(texts or ())
        if texts is None or what:
            wrong[row] = what or "no label"
        else:
            labels.append(numbers)
    if _is_list(table.labels.type):
        return labels, numbering.classes, wrong
    return np.array([only for (only,) in labels], np.int64), numbering.classes, wrong


def _decoded(table: pa.Table, name: str) -> pa.Table:
    """The table with plain values in a column that may be dictionary-encoded, with other numbers in each file."""
    column, plain = table[name], _plain(table[name].type)
    return (
        table
        if plain == column.type
        else table.set_column(table.schema.get_field_index(name), name, column.cast(plain))
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    if _is_list(kind):
        return pa.list_(_plain(kind.value_type)) if pa.types.is_dictionary(kind.value_type) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _texts(column: pa.Array) -> list[tuple[str, ...] | None]:
    """Each row's labels as text. A list may be empty; null or a blank, alone or in a list, is no label."""
    rows = column.to_pylist()
    lists = [row or () for row in rows] if _is_list(column.type) else [(row,) for row in rows]
    return [tuple(row) if all(text and text.strip() for text in row) else None for row in lists]


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


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _item_type(kind: pa.DataType) -> pa.DataType:
    """The type of a label in a column that may hold lists of them, and may be dictionary-encoded."""
    kind = kind.value_type if _is_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _image_column(schema: pa.Schema, features: dict, where: str) -> str:
    """The column with a usual name, else the only one that the metadata declare, else the only one that fits at all."""
    fitting = [column.name for column in schema if holds_bytes(column.type)]
    found = _usual_or_declared(fitting, _IMAGE_COLUMNS, features, "Image") or fitting
    if not found or (len(found) > 1 and found is fitting):
        raise _no_column("Image", schema, _IMAGE_COLUMNS, "{bytes, path}", where)
    return found[0]


def _label_column(schema: pa.Schema, features: dict, where: str) -> str:
    """As `_image_column`; but text is for labels only under a usual name, and is looked at after integers.

    Raises: DataError also when a column with a usual name holds neither: another one would be a guess.
    """
    kinds = {column.name: _item_type(column.type) for column in schema}
    integers = [name for name, kind in kinds.items() if pa.types.is_integer(kind)]
    found = _usual_or_declared(integers, _LABEL_COLUMNS, features, "ClassLabel")
    found = found or [name for name in _LABEL_COLUMNS if name in kinds and _is_text(kinds[name])]
    if not found and (unfit := [name for name in _LABEL_COLUMNS if name in kinds]):
        what = f'column "{unfit[0]}" is of type {schema.field(unfit[0]).type}'
        raise DataError(what, where=where, fix=f"labels are {_LABEL_TYPES}")
    if not found and len(integers) != 1:
        raise _no_column("ClassLabel", schema, _LABEL_COLUMNS, _LABEL_TYPES, where)
    return (found or integers)[0]


def _usual_or_declared(fitting: list[str], names: Sequence[str], features: dict, feature: str) -> list[str]:
    declared = [name for name in fitting if _innermost(features.get(name)).get("_type") == feature]
    return [name for name in names if name in fitting] or (declared if len(declared) == 1 else [])


def _no_column(feature: str, schema: pa.Schema, names: Sequence[str], expected: str, where: str) -> DataError:
    what = f"no column for the {feature} among {', '.join(schema.names)}"
    return DataError(what, where=where, fix=f"expected {' or '.join(names)}: {expected}")


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
