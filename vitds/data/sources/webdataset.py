"""WebDataset shards of anybody's: a directory of tars, one tar, or a pattern like `train-{000..127}.tar`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from vitds.data.index import repeated
from vitds.data.scan import ScannedShard, scan_shard
from vitds.data.sources.base import SPLIT_NAMES, Labels, Source, files_by_split, read_classes, split_in_name
from vitds.data.sources.folders import folders_in
from vitds.data.sources.tars import TarSource
from vitds.errors import DataError


def webdataset_shards(path: Path, split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits in a directory of shards, or in one shard; nothing when there is none.

    A split is called by a word in the name of its shards or of their folder. Classes are those given, else
    classes.json, else the labels themselves.
    """
    if path.is_file():
        return webdataset_pattern(str(path), split, classes) if path.suffix == ".tar" else {}
    folders = [path, *(path / name for name in SPLIT_NAMES)]
    if any(name not in SPLIT_NAMES for folder in folders for name in folders_in(folder)):
        return {}  # a tree of class folders, with an archive left in it
    named = {
        shard: split_in_name(shard, path) if folder == path else folder.name
        for folder in folders
        for shard in sorted(folder.glob("*.tar"))
    }
    return _sources(path, named, split, classes) if named else {}


def webdataset_pattern(pattern: str, split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits among the shards that a pattern with braces names.

    Raises: DataError naming the shards that are missing.
    """
    shards = [Path(pattern)] if Path(pattern).exists() else [Path(shard) for shard in expand(pattern)]
    missing = [str(shard) for shard in shards if not shard.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"no such file: {missing[0]}{more}, of {len(shards)} shards", where=pattern)
    root = Path(os.path.commonpath([shard.parent for shard in shards]))
    return _sources(root, {shard: split_in_name(shard, root) for shard in shards}, split, classes)


def expand(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for.

    Raises: DataError when its braces do not match.
    """
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise DataError("braces that do not match", where=pattern, fix="as in train-{000000..000127}.tar") from None


def _sources(root: Path, named: dict[Path, str], split: str | None, classes: list[str] | None) -> dict[str, Source]:
    """The splits of shards, each with the split in its name."""
    splits = files_by_split(named, split)
    if classes is None:
        beside = [folder / "classes.json" for folder in (root, root.parent)]
        classes = next((read_classes(file) for file in beside if file.is_file()), None)
    num_classes = len(classes) if classes else None
    scanned = {ours: [scan_shard(shard, num_classes) for shard in of_split] for ours, of_split in splits.items()}
    if classes is None:
        flat = [label for found in scanned.values() for shard in found for label in shard.labels()]
        classes = [str(label) for label in range(max(flat, default=-1) + 1)]
    sources: dict[str, Source] = {ours: _source(root, found, classes) for ours, found in scanned.items()}
    unused = [shard for shard in named if not any(shard in of_split for of_split in splits.values())]
    if unused:
        next(iter(sources.values())).notes.append(f"{root}: not used: {', '.join(shard.name for shard in unused)}")
    return sources


def _source(root: Path, shards: list[ScannedShard], classes: list[str]) -> TarSource:
    samples = [sample for shard in shards for sample in shard.samples]
    labels: Labels
    if any(isinstance(sample.label, tuple) for sample in samples):
        labels = [each.label if isinstance(each.label, tuple) else (each.label,) for each in samples]
    else:
        labels = np.array([sample.label for sample in samples], np.int64)
    source = TarSource(
        name=str(shards[0].path) if len(shards) == 1 else f"{root} ({shards[0].path.name} ...)",
        classes=classes,
        keys=[sample.key.lstrip("/") for sample in samples],
        labels=labels,
        notes=_notes(root, shards),
        bad=[line for shard in shards for line in shard.bad],
        tars=[str(shard.path) for shard in shards],
        tar=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.samples) for shard in shards]),
        offset=np.array([sample.image_offset for sample in samples], np.int64),
        size=np.array([sample.image_size for sample in samples], np.int64),
    )
    rows, firsts = repeated(pa.array(source.keys, pa.string()))
    if len(rows):
        both = f"{source.where(firsts.item(0))}, {source.where(rows.item(0))}"
        source.notes.append(f"renamed {len(rows)} samples with the key of an earlier one, and those: {both} ...")
    return source


def _notes(root: Path, shards: list[ScannedShard]) -> list[str]:
    ignored = sum((shard.ignored for shard in shards), Counter())
    notes = [f"{root}: passed over {count} {kind}" for kind, count in sorted(ignored.items())]
    unsafe = [f"{shard.path} {key}" for shard in shards for key in shard.unsafe]
    if unsafe:
        notes.append(f"renamed {len(unsafe)} keys that would leave the folder they are extracted to: {unsafe[0]} ...")
    return notes
