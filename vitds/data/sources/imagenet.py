"""The official ImageNet archives as they come: ILSVRC2012_img_train.tar, a tar of class tars, and ..._img_val.tar.

Both levels of headers are walked once; images are then read where they lie. Classes, keys and the order of rows are
those of the extracted tree, so the shards are too, byte for byte.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitds.data.image_files import IMAGE_SUFFIXES
from vitds.data.sources.base import Source
from vitds.data.sources.devkit import WNID, validation_wnids
from vitds.data.sources.tars import TarSource
from vitds.data.tar_members import FileBytes, Member, TarDamage, members, walk
from vitds.errors import DataError

TRAIN_NAME, VAL_NAME = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_VAL_IMAGE = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8}))\.JPEG")


class _Row(NamedTuple):
    """An image, and its place in its archive; rows are sorted as the extracted tree would be listed."""

    wnid: str
    image: str
    offset: int
    size: int


def imagenet_archives(path: Path, split: str | None) -> dict[str, Source]:
    """The splits in a directory of official archives, or in one of them under any name; nothing when it is neither."""
    if path.is_dir():
        found = {"train": path / TRAIN_NAME, "val": path / VAL_NAME}
        found = {name: archive for name, archive in found.items() if archive.is_file() and name == (split or name)}
    else:
        first = first_member(path)
        is_train = bool(first and first.is_file and first.name.endswith(".tar"))
        found = {"train": path} if is_train else {"val": path} if first and _VAL_IMAGE.fullmatch(first.name) else {}
    read = {"train": _class_tars, "val": _validation}
    return {name: read[name](archive) for name, archive in found.items()}


def first_member(path: Path) -> Member | None:
    """The first file in a tar; None where there is none, or no tar."""
    with open(path, "rb") as file:
        try:
            found = members(FileBytes(file.fileno()), 0, os.fstat(file.fileno()).st_size)
            return next((member for member in found if member.is_file), None)
        except TarDamage:
            return None


def _files_in(tar: FileBytes, start: int, end: int, where: str, bad: list[str]) -> list[Member]:
    """The files in a tar, without those that turn out to be damaged; what was found damaged is added to `bad`."""
    files: list[Member] = []
    for member in walk(tar, start, end):
        if isinstance(member, Member):
            if member.is_file:
                files.append(member)
            continue
        bad.append(f"{where}: {member.what}")
        if files and files[-1] is member.lost:
            bad.append(f"{where}: blocks of {files.pop().name} are missing")
    return files


def _class_tars(path: Path) -> Source:
    """A tar of tars: a class each, called like its tar."""
    classes: list[str] = []
    rows: list[_Row] = []
    bad: list[str] = []
    with open(path, "rb") as file:
        tar = FileBytes(file.fileno())
        for outer in walk(tar, 0, os.fstat(file.fileno()).st_size):
            if not isinstance(outer, Member):
                bad.append(f"{path}: {outer.what}; whatever is behind it is missing")
                break
            name = outer.name.rpartition("/")[2]
            if outer.is_file and name.endswith(".tar"):
                classes.append(name.removesuffix(".tar"))
                images = _files_in(tar, outer.offset, outer.offset + outer.size, f"{path} {name}", bad)
                rows += [_Row(classes[-1], image.name.rpartition("/")[2], image.offset, image.size) for image in images]
    repeated = sorted(name for name, times in Counter(classes).items() if times > 1)
    if repeated:
        raise DataError(f"holds {', '.join(repeated)} more than once", where=str(path))
    return _source(path, sorted(classes), rows, bad)


def _validation(path: Path) -> Source:
    """The flat archive of validation images; the number in an image's name is its line in the ground truth."""
    truth, classes = validation_wnids(path.parent)
    rows: list[_Row] = []
    bad: list[str] = []
    with open(path, "rb") as file:
        for image in _files_in(FileBytes(file.fileno()), 0, os.fstat(file.fileno()).st_size, str(path), bad):
            named = _VAL_IMAGE.fullmatch(image.name)
            number = int(named[2]) if named else 0
            if named and 0 < number <= len(truth):
                rows.append(_Row(truth[number - 1], f"{named[1]}.JPEG", image.offset, image.size))
            else:
                bad.append(f"{path} {image.name}: the ground truth has no label for it ({len(truth)} lines)")
    source = _source(path, classes, rows, bad)
    if len(rows) < len(truth):
        source.notes.append(f"{path}: {len(rows)} images, the ground truth has {len(truth)} lines")
    return source


def _source(path: Path, classes: list[str], rows: list[_Row], bad: list[str]) -> TarSource:
    label_of = {name: label for label, name in enumerate(classes)}
    rows.sort()
    other = [row for row in rows if not _is_image(row.image)]
    ignored = Counter(os.path.splitext(row.image)[1] or "no suffix" for row in other)
    rows = [row for row in rows if _is_image(row.image)] if other else rows
    notes = []
    if not all(map(WNID.fullmatch, classes)):
        notes.append(f"{path}: its class tars are not called by wnids; their names are the classes")
    if ignored:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(ignored.items()))
        notes.append(f"{path}: ignored members that are not named like images: {kinds}")
    return TarSource(
        name=str(path),
        classes=classes,
        keys=[f"{row.wnid}/{os.path.splitext(row.image)[0]}" for row in rows],
        labels=np.array([label_of[row.wnid] for row in rows], np.int64),
        notes=notes,
        bad=bad,
        tars=[str(path)],
        tar=np.zeros(len(rows), np.int32),
        offset=np.array([row.offset for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int64),
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
