"""Where images come from: every kind of source becomes the same thing, rows of (key, label, image bytes).

| SOURCE                                  | what it is                                                           |
|-----------------------------------------|----------------------------------------------------------------------|
| a directory of class folders            | one split, train unless told otherwise                               |
| a directory with train/, val/ above them | these splits; `test` is taken for validation where nothing else is  |
| a parquet file, or a directory of them  | Hugging Face's layout; splits by the names of files or folders       |
| a CIFAR archive, or its folder          | train and val (its 10,000 test images), as lossless PNG              |
| the words `cifar10`, `cifar100`         | the same, downloaded by torchvision                                  |
| the word `digits`                       | scikit-learn's 1,797 digits; digit i is validation when i % 5 == 0   |
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitds.data.decode import encode_png
from vitds.errors import DataError

T = TypeVar("T")

_VALIDATION_NAMES = ("val", "validation", "valid", "test")  # the first that is there becomes `val`
_SPLIT_NAMES = ("train", *_VALIDATION_NAMES)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_CIFAR = {  # word: class in torchvision.datasets, its folder, its archive
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}
_SPOOL_ROWS = 256  # read from Parquet at a time


@dataclass(kw_only=True)
class Source(ABC):
    """One split as it came: rows that can be read in any order, by any process.

    Shapes: keys N, labels (N,) integers that point into classes.
    """

    name: str
    classes: list[str]
    keys: list[str]
    labels: np.ndarray
    notes: list[str] = field(default_factory=list)  # what its user should know

    def prepare(self, scratch: Path) -> None:  # noqa: B027  most sources have nothing to do
        """Do once, before the first read, what makes reading in any order cheap; `scratch` is deleted afterwards."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image of a row."""

    def where(self, row: int) -> str:
        """The place of a row, for a person to look at."""
        return f"{self.name} {self.keys[row]}"


def open_source(source: str, split: str | None, download_dir: Path) -> dict[str, Source]:
    """Find out what `source` is and list its splits, `train` first; the images themselves are read later, row by row.

    Raises: DataError when it is nothing that vitds reads, or lacks the split asked for.
    """
    if source == "digits":
        sources = _digits()
    elif source in _CIFAR:
        sources = _cifar(source, download_dir, download=True)
    elif Path(source).exists():
        path = Path(source)
        sources = _cifar_on_disk(path) or _parquet(path, split) or _class_folders(path, split)
    else:
        raise DataError("no such file or directory", where=source, fix="or one of the words cifar10, cifar100, digits")
    if split is None:
        return sources
    if split not in sources:
        raise DataError(f'has no split "{split}", only {", ".join(sources)}', where=source)
    return {split: sources[split]}


def _as_splits(found: Mapping[str, T]) -> dict[str, T]:
    """Things by their split's name in the source -> by ours."""
    splits = {"train": found["train"]} if "train" in found else {}
    for name in _VALIDATION_NAMES:
        if name in found:
            return splits | {"val": found[name]}
    return splits


# Class folders


@dataclass(kw_only=True)
class FolderSource(Source):
    """Image files in class folders; labels count the folders in sorted order, as torchvision's ImageFolder does."""

    root: Path
    paths: list[str]  # below root

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.paths[row]).read_bytes()

    def where(self, row: int) -> str:
        """The file's path."""
        return str(self.root / self.paths[row])


def _class_folders(path: Path, split: str | None) -> dict[str, Source]:
    if not path.is_dir():
        raise DataError("is neither a directory, nor Parquet, nor a CIFAR archive", where=str(path))
    trees = _as_splits({name: path / name for name in _SPLIT_NAMES if _folders(path / name)})
    return {name: _folder_source(tree) for name, tree in (trees or {split or "train": path}).items()}


def _folders(path: Path) -> list[str]:
    """Names of the visible directories in a directory, sorted; none when there is no such directory."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _folder_source(root: Path) -> FolderSource:
    classes = _folders(root)
    if not classes:
        raise DataError("holds no class folders", where=str(root), fix="expected DIR/CLASS/IMAGE.jpg")
    trees = [name for name in classes if any(_folders(root / name / split) for split in _SPLIT_NAMES)]
    if trees:
        raise DataError(
            f"{trees[0]} holds splits, not images of one class", where=str(root), fix=f"did you mean {root / trees[0]}?"
        )
    paths, labels = [], []
    ignored: Counter[str] = Counter()
    for label, name in enumerate(classes):
        for path in files_below(root / name):
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                paths.append(str(path.relative_to(root)))
                labels.append(label)
            else:
                ignored[suffix or "no suffix"] += 1
    notes = []
    if ignored:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(ignored.items()))
        notes.append(f"{root}: ignored files that are not named like images: {kinds}")
    used = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in used]
    if empty:
        notes.append(f"{root}: class folders without images: {', '.join(empty)}")
    return FolderSource(
        name=str(root),
        classes=classes,
        keys=[os.path.splitext(path)[0] for path in paths],
        labels=np.array(labels, dtype=np.int64),
        notes=notes,
        root=root,
        paths=paths,
    )


def files_below(root: Path, on_error: Callable[[OSError], None] | None = None) -> Iterable[Path]:
    """All visible files below a directory, in sorted order; `on_error` is told of a folder that cannot be listed."""
    for directory, folders, files in os.walk(root, onerror=on_error, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


# Hugging Face's Parquet


@dataclass(kw_only=True)
class ParquetSource(Source):
    """Encoded images in a column `image: {bytes, path}` (or plain binary), classes in a column of integers.

    Parquet cannot be read row by row in any order, so the images are first copied, in theirs, to one plain file.
    """

    files: list[Path]
    image_column: str

    def prepare(self, scratch: Path) -> None:
        """Copy the image bytes to one file."""
        sizes = []
        with open(scratch / "images", "wb") as spool:
            for path in self.files:
                for batch in pq.ParquetFile(path).iter_batches(_SPOOL_ROWS, columns=[self.image_column]):
                    images = batch.column(0)
                    if pa.types.is_struct(images.type):
                        images = images.field("bytes")
                    for image in images.to_pylist():
                        sizes.append(spool.write(image or b""))
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._spool = open(scratch / "images", "rb")  # stays open: every worker reads from it by position

    def read(self, row: int) -> bytes:
        """The image's bytes, from the copy."""
        first, end = self._offsets[row : row + 2].tolist()
        return os.pread(self._spool.fileno(), end - first, first)

    def where(self, row: int) -> str:
        """The row's number in the split."""
        return f"{self.name} row {row} ({self.keys[row]})"


def _parquet(path: Path, split: str | None) -> dict[str, Source]:
    """The splits in a Parquet file or a directory of them; nothing when there is no such file."""
    if path.is_file():
        if path.suffix != ".parquet":
            return {}
        named = _split_in_name(path, path.parent)
        ours = split or next(iter(_as_splits({named: path})), "train")
        return {ours: _parquet_source(path, [path])}
    by_split: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        by_split.setdefault(_split_in_name(file, path), []).append(file)
    if not by_split:
        return {}
    splits = _as_splits(by_split) or {split or "train": by_split[""]}
    return {ours: _parquet_source(path, files) for ours, files in splits.items()}


def _split_in_name(file: Path, root: Path) -> str:
    """The split that a file's name, or a folder's between it and the root, begins with; "" when none does."""
    for part in reversed(file.relative_to(root).parts):
        found = re.match(rf"({'|'.join(_SPLIT_NAMES)})(?![a-z])", part.lower())
        if found:
            return found[1]
    return ""


def _parquet_source(path: Path, files: list[Path]) -> ParquetSource:
    name = str(path) if len(files) == 1 else f"{path} ({files[0].name} ...)"
    try:
        schema = pq.read_schema(files[0])
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        image_column = _column(schema, features, _IMAGE_COLUMNS, "Image", _holds_bytes, name)
        label_column = _column(schema, features, _LABEL_COLUMNS, "ClassLabel", pa.types.is_integer, name)
        has_paths = pa.types.is_struct(schema.field(image_column).type)
        columns = [label_column, f"{image_column}.path"] if has_paths else [label_column]
        table = pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in files])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=name) from None
    labels = table[label_column].fill_null(-1).to_numpy()
    if len(labels) and labels.min() < 0:
        raise DataError(f"{(labels < 0).sum()} of {len(labels)} rows have no label", where=name)
    classes = features.get(label_column, {}).get("names") or [str(label) for label in range(labels.max(initial=-1) + 1)]
    if labels.max(initial=-1) >= len(classes):
        raise DataError(f"label {labels.max()}, but only {len(classes)} class names", where=name)
    paths = table[image_column].combine_chunks().field("path").to_pylist() if has_paths else [None] * len(labels)
    keys = [str(PurePosixPath(path).with_suffix("")) if path else f"row-{row:08d}" for row, path in enumerate(paths)]
    return ParquetSource(name=name, classes=classes, keys=keys, labels=labels, files=files, image_column=image_column)


def _column(
    schema: pa.Schema,
    features: dict,
    names: Sequence[str],
    feature: str,
    fits: Callable[[pa.DataType], bool],
    where: str,
) -> str:
    """The column with a usual name, else the only one that the metadata declare, else the only one that fits at all."""
    fitting = [column.name for column in schema if fits(column.type)]
    declared = [name for name in fitting if features.get(name, {}).get("_type") == feature]
    usual = [name for name in names if name in fitting]
    for candidates in (usual, declared, fitting):
        if candidates and (candidates is usual or len(candidates) == 1):
            return candidates[0]
    raise DataError(
        f"no column for the {feature} among {', '.join(schema.names)}",
        where=where,
        fix=f"expected {' or '.join(names)}: " + ("{bytes, path}" if feature == "Image" else "an integer"),
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


# Raw pixels: CIFAR and digits


@dataclass(kw_only=True)
class PixelSource(Source):
    """Raw pixels in memory, encoded as lossless PNG.

    Shapes: images (N, H, W) or (N, H, W, 3) uint8.
    """

    images: np.ndarray

    def read(self, row: int) -> bytes:
        """The image of a row as PNG."""
        return encode_png(self.images[row])


def _cifar_on_disk(path: Path) -> dict[str, Source]:
    """CIFAR from its archive, its folder, or the directory that either lies in; nothing when it is none of these."""
    for word, (_, folder, archive_name) in _CIFAR.items():
        if path.name == folder and path.is_dir():
            return _cifar(word, path.parent)
        if (path / folder).is_dir():
            return _cifar(word, path)
        for archive in (path, path / archive_name):
            if archive.name == archive_name and archive.is_file():
                return _cifar_archive(word, archive)
    return {}


def _cifar_archive(word: str, archive: Path) -> dict[str, Source]:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(archive, getattr(datasets, _CIFAR[word][0]).tgz_md5):
        raise DataError("damaged: md5 is not that of the original", where=str(archive), fix="download it again")
    with tempfile.TemporaryDirectory(prefix="vitds-cifar-") as scratch:
        extract_archive(archive, scratch)
        return _cifar(word, Path(scratch))


def _cifar(word: str, root: Path, download: bool = False) -> dict[str, Source]:
    """Read CIFAR's batches below `root`. They are pickles: torchvision loads them after comparing each one's md5."""
    from torchvision import datasets

    class_name, folder, archive_name = _CIFAR[word]
    sources: dict[str, Source] = {}
    try:
        for ours, theirs in (("train", "train"), ("val", "test")):
            batches = getattr(datasets, class_name)(root, train=theirs == "train", download=download)
            keys = [f"{theirs}-{row:05d}" for row in range(len(batches))]
            labels = np.array(batches.targets)
            sources[ours] = PixelSource(
                name=word, classes=batches.classes, keys=keys, labels=labels, images=batches.data
            )
    except (RuntimeError, OSError) as error:
        what, fix = "missing or damaged (md5)", ""
        if download:
            what = f"cannot be downloaded: {error}"
            fix = f"without a network, put {archive_name} into {root}, or give its path as SOURCE"
        raise DataError(what, where=str(root / folder), fix=fix) from None
    return sources


def _digits() -> dict[str, Source]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn, which is missing", fix="pip install scikit-learn") from None
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    classes = [str(digit) for digit in bunch.target_names]
    rows = np.arange(len(images))

    def split(chosen: np.ndarray) -> PixelSource:
        keys = [f"digit-{row:04d}" for row in chosen]
        labels = bunch.target[chosen]
        return PixelSource(name="digits", classes=classes, keys=keys, labels=labels, images=images[chosen])

    return {"train": split(rows[rows % 5 != 0]), "val": split(rows[rows % 5 == 0])}
