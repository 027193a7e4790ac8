"""Where images come from: every kind of source becomes the same thing, rows of (key, label, image bytes).

| SOURCE                        | splits                                                          |
|-------------------------------|-----------------------------------------------------------------|
| the word `digits`             | scikit-learn's 1,797 digits; digit i is validation if i % 5 == 0 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vitds.data.decode import encode_png
from vitds.errors import DataError


class Source(Protocol):
    """One split as it came: rows that can be read in any order, by any process."""

    classes: list[str]
    keys: Sequence[str]
    labels: np.ndarray

    def prepare(self, scratch: Path) -> None:
        """Do once, before the first read, what makes reading in any order cheap; `scratch` is deleted afterwards."""

    def read(self, row: int) -> bytes:
        """The encoded image of a row."""

    def where(self, row: int) -> str:
        """The place of a row that a person can look at."""


@dataclass
class PixelSource:
    """Raw pixels in memory, encoded as lossless PNG.

    Shapes: images (N, H, W) or (N, H, W, 3) uint8, labels (N,).
    """

    name: str
    classes: list[str]
    keys: Sequence[str]
    labels: np.ndarray
    images: np.ndarray

    def prepare(self, scratch: Path) -> None:
        """Nothing to do."""

    def read(self, row: int) -> bytes:
        """The image of a row as PNG."""
        return encode_png(self.images[row])

    def where(self, row: int) -> str:
        """The row's number in the original order."""
        return f"{self.name} {self.keys[row]}"


def digits() -> dict[str, Source]:
    """The 1,797 handwritten digits that scikit-learn ships, 8x8 pixels of 17 greys."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is not installed", fix="pip install scikit-learn"
        ) from None
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(images))

    def split(chosen: np.ndarray) -> PixelSource:
        keys = [f"digit-{row:04d}" for row in chosen]
        return PixelSource("digits", [str(digit) for digit in range(10)], keys, bunch.target[chosen], images[chosen])

    return {"train": split(rows[rows % 5 != 0]), "val": split(rows[rows % 5 == 0])}


def open_source(source: str, split: str | None, download_dir: Path) -> dict[str, Source]:
    """Find out what `source` is and list its splits, `train` first. Cheap: images are read later, row by row.

    Raises: DataError when it is nothing that vitds reads, or lacks the split asked for.
    """
    sources = digits()
    if split is None:
        return sources
    return {split: sources[split]}
