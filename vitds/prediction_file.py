"""Predictions of any number of images as csv, jsonl or parquet, written as they come; a file is whole or not there.

A row is the image's name, its label if known, the predicted class with name and probability, the `topk` most likely
classes, and the features that the head sees, the last two where they are asked for. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.durable import new_file
from vitds.errors import UsageError

FORMATS = ("csv", "jsonl", "parquet")
_ROW_GROUP = 8192


@dataclass
class Rows:
    """What a model said of a batch of images.

    Shapes: names and labels B; classes (B, K), most likely first, and probabilities (B, L), None without a head;
        features (B, D), None when not asked for.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    classes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    features: np.ndarray | None = None


class PredictionFile:
    """Rows to a file, or to stdout; a context manager that puts the file in its place when all went well.

    Without a row there is no file.
    Raises: UsageError when the file cannot be written.
    """

    def __init__(self, path: Path | None, kind: str, class_names: Sequence[str], topk: bool = False) -> None:
        self.path, self.kind, self.topk = path, kind, topk
        self._names = pa.array(class_names, pa.string())
        self._place = ExitStack()
        self._stream: IO[Any] = sys.stdout
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._num_rows = 0

    def __enter__(self) -> PredictionFile:
        if self.path is not None:
            try:
                file = self._place.enter_context(new_file(self.path))
            except OSError as error:
                raise self._unwritable(error) from None
            self._stream = file if self.kind == "parquet" else io.TextIOWrapper(file, encoding="utf-8", newline="")
        return self

    def write(self, rows: Rows) -> None:
        """Write the rows, or keep them until they fill a row group of a Parquet file."""
        columns = self._columns(rows)
        try:
            if self.kind == "parquet":
                self._waiting.append(pa.table(columns))
                if sum(map(len, self._waiting)) >= _ROW_GROUP:
                    self._write_row_group()
            elif self.kind == "csv":
                self._write_csv(columns)
            else:
                for row in pa.table(columns).to_pylist():
                    self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from None
        self._num_rows += len(rows.names)

    def __exit__(
        self, failure: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if failure is not None:
            self._place.__exit__(failure, error, trace)
            return
        try:
            with self._place:
                self._write_row_group()
                if self._writer is not None:
                    self._writer.close()
                self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as full:
            raise self._unwritable(full) from None

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot be written: {error.strerror or error}", where=str(self.path or "stdout"))

    def _columns(self, rows: Rows) -> dict[str, pa.Array]:
        columns = {"path": pa.array(rows.names, pa.string()), "label": pa.array(rows.labels, pa.int64())}
        if rows.classes is not None and rows.probabilities is not None:
            first = pa.array(rows.classes[:, 0], pa.int32())
            columns |= {"predicted": first, "predicted_name": self._names.take(first)}
            probabilities = np.take_along_axis(rows.probabilities, rows.classes, axis=1)
            columns["probability"] = pa.array(probabilities[:, 0], pa.float32())
            if self.topk:
                classes = rows.classes
                columns["topk_classes"] = _lists(pa.array(classes.ravel(), pa.int32()), classes.shape)
                columns["topk_names"] = _lists(self._names.take(pa.array(classes.ravel())), classes.shape)
                columns["topk_probabilities"] = _lists(pa.array(probabilities.ravel(), pa.float32()), classes.shape)
        if rows.features is not None:
            columns["features"] = _lists(pa.array(rows.features.ravel(), pa.float32()), rows.features.shape)
        return columns

    def _write_row_group(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, table.schema)
        self._writer.write_table(table, row_group_size=len(table))

    def _write_csv(self, columns: dict[str, pa.Array]) -> None:
        """Lists become columns: topk_classes_1, topk_classes_2, ..., features_0, features_1, ..."""
        flat: dict[str, pa.Array] = {}
        for name, column in columns.items():
            if pa.types.is_list(column.type):
                values, first = column.flatten(), 0 if name == "features" else 1
                width = len(values) // len(column)
                flat |= {
                    f"{name}_{first + k}": values.take(pa.array(range(k, len(values), width))) for k in range(width)
                }
            else:
                flat[name] = column
        writer = csv.writer(self._stream, lineterminator="\n")
        if not self._num_rows:
            writer.writerow(flat)
        # Arrow writes a float32 with as many digits as it has, and no more.
        writer.writerows(zip(*(column.cast(pa.string()).to_pylist() for column in flat.values()), strict=True))


def _lists(values: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """Shapes: (B * K,) -> B lists of K."""
    return pa.ListArray.from_arrays(pa.array(np.arange(shape[0] + 1, dtype=np.int32) * shape[1]), values)
