"""Raw pixels, which become lossless PNG: CIFAR's archives and scikit-learn's digits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from vitds.data.decode import encode_png
from vitds.data.sources.base import Source
from vitds.errors import DataError

CIFAR = {  # word: class in torchvision.datasets, its folder, its archive
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}


@dataclass(kw_only=True)
class PixelSource(Source):
    """Raw pixels in memory, encoded as lossless PNG.

    Shapes: images (N, H, W) or (N, H, W, 3) uint8.
    """

    images: np.ndarray

    def read(self, row: int) -> bytes:
        """The image of a row as PNG."""
        return encode_png(self.images[row])

    def identity(self) -> str:
        """A checksum of all pixels."""
        return f"{self.images.shape} {crc32(self.images.tobytes()):08x}"

    def sizes(self) -> np.ndarray:
        """The raw pixels' sizes."""
        return np.full(len(self.images), self.images[0].nbytes if len(self.images) else 0, np.int64)


def cifar_on_disk(path: Path) -> dict[str, Source]:
    """CIFAR from its archive, its folder, or the directory that either lies in; nothing when it is none of these."""
    for word, (_, folder, archive_name) in CIFAR.items():
        if path.name == folder and path.is_dir():
            return cifar(word, path.parent)
        if (path / folder).is_dir():
            return cifar(word, path)
        for archive in (path, path / archive_name):
            if archive.name == archive_name and archive.is_file():
                return _cifar_archive(word, archive)
    return {}


def _cifar_archive(word: str, archive: Path) -> dict[str, Source]:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(archive, getattr(datasets, CIFAR[word][0]).tgz_md5):
        raise DataError("damaged: md5 is not that of the original", where=str(archive), fix="download it again")
    with tempfile.TemporaryDirectory(prefix="vitds-cifar-") as scratch:
        extract_archive(archive, scratch)
        return cifar(word, Path(scratch))


def cifar(word: str, root: Path, download: bool = False) -> dict[str, Source]:
    """Read CIFAR's batches below `root`. They are pickles: torchvision loads them after comparing each one's md5."""
    from torchvision import datasets

    class_name, folder, archive_name = CIFAR[word]
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


def digits() -> dict[str, Source]:
    """The digits of scikit-learn."""
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
