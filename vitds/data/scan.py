"""Somebody's WebDataset shard by its headers alone: its samples, where they lie, and all that is wrong with it.

A sample is a run of members with one key, as WebDataset groups them: an image, a label (`key.cls`, an ASCII integer, or
`key.json`, {"label": 3} or {"labels": [3, 17]}), and whatever else there is, which is never opened. After damage the
scan goes on at the next header that is whole, so one bad block costs the samples that it touches and no other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from vitds.data.image_files import open_file
from vitds.data.tar_members import BLOCK_BYTES, FileBytes, Member, is_header, walk
from vitds.data.ustar import Label, image_among, read_label, split_name

_MAX_LABEL_BYTES = 2**16
_NUM_SHOWN = 20
_MAX_CLASSES = 2**20  # where the number is not known, a label beyond is no label
_RUNS_CODE = {"pyd", "pkl", "pickle", "pth", "pt"}  # what WebDataset's decoders would unpickle
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True, slots=True)
class ScannedSample:
    """A sample of a shard: its key, its span of blocks, its image inside the shard, and its label or labels.

    Units: bytes.
    """

    key: str
    offset: int
    size: int
    image_offset: int
    image_size: int
    label: Label


@dataclass
class ScannedShard:
    """What a shard holds: the samples that can be used, a line for each thing that is wrong, what was passed over."""

    path: Path
    samples: list[ScannedSample] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # each names the shard and, where there is one, the key
    ignored: Counter[str] = field(default_factory=Counter)  # what was not opened -> how often
    unsafe: list[str] = field(default_factory=list)  # keys that would leave the folder they are extracted to

    def labels(self) -> Iterator[int]:
        """All labels of all samples."""
        for sample in self.samples:
            yield from sample.label if isinstance(sample.label, tuple) else (sample.label,)


def scan_shard(path: Path, num_classes: int | None = None) -> ScannedShard:
    """Walk a shard's headers; labels must be below `num_classes` where it is known. Only label members are read."""
    found = ScannedShard(path)
    try:
        descriptor = open_file(path)
    except OSError as error:
        found.bad.append(f"{path}: cannot be opened: {error.strerror}")
        return found
    try:
        _scan(found, FileBytes(descriptor), os.fstat(descriptor).st_size, num_classes)
    except OSError as error:
        found.bad.append(f"{path}: cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)
    return found


def _scan(found: ScannedShard, tar: FileBytes, end: int, num_classes: int | None) -> None:
    if not end:
        found.bad.append(f"{found.path}: empty file")
        return
    compression = _COMPRESSED.get(tar[0:2])
    if compression and not is_header(tar[0:BLOCK_BYTES]):
        found.bad.append(f"{found.path}: compressed ({compression}), so nothing has a place in it: decompress it first")
        return
    times: Counter[str] = Counter()
    runs = _runs(found, tar, end)
    for number, run in enumerate(runs):
        groups = [(key, list(group)) for key, group in groupby(run, lambda member: split_name(member.name)[0])]
        for place, (key, group) in enumerate(groups):
            is_torn = (number > 0 and place == 0) or (number + 1 < len(runs) and place + 1 == len(groups))
            for sample in _without_repeats(group):
                times[key] += 1
                what = "duplicate key" if times[key] > 1 else _add(found, key, sample, tar, num_classes, is_torn)
                if what:
                    found.bad.append(f"{found.path} {key}: {what}")


def _runs(found: ScannedShard, tar: FileBytes, end: int) -> list[list[Member]]:
    """The members that make samples, in runs that no damage interrupts."""
    runs: list[list[Member]] = [[]]
    for member in walk(tar, 0, end):
        if isinstance(member, Member):
            if _is_of_a_sample(member, found.ignored):
                runs[-1].append(member)
            continue
        found.bad.append(f"{found.path}: {member.what}")
        if member.lost:
            found.bad.append(
                f"{found.path} {split_name(member.lost.name)[0]}: blocks of {member.lost.name} are missing"
            )
            if runs[-1] and runs[-1][-1] is member.lost:
                runs[-1].pop()
        runs.append([])
    return runs


def _is_of_a_sample(member: Member, ignored: Counter[str]) -> bool:
    """Whether WebDataset would make the member part of a sample; what nobody should open is counted."""
    base = member.name.rpartition("/")[2]
    if member.name.startswith("__") and "__" in member.name[2:].partition("/")[0]:
        return False  # WebDataset's own notes
    if not member.is_file:
        if not member.name.endswith("/"):
            ignored["links and other members that are no files"] += 1
        return False
    if base.startswith(".") or "." not in base:
        ignored["hidden files and files without extension"] += 1
        return False
    if base.rpartition(".")[2].lower() in _RUNS_CODE:
        ignored["pickles (.pyd, .pkl, .pth), never opened"] += 1
    return True


def _without_repeats(sample: list[Member]) -> list[list[Member]]:
    """The members of one key, cut where an extension comes again: there another sample of that key begins."""
    parts: list[list[Member]] = [[]]
    seen: set[str] = set()
    for member in sample:
        extension = split_name(member.name)[1]
        if extension in seen:
            parts.append([])
            seen.clear()
        seen.add(extension)
        parts[-1].append(member)
    return parts


def _add(
    found: ScannedShard, key: str, sample: list[Member], tar: FileBytes, num_classes: int | None, is_torn: bool
) -> str | None:
    """Add a sample to what was found; what is wrong with it, where it cannot be used.

    Of one beside damage members may be missing: there a `key.mask.png` is not taken for the image.
    """
    image = image_among(sample)
    if image is None or (is_torn and "." in split_name(image.name)[1]):
        return f"no image, only {', '.join(split_name(member.name)[1] for member in sample)}"
    label = _label(sample, tar)
    if isinstance(label, str):
        return label
    for each in label if isinstance(label, tuple) else (label,):
        if each >= (num_classes or _MAX_CLASSES):
            return f"label {each} is out of range" + (f", there are {num_classes} classes" if num_classes else "")
    first = sample[0].start
    if key.startswith("/") or ".." in key.split("/"):
        found.unsafe.append(key)
    found.samples.append(ScannedSample(key, first, sample[-1].end - first, image.offset, image.size, label))
    return None


def _label(sample: list[Member], tar: FileBytes) -> Label | str:
    """The label or labels of a sample, or what is wrong with them: `cls` comes before `json`."""
    extensions = [split_name(member.name)[1] for member in sample]
    for kind in ("cls", "json"):
        candidates = [number for number, extension in enumerate(extensions) if extension == kind]
        candidates = candidates or [n for n, extension in enumerate(extensions) if extension.endswith("." + kind)]
        if len(candidates) > 1:
            names = ", ".join(sample[number].name for number in candidates)
            return f"several labels ({names}): keys end at the first dot of a name"
        if not candidates:
            continue
        member = sample[candidates[0]]
        if member.size > _MAX_LABEL_BYTES:
            return f"label {member.name} of {member.size} bytes"
        text = tar[member.offset : member.offset + member.size]
        try:
            return read_label("." + kind, text)
        except ValueError as error:
            return f"label {text[:_NUM_SHOWN]!r} cannot be used: {error}"
    return f"no label, only {', '.join(extensions)}"
