"""What goes where: a split's samples, in the order and the shards that they will have. Nothing here writes.

A plan is a pure function of source and options. Training rows are shuffled once, globally; validation rows keep their
order. Its fingerprint says whether shards that were written at another time, or on another machine, belong to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vitds.data.order import sample_at
from vitds.data.sources import Source
from vitds.data.sources.base import Labels
from vitds.data.ustar import BLOCK_BYTES, MAX_NAME_BYTES, Label
from vitds.errors import DataError

_SHUFFLE_SEED = 0
_FORMAT = 1  # of shards and of what is kept about them; another one never goes on with this one's


@dataclass(frozen=True)
class WriteOptions:
    """How shards are cut, by how many processes, and what happens to images that cannot be used.

    `part` is (number, of): only every of-th shard is written, from the number-th on, counted from 1. `shard_bytes`, if
    given, cuts by size instead of `samples_per_shard`.
    """

    name: str
    samples_per_shard: int = 1000
    workers: int = 1
    skip_bad: bool = False
    verify: bool = False
    shard_bytes: int | None = None
    find_duplicates: bool = True
    part: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class SplitPlan:
    """All that is needed to write any shard of a split: the same in every process.

    Shapes: keys and labels by source row; rows (N,) are source rows in shard order.
    """

    split: str
    source: Source
    classes: list[str]
    labels: np.ndarray | list[tuple[int, ...]]
    options: WriteOptions

    @cached_property
    def keys(self) -> list[str]:
        """The source's keys made safe inside a tar: ASCII without dots, short enough for ustar, each different."""
        longest = MAX_NAME_BYTES - len(".webp") - len("-00000000")
        safe = [re.sub(r"[^A-Za-z0-9_/-]", "_", key)[:longest] for key in self.source.keys]
        keys = list(safe)
        while True:  # a key with its row appended may be what another sample is called: that one's row is appended too
            times = Counter(keys)
            rows = [row for row, key in enumerate(keys) if times[key] > 1 and key == safe[row]]
            if not rows:
                return keys
            for row in rows:
                keys[row] = f"{safe[row]}-{row:08d}"

    @cached_property
    def rows(self) -> np.ndarray:
        """Source rows in the order of the shards."""
        rows = np.arange(len(self.source.keys))
        return sample_at(rows, _SHUFFLE_SEED, len(rows))[1] if self.split == "train" else rows

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each shard begins in `rows`, and where the last one ends. By bytes, the source must be prepared.

        Shapes: (num_shards + 1,).
        """
        num_samples, options = len(self.source.keys), self.options
        if options.shard_bytes is None:
            return np.append(np.arange(0, num_samples, options.samples_per_shard), num_samples)
        blocks = 3 - self.source.sizes()[self.rows] // -BLOCK_BYTES  # two headers and the label beside the image
        ends = np.cumsum(blocks * BLOCK_BYTES)
        starts, begun = [0], 0
        while starts[-1] < num_samples:
            fitting = int(np.searchsorted(ends, begun + options.shard_bytes, "right"))
            starts.append(max(fitting, starts[-1] + 1))
            begun = int(ends[starts[-1] - 1])
        return np.array(starts)

    @property
    def num_shards(self) -> int:
        """Shards of the whole split."""
        return len(self.starts) - 1

    @property
    def shards(self) -> range:
        """The numbers of the shards that this run writes: all, or a part."""
        number, of = self.options.part
        return range(number - 1, self.num_shards, of)

    def shard_samples(self, shard: int) -> Iterator[tuple[int, str, Label]]:
        """The samples of a shard: source row, key, label."""
        rows = self.rows[self.starts[shard] : self.starts[shard + 1]]
        labels = (
            self.labels[rows].tolist() if isinstance(self.labels, np.ndarray) else map(self.labels.__getitem__, rows)
        )
        return zip(rows.tolist(), map(self.keys.__getitem__, rows), labels, strict=True)

    def num_rows(self, shard: int) -> int:
        """How many samples a shard should have."""
        return int(self.starts[shard + 1] - self.starts[shard])

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides a split's bytes; of the images, their sizes."""
        options = self.options
        facts = [
            _FORMAT,
            self.split,
            options.name,
            options.samples_per_shard if options.shard_bytes is None else None,
            options.shard_bytes,
            options.verify,
            options.find_duplicates,
            self.classes,
            self.source.keys,
            self.source.identity(),
            self.labels if isinstance(self.labels, list) else None,
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(np.asarray(self.source.sizes_at_rest(), "<i8").tobytes())
        if isinstance(self.labels, np.ndarray):
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def cuts(self) -> str:
        """A digest of where shards begin, which by bytes follows from the images' sizes."""
        return hashlib.sha256(self.starts.astype("<i8").tobytes()).hexdigest()[:32]

    @cached_property
    def source_state(self) -> str:
        """A digest of size and modification time of the source's files: what says that an image was changed."""
        states = []
        for path in self.source.files():
            try:
                status = os.stat(path)
                states += [status.st_size, status.st_mtime_ns]
            except OSError:
                states += [-1, -1]
        return hashlib.sha256(np.array(states, "<i8").tobytes()).hexdigest()[:32]


def relabelled(source: Source, classes: list[str], where: str) -> np.ndarray | list[tuple[int, ...]]:
    """A source's labels as positions in the data set's list of classes, matched by name.

    Raises: DataError when the source is empty, a label is none of its classes, or an image's class is not in the list.
    """
    if not len(source.labels):
        raise DataError("no images found", where=source.name)
    used = flat(source.labels)
    if not len(used):
        raise DataError("no image has a class", where=source.name)
    if len(outside := used[(used < 0) | (used >= len(source.classes))]):
        row = next(row for row, label in enumerate(source.labels) if outside[0] in np.atleast_1d(label))
        raise DataError(f"label {outside[0]}, but there are {len(source.classes)} classes", where=source.where(row))
    position = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in (source.classes[label] for label in np.unique(used)) if name not in position]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise DataError(
            f"has classes that the data set lacks: {', '.join(unknown[:10])}{more}",
            where=f"{source.name} -> {where}",
            fix="every validation class must be a training class; remove these folders, or shard both splits again",
        )
    ours = np.array([position.get(name, -1) for name in source.classes], dtype=np.int64)
    if isinstance(source.labels, np.ndarray):
        return ours[source.labels]
    return [tuple(np.unique(ours[list(label)]).tolist()) for label in source.labels]


def flat(labels: Labels) -> np.ndarray:
    """Every class of every sample, in one line."""
    if isinstance(labels, np.ndarray):
        return labels
    return np.fromiter(itertools.chain.from_iterable(labels), dtype=np.int64)
