"""A validation split out of a training split: stratified, and a pure function of seed and keys.

Of each class, the samples whose keys have the smallest hashes are held out. How many follows from the share alone:
round(share * N) in all, floor(share * n_c) of each class, and the rest one by one to the classes with the largest
remainders (of equal ones, to those whose names have the smallest hashes). A class keeps at least one training image;
one that is small may get no validation image.

What follows: neither the order of rows nor the number of processes matters, and a sample that is added to a class moves
at most one other of its class, and at most one in all other classes together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitds.data.sources.base import Labels, Source
from vitds.errors import DataError


@dataclass(kw_only=True)
class PartOfSource(Source):
    """Some rows of another source.

    Shapes: rows (N,), positions in the whole.
    """

    whole: Source
    rows: np.ndarray

    def prepare(self, scratch: Path) -> None:
        """Prepare the whole."""
        self.whole.prepare(scratch)

    def read(self, row: int) -> bytes:
        """The encoded image of a row."""
        return self.whole.read(self.rows.item(row))

    def sizes(self) -> np.ndarray:
        """The images' sizes."""
        return self.whole.sizes()[self.rows]

    def sizes_at_rest(self) -> np.ndarray:
        """Those of the whole."""
        return self.whole.sizes_at_rest()

    def files(self) -> Iterable[str | Path]:
        """The files of the whole."""
        return self.whole.files()

    def identity(self) -> str:
        """The identity of the whole."""
        return self.whole.identity()

    def where(self, row: int) -> str:
        """The place of a row in the whole."""
        return self.whole.where(self.rows.item(row))


def hold_out(sources: dict[str, Source], fraction: float, seed: int) -> dict[str, Source]:
    """Split `train` into `train` and `val`, which gets `fraction` of its samples.

    Raises: DataError when there is a validation split, nothing to split, or too little of it.
    """
    if "val" in sources:
        raise DataError(
            "has a validation split, so none is made of its training images",
            where=sources["val"].name,
            fix="leave --val-fraction out, or pass --split train: the validation images are left alone then",
        )
    whole = sources["train"]
    chosen = _chosen(whole.keys, _first(whole.labels), whole.classes, fraction, seed)
    if not chosen.any():
        can_spare = len(np.unique(_first(whole.labels))) < len(whole.keys)
        raise DataError(
            f"{fraction} of {len(whole.keys)} images in {len(whole.classes)} classes is not one that a class can spare",
            where=whole.name,
            fix="every class keeps a training image: give more images a class" + ", or a larger share" * can_spare,
        )
    train, val = (_part(whole, np.flatnonzero(rows)) for rows in (~chosen, chosen))
    train.notes, train.bad = whole.notes, whole.bad
    return {"train": train, "val": val}


def _part(whole: Source, rows: np.ndarray) -> PartOfSource:
    labels: Labels = whole.labels[rows] if isinstance(whole.labels, np.ndarray) else [whole.labels[row] for row in rows]
    keys = [whole.keys[row] for row in rows.tolist()]
    return PartOfSource(name=whole.name, classes=whole.classes, keys=keys, labels=labels, whole=whole, rows=rows)


def _first(labels: Labels) -> np.ndarray:
    """The class that each sample is counted in: its first, or -1 for none."""
    return labels if isinstance(labels, np.ndarray) else np.array([min(each, default=-1) for each in labels], np.int64)


def _chosen(keys: list[str], labels: np.ndarray, classes: list[str], fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out.

    Shapes: keys N, labels (N,) -> (N,) bool.
    """
    strata, stratum, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    exact = np.round(fraction * sizes, 9)  # 0.1 * 30 is 3, and not a bit more
    quota = np.floor(exact).astype(np.int64)
    missing = round(fraction * len(keys)) - int(quota.sum())
    ties = np.array([_hash(classes[label] if label >= 0 else "", seed) for label in strata.tolist()], np.uint64)
    by_remainder = np.lexsort((ties, quota - exact))
    can_give = by_remainder[quota[by_remainder] + 1 < sizes[by_remainder]]
    quota[can_give[: max(missing, 0)]] += 1

    hashes = np.array([_hash(key, seed) for key in keys], np.uint64)
    order = np.lexsort((hashes, stratum))  # by class, and inside it by hash
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(keys)) - starts[stratum[order]]
    chosen = np.zeros(len(keys), bool)
    chosen[order[rank < quota[stratum[order]]]] = True
    return chosen


def _hash(key: str, seed: int) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8, key=b"%d" % seed).digest()
    return int.from_bytes(digest, "little")
