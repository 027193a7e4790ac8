"""What a data set has beside its shards: indexes, classes.json, health.json, and _info.json for timm.

All of it follows from the records of finished shards, so it can be written again at any time.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from vitds.data.health import HEALTH_NAME, duplicates_within, equal_images, leakage, split_health
from vitds.data.index import INDEX_NAME, Index, label_columns, read_index, write_index
from vitds.data.processes import in_processes
from vitds.data.shard import RECORD_SCHEMA
from vitds.data.ustar import image_in
from vitds.durable import fsync, replace_text
from vitds.progress import Watcher

CLASSES_NAME = "classes.json"
INFO_NAME = "_info.json"
SPLITS = ("train", "val")


@dataclass
class SplitSummary:
    """What became of one split; `bad` are the images that were left out, each with the reason."""

    num_images: int
    num_shards: int
    size_bytes: int
    bad: list[str]


@dataclass
class Summary:
    """What lies at `path` now, and what its user should know. A part has no `health`: it shows after the merge.
    `is_new` is False when all of it was there already.
    """

    path: Path
    num_classes: int
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    health: dict[str, Any] = field(default_factory=dict)
    is_new: bool = True


@dataclass
class FinishedSplit:
    """A split whose shards are all finished: where they lie, and the rows of all records.

    Shapes: shard (N,) are positions in `shards`.
    """

    directory: Path
    shards: list[str]
    shard: np.ndarray
    records: pa.Table
    bad: list[str]

    def read(self, row: int) -> bytes:
        """The image of a row."""
        offset, size = (self.records[name][row].as_py() for name in ("offset", "size"))
        with open(self.directory / self.shards[self.shard[row]], "rb") as shard:
            return image_in(os.pread(shard.fileno(), size, offset))[1]

    def index(self) -> Index:
        """The rows of the index."""
        columns = {name: self.records[name].to_numpy() for name in ("offset", "size", "width", "height", "crc32")}
        label, labels = label_columns(self.records["label"].combine_chunks())
        key = self.records["key"].combine_chunks()
        return Index(shards=self.shards, shard=self.shard, key=key, label=label, labels=labels, **columns)


def describe(
    out: Path,
    classes: list[str],
    splits: dict[str, FinishedSplit],
    warnings: list[str],
    find_duplicates: bool,
    watcher: Watcher,
    workers: int,
) -> Summary:
    """Write all that a data set has beside its shards, which lie in their places already. Can be repeated."""
    for split, content in splits.items():
        write_index(out / split / INDEX_NAME, content.index())
        fsync(out / split / INDEX_NAME)
    by_split = {split: {"fingerprint": ""} for split in splits}
    document = {"classes": classes, "splits": by_split, "duplicates": find_duplicates}
    health = health_of(out, document, dict(splits), watcher, workers)
    write_json(out / CLASSES_NAME, classes)
    write_json(out / HEALTH_NAME, health)
    write_info(out, classes)
    fsync(out)
    return summary_of(out, classes, list(splits), warnings)


def health_of(
    out: Path, document: dict[str, Any], loaded: dict[str, FinishedSplit], watcher: Watcher, workers: int
) -> dict[str, Any]:
    """The content of health.json, with what is known already of splits that were there before."""
    classes = document["classes"]
    parts: dict[str, Any] = {}
    for split in SPLITS:
        if split in loaded:
            content = loaded[split]
            counts = content.index().class_counts(len(classes))
            fingerprint = document["splits"][split]["fingerprint"]
            parts[split] = split_health(content.records, counts, classes, content.bad, fingerprint)
        elif (out / split / INDEX_NAME).exists():
            known = read_json(out / HEALTH_NAME).get("splits", {}).get(split)
            old = None
            if known is None or document["duplicates"]:
                old = loaded[split] = _from_shards(out / split, watcher, workers)
            counts = read_index(out / split / INDEX_NAME).class_counts(len(classes))
            parts[split] = known or split_health(old.records, counts, classes, [], "")  # type: ignore[union-attr]
    leaked = None
    if document["duplicates"]:
        ordered = {split: loaded[split] for split in SPLITS if split in loaded}
        records = {split: content.records for split, content in ordered.items()}
        groups = equal_images(records, lambda split, row: ordered[split].read(row))
        for split, table in records.items():
            parts[split]["duplicates"] = duplicates_within(split, table, groups)
        if records.keys() >= {"train", "val"}:
            leaked = leakage(records, groups)
    for part in parts.values():
        part.setdefault("duplicates", None)
    return {"splits": parts, "leakage": leaked}


def _from_shards(directory: Path, watcher: Watcher, workers: int) -> FinishedSplit:
    """The records of a split that was written before, from its shards."""
    index = read_index(directory / INDEX_NAME)
    task = f"{directory.name}, for duplicates"
    watcher.begin(task, len(index))

    rows_by_shard = index.rows_by_shard()

    def read(shard: int, advance: Callable[[int], None]) -> tuple[int, list[tuple[str, int, int]]]:
        found = []
        with open(directory / index.shards[shard], "rb") as tar:
            for row in rows_by_shard[shard].tolist():
                extension, image = image_in(os.pread(tar.fileno(), int(index.size[row]), int(index.offset[row])))
                found.append((_FORMATS.get(extension, extension), len(image), crc32(image)))
                advance(1)
        return shard, found

    advance = functools.partial(watcher.advance, task)
    by_shard = dict(in_processes(read, range(len(index.shards)), workers, advance))
    rows = [row for shard in range(len(index.shards)) for row in by_shard[shard]]
    formats, sizes, checksums = zip(*rows, strict=True)
    columns: dict[str, Any] = {name: getattr(index, name) for name in RECORD_SCHEMA.names[:7]}
    columns |= {"format": formats, "image_bytes": sizes, "image_crc32": checksums}
    schema = RECORD_SCHEMA
    if index.labels is not None:
        columns["label"] = index.labels
        schema = schema.set(schema.get_field_index("label"), pa.field("label", index.labels.type))
    return FinishedSplit(directory, index.shards, index.shard, pa.table(columns, schema=schema), [])


_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def write_info(data: Path, classes: list[str]) -> None:
    """Write what timm's reader, and checks without pyarrow, need to know of each split; it follows from the indexes."""
    splits: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        if (data / split / INDEX_NAME).exists():
            index = read_index(data / split / INDEX_NAME)
            splits[split] = {
                "name": split,
                "num_samples": len(index),
                "filenames": [f"{split}/{shard}" for shard in index.shards],
                "shard_lengths": index.shard_lengths(),
                "class_counts": index.class_counts(len(classes)),
            }
            if index.labels is not None:
                splits[split]["multi_label"] = True  # a sample counts in each of its classes
    write_json(data / INFO_NAME, {"splits": splits})


def write_json(path: Path, content: object) -> None:
    """Put a JSON file in place, for people to read as well."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # A byte of a path that is no UTF-8 becomes \udcff: JSON's own escape for what Python has in its place.
    replace_text(path, text.encode("utf-8", "backslashreplace").decode())


def summary_of(out: Path, classes: list[str], splits: list[str], warnings: list[str]) -> Summary:
    """What a finished data set says of itself."""
    info, health = (read_json(out / name) for name in (INFO_NAME, HEALTH_NAME))
    summary = Summary(out, len(classes), warnings=warnings, health=health)
    for split in splits:
        facts = info["splits"][split]
        size_bytes = sum((out / name).stat().st_size for name in facts["filenames"])
        bad = health["splits"][split]["unreadable"]
        summary.splits[split] = SplitSummary(facts["num_samples"], len(facts["filenames"]), size_bytes, bad)
    return summary


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
