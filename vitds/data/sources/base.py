"""What every source becomes: rows of (key, label, image bytes), read in any order by any process."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitds.errors import DataError

T = TypeVar("T")

VALIDATION_NAMES = ("val", "validation", "valid", "test")  # the first that is there becomes `val`
SPLIT_NAMES = ("train", *VALIDATION_NAMES)
MAX_CLASSES = 2**20  # where labels are integers without names, one beyond is no label

Labels = np.ndarray | Sequence[Sequence[int]]
"""One class a sample, (N,) int64, or all classes of each."""


@dataclass(kw_only=True)
class Source(ABC):
    """One split as it came: rows that can be read in any order, by any process.

    Shapes: keys N; labels (N,) integers that point into classes, or N lists of them where samples have several.
    """

    name: str
    classes: list[str]
    keys: list[str]
    labels: Labels
    notes: list[str] = field(default_factory=list)  # what its user should know
    bad: list[str] = field(default_factory=list)  # what is no row because it was found damaged: its place, and why

    def prepare(self, scratch: Path) -> None:  # noqa: B027  most sources have nothing to do
        """Do once, before the first read, what makes reading in any order cheap; `scratch` is deleted afterwards."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image of a row."""

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """How large each row's encoded image is, without reading any: exact but for those that a shard takes as PNG
        (raw pixels, BMP, TIFF...), whose size before encoding it is. To be called after `prepare`.

        Shapes: (N,) int64.
        Units:  bytes.
        """

    def sizes_at_rest(self) -> np.ndarray:
        """Sizes that tell changed images, known without `prepare` and equal on every machine: the rows' sizes, or those
        of the files that the images lie in.

        Units:  bytes.
        """
        return self.sizes()

    def files(self) -> Iterable[str | Path]:
        """The files that the images lie in: when one of them changes, shards made before are out of date."""
        return ()

    def identity(self) -> str:
        """What tells this source's images from others' of the same keys, where no file does; equal on every machine."""
        return ""

    def where(self, row: int) -> str:
        """The place of a row, for a person to look at."""
        return f"{self.name} {self.keys[row]}"


def as_splits(found: Mapping[str, T]) -> dict[str, T]:
    """Things by their split's name in the source -> by ours."""
    splits = {"train": found["train"]} if "train" in found else {}
    for name in VALIDATION_NAMES:
        if name in found:
            return splits | {"val": found[name]}
    return splits


def files_by_split(named: Mapping[Path, str], split: str | None) -> dict[str, list[Path]]:
    """Files with the split in each one's name ("" for none) -> our splits. The one given is that of a file alone, and
    of all where no name has any.
    """
    if not named:
        return {}
    if split and len(named) == 1:
        return {split: list(named)}
    by_split: dict[str, list[Path]] = {}
    for file, its_split in named.items():
        by_split.setdefault(its_split, []).append(file)
    return as_splits(by_split) or {split or "train": by_split[""]}


def split_in_name(file: Path, root: Path) -> str:
    """The split that a file's name, or else a folder's between it and the root, has as its last word of that kind; ""
    when none does.
    """
    for part in reversed(file.relative_to(root).parts):
        found = re.findall(rf"(?<![a-z])(?:{'|'.join(SPLIT_NAMES)})(?![a-z])", part.lower())
        if found:
            return found[-1]
    return ""


def key_of(path: str) -> str:
    """A path without its suffix, the way up and the root that it begins with; "" where nothing is left."""
    return re.sub(r"^(\.\./)+|^/+", "", os.path.splitext(os.path.normpath(path))[0]) if path else ""


def read_classes(path: Path) -> list[str]:
    """Names of classes in the order of their labels: a JSON list, or a text file with one a line.

    Raises: DataError when it is neither, or a name is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip()[:1] in "[{" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError("expected a JSON list of class names, or one name a line", where=str(path))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'class "{twice}" is there twice', where=str(path))
    return names
