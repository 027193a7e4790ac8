"""Which sample comes when: pure functions of integers, no I/O and no state (a checkpoint holds samples_seen, no more).

An order is an endless stream of samples, and global batch k is its positions [kB, (k+1)B), so a batch may span two
epochs: none is short, nothing is dropped, padded or repeated. Rank r takes the r-th contiguous run of the batch and its
micro-batches are consecutive pieces of that run. Nothing here but this slicing knows the world size.

    NaturalOrder   the epochs' permutations laid end to end: position p is entry p % N of that of epoch p // N
    WindowedOrder  the same for sequential reads: shards are permuted, and samples only within a few neighbouring ones
    BalancedOrder  rounds over the classes, each class walking its own samples
    MixtureOrder   several orders, each with its share of every 10,000 positions
    RepeatedOrder  any of them, each sample several times in a global batch

A permutation is computed entry by entry (a Feistel network over the next power of four, walked until it lands inside
[0, N)), so starting anywhere costs nothing and no rank holds a table of N entries.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), for the cycle walking.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vitds.data.counter import Stream, mix, random_bits
from vitds.errors import DataError

if TYPE_CHECKING:
    from vitds.data.index import Index
    from vitds.run_config import DataConfig

_NUM_ROUNDS = 8
MIXTURE_BLOCK = 10_000  # positions in which each source of a mixture has exactly its share


class BatchLike(Protocol):
    """The batch triangle, as `vitds.ds_config.Batch` has it."""

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, on all ranks."""

    @property
    def micro_batch(self) -> int:
        """Samples in one forward of one rank."""

    @property
    def accumulation_steps(self) -> int:
        """Forwards of one rank in one optimizer step."""

    @property
    def world_size(self) -> int:
        """Ranks."""


def permute(entries: np.ndarray, keys: np.ndarray, num_samples: ArrayLike) -> np.ndarray:
    """Send each entry of [0, num_samples) to its place under the permutation that its key names.

    Shapes: entries (n,) uint64, keys (n,) uint64, num_samples () or (n,) -> (n,) uint64.
    """
    size = np.broadcast_to(np.asarray(num_samples).astype(np.uint64), np.shape(entries))
    num_bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]  # the exponent is the bit length, below 2^53
    half_bits = np.maximum(1, (num_bits + 1) // 2).astype(np.uint64)
    round_keys = [random_bits(keys, number) for number in range(_NUM_ROUNDS)]
    placed = np.array(entries, dtype=np.uint64)
    outside = np.ones(
        placed.shape, dtype=bool
    )  # walk on from where the network left [0, num_samples): at most 4x as wide
    while outside.any():
        shift = half_bits[outside]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = placed[outside] >> shift, placed[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key[outside]) & mask)
        placed[outside] = left << shift | right
        outside = placed >= size
    return placed


def sample_at(positions: ArrayLike, seed: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch and the sample id at each position of the training stream.

    Shapes: (n,) -> (n,) int64, (n,) int64.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    epochs, entries = np.divmod(positions, np.uint64(num_samples))
    ids = permute(entries, random_bits(Stream.ORDER, seed, epochs), num_samples)
    return epochs.astype(np.int64), ids.astype(np.int64)


class Planned(NamedTuple):
    """What stands at some positions of a stream.

    Shapes: (n,) int64 each; `epochs` counts the passes over a sample, `copies` its repetitions in one pass: no two
            positions share all three.
    """

    epochs: np.ndarray
    ids: np.ndarray
    copies: np.ndarray


class Order(Protocol):
    """A training stream: a pure function of the position. Pickles into workers, holds no state."""

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""

    def kin(self, sample_id: int) -> Sequence[int]:
        """The samples among which one that cannot be used is replaced, so that the order keeps its character."""

    def window_shards(self, position: int) -> list[int]:
        """The shards read at a position and soon after, so worth fetching; none where every shard is read all along."""


@dataclass(frozen=True)
class NaturalOrder:
    """Each sample once an epoch, shuffled over the whole data set."""

    seed: int
    num_samples: int

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        epochs, ids = sample_at(positions, self.seed, self.num_samples)
        return Planned(epochs, ids, np.zeros_like(ids))

    def kin(self, sample_id: int) -> Sequence[int]:
        """All samples."""
        return range(self.num_samples)

    def window_shards(self, position: int) -> list[int]:
        """None: every shard is read all along."""
        return []


class _Layout(NamedTuple):
    """How one epoch of a windowed order lays its shards end to end."""

    shards: np.ndarray  # (S,) in the order in which they are read
    ends: np.ndarray  # (S,) samples up to the end of each
    window_ends: np.ndarray  # (ceil(S / W),) samples up to the end of each window


@functools.lru_cache(maxsize=4)  # computed again whenever it is gone: no state
def _layout(seed: int, epoch: int, shard_lengths: tuple[int, ...], window: int) -> _Layout:
    num_shards = len(shard_lengths)
    keys = np.broadcast_to(random_bits(Stream.SHARD_ORDER, seed, epoch), num_shards)
    shards = permute(np.arange(num_shards, dtype=np.uint64), keys, num_shards).astype(np.int64)
    ends = np.cumsum(np.asarray(shard_lengths)[shards])
    last_of_window = np.minimum(np.arange(window - 1, num_shards + window - 1, window), num_shards - 1)
    return _Layout(shards, ends, ends[last_of_window])


@dataclass(frozen=True)
class WindowedOrder:
    """Each sample once an epoch, shuffled within windows of `window` shards: for shards that are far away.

    Each epoch permutes the shards, lays them end to end and permutes the samples within every run of `window` of them,
    so that a shard is read in one go. Sample ids count through the shards.

    How well that shuffles is measured in `vitds.data.shuffle_quality`.
    """

    seed: int
    shard_lengths: tuple[int, ...]
    window: int

    @functools.cached_property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_lengths)

    @functools.cached_property
    def _first_ids(self) -> np.ndarray:
        return np.cumsum((0, *self.shard_lengths))

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        epochs, entries = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        ids = np.empty_like(entries)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._ids(epoch, entries[here])
        return Planned(epochs, ids, np.zeros_like(ids))

    def _ids(self, epoch: int, entries: np.ndarray) -> np.ndarray:
        shards, ends, window_ends = _layout(self.seed, epoch, self.shard_lengths, self.window)
        windows = np.searchsorted(window_ends, entries, side="right")
        starts = np.concatenate([[0], window_ends])[windows]
        keys = random_bits(Stream.WINDOW, self.seed, epoch, windows)
        places = permute((entries - starts).astype(np.uint64), keys, window_ends[windows] - starts).astype(np.int64)
        places += starts
        rows = np.searchsorted(ends, places, side="right")
        return self._first_ids[shards[rows]] + places - np.concatenate([[0], ends])[rows]

    def kin(self, sample_id: int) -> Sequence[int]:
        """The samples of its shard, which is at hand."""
        shard = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return range(int(self._first_ids[shard]), int(self._first_ids[shard + 1]))

    def window_shards(self, position: int) -> list[int]:
        """The shards of the window at a position, then those of the next."""
        epoch, entry = divmod(position, self.num_samples)
        shards, _, window_ends = _layout(self.seed, epoch, self.shard_lengths, self.window)
        first = int(np.searchsorted(window_ends, entry, side="right")) * self.window
        ahead = shards[first : first + 2 * self.window].tolist()
        if first + self.window >= len(shards):  # the last window of its epoch
            ahead += _layout(self.seed, epoch + 1, self.shard_lengths, self.window).shards[: self.window].tolist()
        return ahead


class BalancedOrder:
    """Each class equally often, each sample of a class equally often.

    Position p is in round p // C over the C classes that have samples, in an order of that round's own. The r-th sample
    of a class is entry r % n of the permutation of its pass r // n over its n samples, so every round has every class
    once and every pass every sample of the class. `epochs` are the passes.
    """

    def __init__(self, seed: int, labels: np.ndarray) -> None:
        """Shapes: labels (N,) integers, at least 0."""
        self.seed = seed
        counts = np.bincount(labels)
        narrow = labels.astype(np.uint16) if len(counts) <= 1 << 16 else labels  # numpy sorts 16 bits in linear time
        self._members = np.argsort(narrow, kind="stable").astype(np.int32 if len(labels) < 1 << 31 else np.int64)
        self._labels = np.flatnonzero(counts)
        self._sizes = counts[self._labels]
        self._starts = np.cumsum(self._sizes) - self._sizes

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        num_classes = len(self._labels)
        rounds, places = np.divmod(np.asarray(positions, dtype=np.uint64), np.uint64(num_classes))
        classes = permute(places, random_bits(Stream.CLASS_ORDER, self.seed, rounds), num_classes).astype(np.int64)
        passes, entries = np.divmod(rounds, self._sizes[classes].astype(np.uint64))
        keys = random_bits(Stream.CLASS_PASS, self.seed, self._labels[classes], passes)
        entries = permute(entries, keys, self._sizes[classes])
        ids = self._members[self._starts[classes] + entries.astype(np.int64)].astype(np.int64)
        return Planned(passes.astype(np.int64), ids, np.zeros_like(ids))

    def kin(self, sample_id: int) -> Sequence[int]:
        """The samples of its class: the balance stays."""
        place = int(np.flatnonzero(self._members == sample_id)[0])
        of_class = int(np.searchsorted(self._starts, place, side="right")) - 1
        start = self._starts[of_class]
        return self._members[start : start + self._sizes[of_class]].tolist()

    def window_shards(self, position: int) -> list[int]:
        """None: every shard is read all along."""
        return []


class Source(NamedTuple):
    """One part of a mixture: its own order, and what came before it."""

    order: Order
    first_id: int
    first_shard: int


@functools.lru_cache(maxsize=4)  # computed again whenever it is gone: no state
def _block(seed: int, block: int, slots: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each position of a block, its source and how many positions of that source came before it in the block.

    Shapes: -> (MIXTURE_BLOCK,) int64 each.
    """
    shuffled = np.argsort(random_bits(Stream.MIXTURE, seed, block, np.arange(MIXTURE_BLOCK)), kind="stable")
    sources = np.repeat(np.arange(len(slots)), slots)[shuffled]
    turns = np.empty_like(sources)
    turns[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(num) for num in slots])
    return sources, turns


@dataclass(frozen=True)
class MixtureOrder:
    """Several orders by weight: of each 10,000 positions source i has exactly `slots[i]`, shuffled among the others'.

    Each source walks its own order, so its samples come equally often whatever the weights.
    """

    seed: int
    slots: tuple[int, ...]
    sources: tuple[Source, ...]

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), MIXTURE_BLOCK)
        chosen, own_positions = np.empty_like(blocks), np.empty_like(blocks)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources, turns = _block(self.seed, block, self.slots)
            chosen[here] = sources[places[here]]
            own_positions[here] = block * np.asarray(self.slots)[chosen[here]] + turns[places[here]]
        planned = Planned(*(np.empty_like(blocks) for _ in Planned._fields))
        for number, source in enumerate(self.sources):
            here = chosen == number
            own = source.order.at(own_positions[here])
            for column, values in zip(planned, (own.epochs, own.ids + source.first_id, own.copies), strict=True):
                column[here] = values
        return planned

    def kin(self, sample_id: int) -> Sequence[int]:
        """As its source says."""
        source = next(source for source in reversed(self.sources) if source.first_id <= sample_id)
        return [source.first_id + other for other in source.order.kin(sample_id - source.first_id)]

    def window_shards(self, position: int) -> list[int]:
        """The shards that every source reads there and soon after."""
        block, place = divmod(position, MIXTURE_BLOCK)
        chosen, _ = _block(self.seed, block, self.slots)
        before = np.bincount(chosen[:place], minlength=len(self.slots)).tolist()
        ahead = zip(self.sources, self.slots, before, strict=True)
        return [
            source.first_shard + shard
            for source, num_slots, num_before in ahead
            for shard in source.order.window_shards(block * num_slots + num_before)
        ]


def block_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of MIXTURE_BLOCK positions each weight has: its share, rounded so that the sum is exact.

    The largest remainders are rounded up. A weight below 1 / MIXTURE_BLOCK of the sum may have none.
    """
    exact = [MIXTURE_BLOCK * weight / math.fsum(weights) for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(slots)), key=lambda number: slots[number] - exact[number])
    for number in by_remainder[: MIXTURE_BLOCK - sum(slots)]:
        slots[number] += 1
    return tuple(slots)


@dataclass(frozen=True)
class RepeatedOrder:
    """Repeated augmentation: each global batch of B positions holds B / R samples of another order, R copies of each.

    Position j of a batch is copy c = j // (B / R) of its sample (j + c) % (B / R): copies of a sample lie far apart,
    and the positions 2i and 2i + 1 that mixup takes hold different samples, others for each copy and the next.

    Source: Hoffer et al., "Augment your batch" (2020); DeiT's RASampler (Touvron et al., 2021).
    """

    base: Order
    global_batch: int
    repeats: int

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        copies, base_positions = self._split(np.asarray(positions, dtype=np.int64))
        epochs, ids, _ = self.base.at(base_positions)
        return Planned(epochs, ids, copies)

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_distinct = self.global_batch // self.repeats
        batches, places = np.divmod(positions, self.global_batch)
        copies, places = np.divmod(places, num_distinct)
        return copies, batches * num_distinct + (places + copies) % num_distinct

    def kin(self, sample_id: int) -> Sequence[int]:
        """As the order that is repeated says."""
        return self.base.kin(sample_id)

    def window_shards(self, position: int) -> list[int]:
        """As the order that is repeated says."""
        return self.base.window_shards(int(self._split(np.asarray(position))[1]))


def build_order(data: DataConfig, seed: int, global_batch: int, indexes: Sequence[Index]) -> Order:
    """The order of a run over its data set directories, whose sample ids and shards count on from one to the next.

    Without weights they are one data set: in the natural order each sample once an epoch, balanced over all classes.
    With weights each directory walks an order of its own.

    Raises: DataError when a window is asked for and the rows of an index do not follow its shards.
    """
    order: Order
    if data.weights:
        sources, first_id, first_shard = [], 0, 0
        for number, index in enumerate(indexes):
            own_seed = int(random_bits(Stream.MIXTURE, seed, number))  # or equal sizes would have equal permutations
            sources.append(Source(_one_order(data, own_seed, [index]), first_id, first_shard))
            first_id, first_shard = first_id + len(index), first_shard + len(index.shards)
        order = MixtureOrder(seed, block_slots(data.weights), tuple(sources))
    else:
        order = _one_order(data, seed, indexes)
    return RepeatedOrder(order, global_batch, data.repeats) if data.repeats > 1 else order


def _one_order(data: DataConfig, seed: int, indexes: Sequence[Index]) -> Order:
    if data.sampling == "balanced":
        return BalancedOrder(seed, np.concatenate([index.label for index in indexes]))
    lengths = tuple(length for index in indexes for length in index.shard_lengths())
    if data.shuffle_window and data.shuffle_window < len(lengths):  # a window over all shards is the whole shuffle
        for index in indexes:
            if (np.diff(index.shard) < 0).any():
                raise DataError(
                    "data.shuffle_window reads shard by shard, and the rows of the index are not in their order",
                    fix="write the shards again, or data.shuffle_window 0",
                )
        return WindowedOrder(seed, lengths, data.shuffle_window)
    return NaturalOrder(seed, sum(len(index) for index in indexes))


def rank_positions(batch: BatchLike, rank: int, global_step: int) -> range:
    """The positions of one rank's run of a global batch."""
    per_rank = batch.micro_batch * batch.accumulation_steps
    first = global_step * batch.global_batch + rank * per_rank
    return range(first, first + per_rank)


def micro_batch_positions(batch: BatchLike, rank: int, global_step: int, micro_index: int) -> range:
    """The positions of micro-batch `micro_index` (0 .. accumulation_steps - 1) of one rank in a global step."""
    first = micro_index * batch.micro_batch
    return rank_positions(batch, rank, global_step)[first : first + batch.micro_batch]


def num_eval_rounds(num_samples: int, batch_size: int, world_size: int) -> int:
    """How many micro-batches every rank runs in one evaluation, the padding ones included."""
    num_batches = -(-num_samples // batch_size)
    return -(-num_batches // world_size)


def eval_batch(num_samples: int, batch_size: int, world_size: int, rank: int, round_index: int) -> tuple[int, range]:
    """Evaluation batch j = round_index * world_size + rank and its sample ids, in index order; empty past the end.

    Batch j belongs to rank j % world_size, so every sample is in exactly one batch whatever the world size.
    """
    index = round_index * world_size + rank
    return index, range(min(index * batch_size, num_samples), min((index + 1) * batch_size, num_samples))
