"""Image files in class folders, with train/ and val/ above them or without."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitds.data.image_files import IMAGE_SUFFIXES, files_below, open_file, shown
from vitds.data.sources.base import SPLIT_NAMES, Source, as_splits
from vitds.errors import DataError


def read_file(path: str) -> bytes:
    """A whole file's bytes, by the fewest system calls.

    Raises: OSError when it cannot be read, or is no regular file.
    """
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # it is named when it is read
        return 0


@dataclass(kw_only=True)
class FileSource(Source):
    """Image files by their paths."""

    root: str  # what all paths begin with, its last slash included
    paths: list[str]

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        return read_file(self.root + self.paths[row])

    def sizes(self) -> np.ndarray:
        """The files' sizes."""
        return np.array([_size(self.root + path) for path in self.paths], np.int64)

    def files(self) -> Iterator[str]:
        """The files' paths."""
        return (self.root + path for path in self.paths)

    def where(self, row: int) -> str:
        """The file's path."""
        return shown(self.root + self.paths[row])


def class_folders(path: Path, split: str | None) -> dict[str, Source]:
    """The splits of a tree of class folders; labels count the folders in sorted order, as torchvision's ImageFolder."""
    if not path.is_dir():
        raise DataError("is neither a directory, nor Parquet, nor a CIFAR archive", where=str(path))
    named = {name.lower(): path / name for name in folders_in(path) if name.lower() in SPLIT_NAMES}
    trees = as_splits({name: folder for name, folder in named.items() if folders_in(folder)})
    sources: dict[str, Source] = {ours: _folder_source(tree) for ours, tree in trees.items()}
    if not sources:
        return {split or "train": _folder_source(path)}
    flat = [shown(folder) for folder in named.values() if not folders_in(folder) and _holds_images(folder)]
    next(iter(sources.values())).notes.extend(f"{folder}: not used: images, but no class folders" for folder in flat)
    return sources


def _holds_images(directory: Path) -> bool:
    return any(_is_image(entry.name) for entry in os.scandir(directory))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def folders_in(path: Path) -> list[str]:
    """Names of the visible directories in a directory, sorted; none when there is no such directory."""
    if not os.path.isdir(path):  # False as well where nobody may look
        return []
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot be listed: {error.strerror}", where=str(path)) from None


def _folder_source(root: Path) -> FileSource:
    classes = folders_in(root)
    if not classes:
        raise DataError("holds no class folders", where=str(root), fix="expected DIR/CLASS/IMAGE.jpg")
    if all(name.lower() in SPLIT_NAMES for name in classes):
        raise DataError(
            f"its folders are called like splits, not like classes: {', '.join(classes)}",
            where=str(root),
            fix="expected DIR/CLASS/IMAGE.jpg, or DIR/train/CLASS/IMAGE.jpg",
        )
    trees = [name for name in classes if any(folders_in(root / name / split) for split in SPLIT_NAMES)]
    if trees:
        raise DataError(
            f"{trees[0]} holds splits, not images of one class", where=str(root), fix=f"did you mean {root / trees[0]}?"
        )
    prefix = os.path.join(root, "")
    label_of = {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    unlisted: list[OSError] = []
    loops: list[str] = []
    num_outside, is_deeper = 0, True
    ignored: Counter[str] = Counter()
    for path in files_below(root, unlisted.append, loops.append):
        name, slash, below = path[len(prefix) :].partition("/")
        if not slash:
            num_outside += _is_image(path)
        elif _is_image(path):
            is_deeper = is_deeper and "/" in below
            paths.append(path[len(prefix) :])
            labels.append(label_of[name])
        else:
            ignored[shown(os.path.splitext(path)[1].lower()) or "no suffix"] += 1
    classes = [shown(name) for name in classes]
    notes = [f"{shown(path)}: leads back to a folder that it lies in, and is not entered" for path in loops]
    if ignored:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(ignored.items()))
        notes.append(f"{shown(root)}: ignored files that are not named like images: {kinds}")
    if num_outside:
        notes.append(f"{shown(root)}: left out {num_outside} images that lie outside of the class folders")
    if paths and is_deeper:
        some = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
        notes.append(f"{shown(root)}: all images lie deeper, as {shown(paths[0])}; the classes are called {some}")
    used = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in used]
    if empty:
        notes.append(f"{shown(root)}: class folders without images: {', '.join(empty)}")
    return FileSource(
        name=shown(root),
        classes=classes,
        keys=[os.path.splitext(path)[0] for path in paths],
        labels=np.array(labels, dtype=np.int64),
        notes=notes,
        bad=[f"{shown(error.filename)}: cannot be listed: {error.strerror}" for error in unlisted],
        root=prefix,
        paths=paths,
    )
