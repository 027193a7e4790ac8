"""Shards that stay where they are become a data set: an index, classes and health are written beside them.

Every sample is read once, for its checksum and its image's size; nothing is written into a shard.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from vitds.data.decode import BadImage, as_image_file
from vitds.data.describe import CLASSES_NAME, INFO_NAME, SPLITS, FinishedSplit, Summary, describe
from vitds.data.index import INDEX_NAME, repeated_keys
from vitds.data.processes import Advance, in_processes
from vitds.data.scan import scan_shard
from vitds.data.shard import RECORD_SCHEMA, record_table
from vitds.data.sources.base import read_classes
from vitds.data.writer import WriteOptions, unusable
from vitds.dataset_facts import DatasetFacts, check_splits
from vitds.errors import DataError
from vitds.progress import Watcher

_RENAME = "keys that would leave the folder they are extracted to cannot be renamed in place: write the shards anew"


def index_shards(
    directory: Path, options: WriteOptions, classes: list[str] | None = None, watcher: Watcher | None = None
) -> Summary:
    """Index the shards in DIR/train and DIR/val. Classes are those given, else DIR/classes.json, else the labels.

    Raises: DataError when there are none, they are indexed already, or something in them cannot be used and is not to
            be skipped.
    """
    watcher = watcher or Watcher()
    shards = _find_shards(directory)
    if classes is None and (directory / CLASSES_NAME).is_file():
        classes = read_classes(directory / CLASSES_NAME)
    num_classes = len(classes) if classes else None
    found = {split: _read_shards(split, paths, num_classes, options, watcher) for split, paths in shards.items()}
    every = [record for records in found.values() for record in records]
    bad = [line for record in every for line in record["bad"]]
    if bad and not options.skip_bad:
        num_images = sum(len(record["key"]) for record in every) + len(bad)
        raise unusable(bad, num_images, str(directory), "repair or remove them, or leave them out with --skip-bad")

    splits = {split: _finished(directory, split, records) for split, records in found.items()}
    counts = {split: np.bincount(content.index().label_pairs()[1]).tolist() for split, content in splits.items()}
    if not any(map(sum, counts.values())):
        raise DataError("no image has a class", where=str(directory))
    if classes is None:
        classes = [str(label) for label in range(max(map(len, counts.values())))]
    repeats = [line for content in splits.values() for line in repeated_keys(content.directory, content.index())]
    padded = {split: of + [0] * (len(classes) - len(of)) for split, of in counts.items()}
    ignored: Counter[str] = sum((record["ignored"] for record in every), Counter())
    warnings = [f"{directory}: passed over {count} {kind}" for kind, count in sorted(ignored.items())]
    warnings += repeats
    if padded.keys() >= {"train", "val"}:
        warnings += check_splits(DatasetFacts(str(directory), classes, padded["train"], padded["val"]))
    return describe(directory, classes, splits, warnings, options.find_duplicates, watcher, options.workers)


def _find_shards(directory: Path) -> dict[str, list[Path]]:
    shards = {split: sorted((directory / split).glob("*.tar")) for split in SPLITS}
    shards = {split: paths for split, paths in shards.items() if paths}
    if not shards:
        other = next(iter(sorted(directory.rglob("*.tar"))), None)
        raise DataError(
            "holds no train/*.tar" + (f", but {other.relative_to(directory)}" if other else ""),
            where=str(directory),
            fix=f"move or link the shards into {directory / 'train'} and {directory / 'val'}; or write them anew: "
            "tools/shard_imagenet.py SOURCE OUT takes any directory of tars",
        )
    info = directory / INFO_NAME
    if info.exists():  # what is written last
        is_ours = any((directory / split / INDEX_NAME).exists() for split in SPLITS)
        what = "is indexed already" if is_ours else f"has an {INFO_NAME} that vitds did not write"
        raise DataError(what, where=str(directory), fix=f"to index it anew, move {info} away")
    return shards


def _read_shards(
    split: str, paths: list[Path], num_classes: int | None, options: WriteOptions, watcher: Watcher
) -> list[dict[str, Any]]:
    """The records of all shards of a split."""
    watcher.begin(split, len(paths), unit="shards")

    def read(number: int, advance: Advance) -> tuple[int, dict[str, Any]]:
        record = _read_shard(paths[number], num_classes, options)
        advance(1)
        return number, record

    advance = functools.partial(watcher.advance, split)
    records = dict(in_processes(read, range(len(paths)), min(options.workers, len(paths)), advance))
    return [records[number] for number in range(len(paths))]


def _read_shard(path: Path, num_classes: int | None, options: WriteOptions) -> dict[str, Any]:
    """The columns of a shard's record, a line for each thing that is wrong with it, and what was passed over."""
    scanned = scan_shard(path, num_classes)
    columns: dict[str, Any] = {name: [] for name in RECORD_SCHEMA.names}
    bad = scanned.bad + [f"{path} {key}: {_RENAME}" for key in scanned.unsafe]
    unsafe = set(scanned.unsafe)
    if scanned.samples:
        with open(path, "rb") as shard:
            for sample in scanned.samples:
                if sample.key in unsafe:
                    continue
                span = os.pread(shard.fileno(), sample.size, sample.offset)
                first = sample.image_offset - sample.offset
                data = span[first : first + sample.image_size]
                try:
                    image = as_image_file(data, verify=options.verify)
                except BadImage as error:
                    bad.append(f"{path} {sample.key}: {error}")
                    continue
                checksum = crc32(data) if options.find_duplicates else None
                values = (
                    *(sample.key, sample.offset, sample.size, sample.label, image.width, image.height, crc32(span)),
                    *(image.format, sample.image_size, checksum),
                )
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    return columns | {"bad": bad, "ignored": scanned.ignored, "shard": path.name}


def _finished(root: Path, split: str, records: list[dict[str, Any]]) -> FinishedSplit:
    """The records of all shards that hold something; what is bad without the data set's directory, which may move.

    Raises: DataError when none does.
    """
    bad = [line.removeprefix(f"{root}/") for record in records for line in record["bad"]]
    records = [record for record in records if record["key"]]
    if not records:
        raise DataError("no sample in its shards can be used", where=str(root / split), fix="\n".join(bad[:20]))
    if any(isinstance(label, tuple) for record in records for label in record["label"]):
        for record in records:
            record["label"] = [label if isinstance(label, tuple) else (label,) for label in record["label"]]
    shard = np.repeat(np.arange(len(records), dtype=np.int32), [len(record["key"]) for record in records])
    table = pa.concat_tables([record_table(record) for record in records])
    return FinishedSplit(root / split, [record["shard"] for record in records], shard, table, bad)
