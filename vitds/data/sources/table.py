"""A table of image files: CSV, TSV or Parquet with the columns path, label and, if it likes, split.

Paths are relative to the table. A label is a class name, or an integer; several a sample are a list in Parquet, and
text with `|` between them elsewhere. Names are numbered in sorted order, unless the list of classes is given.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.data.sources.base import SPLIT_NAMES, Labels, Source, as_splits, key_of, split_in_name
from vitds.data.sources.folders import FileSource
from vitds.data.sources.labels import Numbering
from vitds.data.sources.parquet import holds_bytes
from vitds.errors import DataError, did_you_mean, nearest


class _Row(NamedTuple):
    place: int
    path: str
    labels: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class _Table:
    """The rows of a table, of whatever format; `unit` is what a row's place counts."""

    rows: list[_Row]
    unit: str
    has_several: bool  # labels a sample
    has_splits: bool


def table(path: Path, split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits of a table of paths; nothing when the file is no such table.

    Raises: DataError naming a missing column, or a split that is none.
    """
    read = {".csv": _read_text, ".tsv": _read_text, ".parquet": _read_parquet}.get(path.suffix.lower())
    found = read(path) if read and path.is_file() else None
    if found is None:
        return {}
    by_split: dict[str, list[_Row]] = {}
    for row in found.rows:
        if found.has_splits and row.split not in SPLIT_NAMES:
            what = f'{found.unit} {row.place}: "{row.split}" is no split'
            raise DataError(what, where=str(path), fix=did_you_mean(row.split, SPLIT_NAMES))
        by_split.setdefault(row.split, []).append(row)
    alone = split or next(iter(as_splits({split_in_name(path, path.parent): 0})), "train")
    splits = as_splits(by_split) or {alone: by_split.get("", [])}
    unused = [name for name, rows in by_split.items() if not any(rows is used for used in splits.values())]
    numbering = _numbering(path, found, [row for rows in splits.values() for row in rows], classes)
    sources = {ours: _source(path, found, rows, numbering) for ours, rows in splits.items()}
    if unused:
        next(iter(sources.values())).notes.append(f"{path}: not used: the rows of {', '.join(unused)}")
    return dict(sources)


def _read_text(path: Path) -> _Table:
    """Read a CSV or TSV."""
    rows: list[_Row] = []
    labels_of: dict[str, tuple[str, ...]] = {}  # the same labels come again and again
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = next((mark for mark in ("\t", ",", ";") if mark in header), ",")
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            columns = [name.strip().lower() for name in next(lines, [])]
            _check_columns(columns, path)
            at_path, at_label = columns.index("path"), columns.index("label")
            at_split = columns.index("split") if "split" in columns else None
            for line in lines:
                if not line:
                    continue
                if len(line) != len(columns):
                    what = f"line {lines.line_num} has {len(line)} cells, the first line {len(columns)}"
                    raise DataError(what, where=str(path))
                label = line[at_label]
                if label not in labels_of:
                    labels_of[label] = tuple(text.strip() for text in label.split("|") if text.strip())
                split = "" if at_split is None else sys.intern(line[at_split].strip().lower())
                rows.append(_Row(lines.line_num, line[at_path], labels_of[label], split))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None
    return _Table(rows, "line", any("|" in label for label in labels_of), at_split is not None)


def _read_parquet(path: Path) -> _Table | None:
    """Read Parquet; None where it holds the images themselves, or no path."""
    try:
        schema = pq.read_schema(path)
        if "path" not in schema.names or any(holds_bytes(column.type) for column in schema):
            return None
        _check_columns(schema.names, path)
        has_splits = "split" in schema.names
        read = pq.read_table(path, columns=["path", "label", "split"] if has_splits else ["path", "label"])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None
    splits = read["split"].to_pylist() if has_splits else [""] * len(read)
    rows = []
    columns = read["path"].to_pylist(), read["label"].to_pylist(), splits
    for number, (file, label, split) in enumerate(zip(*columns, strict=True)):
        labels = label if isinstance(label, list) else [label]
        texts = tuple(str(each) for each in labels if each is not None)
        rows.append(_Row(number, file or "", texts, "" if split is None else str(split).strip().lower()))
    kind = read["label"].type
    has_several = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _Table(rows, "row", has_several, has_splits)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    for column in ("path", "label"):
        if column not in columns:
            near = nearest(column, columns)
            fix = f'rename "{near}" to "{column}"' if near else "expected path, label and, if it likes, split"
            raise DataError(f'no column "{column}" among {", ".join(columns)}', where=str(path), fix=fix)


def _numbering(path: Path, found: _Table, rows: list[_Row], classes: list[str] | None) -> Numbering:
    places: dict[str, str] = {}
    for row in rows:
        for label in row.labels:
            if label not in places:
                places[label] = f"{found.unit} {row.place}"
    return Numbering(places, classes, str(path))


def _source(path: Path, found: _Table, rows: list[_Row], numbering: Numbering) -> FileSource:
    kept: list[_Row] = []
    labels: list[tuple[int, ...]] = []
    bad: list[str] = []
    classes = numbering.classes
    for row in rows:
        numbers, what = numbering.numbers(row.labels)
        if not (what or numbers or found.has_several):
            what = "no label"
        if not (what or os.path.isfile(os.path.join(path.parent, row.path))):
            what = "no such file"
        if what:
            bad.append(f"{path} {found.unit} {row.place} {row.path}: {what}")
        else:
            kept.append(row)
            labels.append(numbers)
    as_they_are: Labels = labels if found.has_several else np.array([only for (only,) in labels], np.int64)
    notes = []
    num_used = len({label for of_row in labels for label in of_row})
    if not numbering.by_names and 2 * num_used < len(classes):
        notes.append(
            f"{path}: {num_used} of {len(classes)} classes have images: integer labels are positions in the list of "
            "classes; where they are names, give the list with --classes FILE"
        )
    return FileSource(
        name=str(path),
        classes=classes,
        keys=[key_of(row.path) for row in kept],
        labels=as_they_are,
        notes=notes,
        bad=bad,
        root="",
        paths=[os.path.join(path.parent, row.path) for row in kept],
    )
