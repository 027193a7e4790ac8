"""A table of image files: CSV, TSV or Parquet with the columns path, label and, if it likes, split.

Paths are relative to the table. A label is a class name, or an integer; several a sample are a list in Parquet, and
text with `|` between them elsewhere. Names are numbered in sorted order, unless the list of classes is given.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.data.sources.base import SPLIT_NAMES, Labels, Source, as_splits, split_in_name
from vitds.data.sources.folders import FileSource
from vitds.data.sources.parquet import holds_bytes
from vitds.errors import DataError, did_you_mean, nearest

_INTEGER = re.compile(r"-?\d{1,18}(\.0+)?")  # as 3.0, too: what pandas makes of integers with a gap among them
_MAX_CLASSES = 2**20


@dataclass(frozen=True)
class _Row:
    place: str
    path: str
    labels: tuple[str, ...]


def table(path: Path, split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits of a table of paths; nothing when the file is no such table.

    Raises: DataError naming a missing column, or a split that is none.
    """
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        columns, rows = _read_text(path)
    elif path.is_file() and path.suffix == ".parquet":
        columns, rows = _read_parquet(path)
    else:
        return {}
    if not columns:
        return {}
    has_several = any(not isinstance(row["label"], str) or "|" in row["label"] for row in rows)
    by_split: dict[str, list[_Row]] = {}
    for row in rows:
        name = row.get("split", "").strip().lower()
        if "split" in columns and name not in SPLIT_NAMES:
            raise DataError(
                f'{row["place"]}: "{name}" is no split', where=str(path), fix=did_you_mean(name, SPLIT_NAMES)
            )
        label = row["label"].split("|") if isinstance(row["label"], str) else row["label"]
        labels = tuple(text.strip() for text in label if text.strip())
        by_split.setdefault(name, []).append(_Row(row["place"], row["path"], labels))
    alone = split or next(iter(as_splits({split_in_name(path, path.parent): 0})), "train")
    splits = as_splits(by_split) or {alone: by_split.get("", [])}
    unused = [name for name, of in by_split.items() if not any(of is used for used in splits.values())]
    by_names, classes = _classes(path, [row for of_split in splits.values() for row in of_split], classes)
    sources = {ours: _source(path, of, by_names, classes, has_several) for ours, of in splits.items()}
    if unused:
        next(iter(sources.values())).notes.append(f"{path}: not used: the rows of {', '.join(unused)}")
    return dict(sources)


def _read_text(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns, and rows as column -> text, of a CSV or TSV."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = next((mark for mark in ("\t", ",", ";") if mark in header), ",")
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            columns = [name.strip().lower() for name in next(lines, [])]
            _check_columns(columns, path)
            rows = []
            for line in lines:
                if line and len(line) != len(columns):
                    raise DataError(
                        f"line {lines.line_num} has {len(line)} cells, the first line {len(columns)}", where=str(path)
                    )
                if line:
                    rows.append(dict(zip(columns, line, strict=True), place=f"line {lines.line_num}"))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None
    return columns, rows


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a Parquet table of paths; no columns where it holds the images themselves, or no path."""
    try:
        schema = pq.read_schema(path)
        if "path" not in schema.names or any(holds_bytes(column.type) for column in schema):
            return [], []
        _check_columns(schema.names, path)
        names = [name for name in ("path", "label", "split") if name in schema.names]
        read = pq.read_table(path, columns=names).to_pydict()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None
    rows = []
    for number, values in enumerate(zip(*read.values(), strict=True)):
        row: dict[str, Any] = dict(zip(names, values, strict=True), place=f"row {number}")
        label = row["label"]
        row["label"] = [str(each) for each in label] if isinstance(label, list) else "" if label is None else str(label)
        rows.append({column: "" if value is None else value for column, value in row.items()})
    return names, rows


def _check_columns(columns: Sequence[str], path: Path) -> None:
    for column in ("path", "label"):
        if column not in columns:
            near = nearest(column, columns)
            fix = f'rename "{near}" to "{column}"' if near else "expected path, label and, if it likes, split"
            raise DataError(f'no column "{column}" among {", ".join(columns)}', where=str(path), fix=fix)


def _classes(path: Path, rows: list[_Row], classes: list[str] | None) -> tuple[bool, list[str]]:
    """Whether labels are names, not integers, and the names of all classes."""
    places: dict[str, str] = {}
    for row in rows:
        for label in row.labels:
            places.setdefault(label, row.place)
    integers = [label for label in places if _INTEGER.fullmatch(label)]
    if classes is not None:
        return not set(places) <= set(integers) or set(places) <= set(classes), classes
    if not integers:
        return True, sorted(places)
    if len(integers) < len(places):
        odd = next(label for label in places if label not in integers)
        raise DataError(
            f'labels are names and integers: "{odd}" in {places[odd]}, "{integers[0]}" in {places[integers[0]]}',
            where=str(path),
            fix="correct them, or give the names of all classes with --classes FILE",
        )
    num_classes = min(max(int(float(label)) for label in integers) + 1, _MAX_CLASSES)
    return False, [str(label) for label in range(num_classes)]


def _source(path: Path, rows: list[_Row], by_names: bool, classes: list[str], has_several: bool) -> FileSource:
    position = {name: label for label, name in enumerate(classes)}
    kept: list[_Row] = []
    labels: list[tuple[int, ...]] = []
    bad: list[str] = []
    for row in rows:
        found = [position.get(text, -1) if by_names else int(float(text)) for text in row.labels]
        wrong = [text for text, label in zip(row.labels, found, strict=True) if not 0 <= label < len(classes)]
        if wrong:
            hint = f" ({did_you_mean(wrong[0], classes)})" if by_names and nearest(wrong[0], classes) else ""
            bad.append(f"{path} {row.place} {row.path}: label {wrong[0]} is none of the {len(classes)} classes{hint}")
        elif not found and not has_several:
            bad.append(f"{path} {row.place} {row.path}: no label")
        elif not os.path.isfile(os.path.join(path.parent, row.path)):
            bad.append(f"{path} {row.place} {row.path}: no such file")
        else:
            kept.append(row)
            labels.append(tuple(sorted(set(found))))
    as_they_are: Labels = labels if has_several else np.array([only for (only,) in labels], np.int64)
    notes = []
    num_used = len({label for of_row in labels for label in of_row})
    if not by_names and 2 * num_used < len(classes):
        notes.append(
            f"{path}: {num_used} of {len(classes)} classes have images: integer labels are positions in the list of "
            "classes; where they are names, give the list with --classes FILE"
        )
    return FileSource(
        name=str(path),
        classes=classes,
        keys=[_key(row.path) for row in kept],
        labels=as_they_are,
        notes=notes,
        bad=bad,
        root="",
        paths=[os.path.join(path.parent, row.path) for row in kept],
    )


def _key(path: str) -> str:
    """A path without its suffix, and without the way up that it begins with."""
    return re.sub(r"^(\.\./)+|^/+", "", os.path.splitext(os.path.normpath(path))[0])
