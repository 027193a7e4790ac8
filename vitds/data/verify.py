"""Prove a data set whole: every byte of every shard is what its index says, and nothing else is there.

A shard's headers are walked as a reader that knows nothing of the index would do it; what they tell of each sample must
be what the index tells, and its bytes must have the checksum that the index has. Shards that vitds wrote hold nothing
else but the end mark; in somebody else's, other members may stand between the samples.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitds.data.decode import BadImage, as_image_file
from vitds.data.health import HEALTH_NAME
from vitds.data.image_files import open_file
from vitds.data.index import INDEX_NAME, Index, read_index, repeated_keys
from vitds.data.processes import in_processes
from vitds.data.scan import ScannedSample, scan_shard
from vitds.data.ustar import END_OF_ARCHIVE
from vitds.errors import DataError
from vitds.progress import Watcher

_NOT_INDEXED = "is not in the index"
_NUM_NAMED = 20  # of each kind that is found in the index alone


@dataclass
class Verified:
    """What was found: `findings` are wrong, each line begins with the file (and key); `notes` may be meant so."""

    num_images: dict[str, int] = field(default_factory=dict)
    num_shards: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_dataset(root: Path, *, decode_images: bool, workers: int = 1, watcher: Watcher | None = None) -> Verified:
    """Check all splits of a data set directory; `decode_images` decodes every image too.

    Raises: DataError when there is no data set.
    """
    watcher = watcher or Watcher()
    found = Verified()
    classes, info, health = (_read_json(root / name, found) for name in ("classes.json", "_info.json", HEALTH_NAME))
    listed = info.get("splits") if isinstance(info, dict) else None
    listed = listed if isinstance(listed, dict) else {}
    parts = _health_parts(root / HEALTH_NAME, health, found)
    ours = {split for split, part in parts.items() if part.get("fingerprint")}
    splits = sorted({path.parent.name for path in root.glob(f"*/{INDEX_NAME}")} | listed.keys())
    if not splits:
        raise DataError("holds no data set", where=str(root), fix="make one with tools/shard_imagenet.py SOURCE OUT")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        found.findings.append(f"{root / 'classes.json'}: is no list of class names")
        classes = []
    keys: dict[str, pa.Array] = {}
    for split in splits:
        directory = root / split
        try:
            index = read_index(directory / INDEX_NAME)
        except DataError as error:
            found.findings.append(f"{error.where}: {error.what}")
            continue
        keys[split] = index.key
        found.num_images[split], found.num_shards[split] = len(index), len(index.shards)
        lines = list(_about_index(directory, index, len(classes)))
        # Only our writer gives each sample a key of its own; others may count anew in each shard.
        (lines if split in ours else found.notes).extend(repeated_keys(directory, index))
        lines += _about_info(root, split, index, len(classes), listed.get(split))
        tasks = list(zip(index.shards, index.rows_by_shard(), strict=True))
        work = functools.partial(_check_shard, directory, index, split in ours, decode_images)
        watcher.begin(split, len(index))
        by_shard = dict(in_processes(work, tasks, min(workers, len(tasks)), functools.partial(watcher.advance, split)))
        for shard in index.shards:
            lines += by_shard[shard]
        known = _known(lines, root, parts.get(split, {}).get("unreadable", []))
        found.findings += [line for line in lines if line not in known]
        if known:
            found.notes.append(f"{split}: what {HEALTH_NAME} says was left out is there: {_some(known)}")
    if keys.keys() >= {"train", "val"}:
        both = keys["val"].filter(pc.is_in(keys["val"], keys["train"]))
        if len(both):
            found.notes.append(f"{len(both):,} keys are in train and in val: {_some(both.to_pylist())}")
    return found


def _read_json(path: Path, found: Verified) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.name != HEALTH_NAME:
            found.findings.append(f"{path}: is missing")
    except (OSError, ValueError, RecursionError) as error:
        found.findings.append(f"{path}: cannot be read: {error}")
    return None


def _health_parts(path: Path, health: Any, found: Verified) -> dict[str, dict[str, Any]]:
    """What health.json says of each split; nothing where it is not there, or damaged."""
    if health is None:
        return {}
    parts = health.get("splits") if isinstance(health, dict) else None
    if isinstance(parts, dict) and all(map(_is_health_part, parts.values())):
        return parts
    found.findings.append(f"{path}: is damaged: no health report of each split")
    return {}


def _is_health_part(part: Any) -> bool:
    bad = part.get("unreadable", []) if isinstance(part, dict) else None
    return isinstance(bad, list) and all(isinstance(line, str) for line in bad)


def _known(lines: list[str], root: Path, skipped: list[str]) -> dict[str, None]:
    """The lines, in their order, about what was left out on purpose: they say the same, or name what is in no index."""
    told_of = set(skipped)
    places = {line.partition(": ")[0] for line in skipped}
    places |= {place[: place.index(".tar ") + 4] for place in places if ".tar " in place}  # all of a shard's samples
    known: dict[str, None] = {}
    for line in lines:
        told = line.removeprefix(f"{root}/")
        place, _, what = told.partition(": ")
        if told in told_of or (what == _NOT_INDEXED and place in places):
            known[line] = None
    return known


def _some(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:_NUM_NAMED]) + (f" and {len(listed) - _NUM_NAMED} more" * (len(listed) > _NUM_NAMED))


def _about_index(directory: Path, index: Index, num_classes: int) -> Iterator[str]:
    """What is wrong inside an index, and between it and the names of the files."""
    path = directory / INDEX_NAME
    if not len(index):
        yield f"{path}: the split is empty"
        return
    ids = pq.read_table(path, columns=["sample_id"])["sample_id"].to_numpy()
    if not np.array_equal(ids, np.arange(len(index))):
        yield f"{path}: sample ids are not 0 to {len(index) - 1} in their order"
    rows, labels = index.label_pairs()
    outside = np.unique(rows[(labels < 0) | (labels >= num_classes)])
    if num_classes and len(outside):
        keys = index.key.take(pa.array(outside[:_NUM_NAMED])).to_pylist()
        yield f"{path}: {len(outside)} labels are outside the {num_classes} of classes.json: {', '.join(keys)}"
    for path in sorted({*directory.glob("*.tar")} - {directory / shard for shard in index.shards}):
        yield f"{path}: {_NOT_INDEXED}"


def _about_info(root: Path, split: str, index: Index, num_classes: int, info: Any) -> Iterator[str]:
    """Where _info.json does not say what the index says."""
    told = {
        "num_samples": len(index),
        "filenames": [f"{split}/{shard}" for shard in index.shards],
        "shard_lengths": index.shard_lengths(),
        "class_counts": index.class_counts(num_classes) if index.label_pairs()[1].min(initial=0) >= 0 else None,
    }
    for name, value in told.items():
        if not isinstance(info, dict) or info.get(name) != value:
            yield f"{root / '_info.json'}: {name} of {split} is not that of the index"


def _check_shard(
    directory: Path,
    index: Index,
    is_ours: bool,
    decode_images: bool,
    task: tuple[str, np.ndarray],
    advance: Callable[[int], None],
) -> tuple[str, list[str]]:
    """All that is wrong with one shard."""
    shard, rows = task
    path = directory / shard
    try:
        descriptor = open_file(path)
    except OSError as error:
        advance(len(rows))
        return shard, [f"{path}: cannot be opened, with its {len(rows)} samples: {error.strerror}"]
    try:
        scanned = scan_shard(path)
        findings = list(scanned.bad)
        told = {sample.offset: sample for sample in scanned.samples}
        for row in rows.tolist():
            sample = told.pop(int(index.offset[row]), None)
            what = _check_sample(descriptor, index, row, sample, decode_images)
            if what:
                findings.append(f"{path} {index.key[row]}: {what}")
            advance(1)
        findings += [f"{path} {sample.key}: {_NOT_INDEXED}" for sample in told.values()]
        if is_ours:
            findings += [f"{path}: {what}" for what in _check_frame(descriptor, index, rows)]
        return shard, findings
    except OSError as error:
        return shard, [f"{path}: cannot be read: {error.strerror}"]
    finally:
        os.close(descriptor)


def _check_sample(
    descriptor: int, index: Index, row: int, sample: ScannedSample | None, decode_images: bool
) -> str | None:
    """What is wrong with one sample, if anything is."""
    offset, size = int(index.offset[row]), int(index.size[row])
    if offset < 0 or size <= 0 or offset + size > os.fstat(descriptor).st_size:
        return f"its {size} bytes at byte {offset} are not in the shard"
    span = os.pread(descriptor, size, offset)
    if crc32(span) != index.crc32[row]:
        return "bytes differ from the index (crc32)"
    if sample is None or sample.size != size:
        return "the headers tell of no such sample at this place"
    if sample.key != index.key[row].as_py():
        return f"is called {sample.key} in the shard"
    if sample.label != index.label_of(row):
        return f"has label {sample.label} in the shard and {index.label_of(row)} in the index"
    first = sample.image_offset - offset
    try:
        image = as_image_file(span[first : first + sample.image_size], verify=decode_images)
    except BadImage as error:
        return str(error)
    if (image.height, image.width) != (index.height[row], index.width[row]):
        return f"is {image.width}x{image.height} pixels, in the index {index.width[row]}x{index.height[row]}"
    return None


def _check_frame(descriptor: int, index: Index, rows: np.ndarray) -> Iterator[str]:
    """What else there is in a shard of ours: the samples lie end to end, and the end mark follows."""
    ends = index.offset[rows] + index.size[rows]
    starts = np.concatenate([[0], ends])
    if not np.array_equal(index.offset[rows], starts[:-1]):
        yield "the index has gaps between its samples"
    size = os.fstat(descriptor).st_size
    expected = int(starts[-1]) + len(END_OF_ARCHIVE)
    if size != expected:
        yield f"has {size} bytes, not {expected}"
    elif os.pread(descriptor, len(END_OF_ARCHIVE), int(starts[-1])) != END_OF_ARCHIVE:
        yield "its end mark is damaged"
