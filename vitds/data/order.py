"""Which sample comes when: pure functions of integers, no I/O and no state (a checkpoint holds samples_seen, no more).

The training stream is the epochs' permutations laid end to end. Position p of the stream is entry p % N of the
permutation of epoch p // N, and global batch k is positions [kB, (k+1)B), so a batch may span two epochs: none is
short, nothing is dropped, padded or repeated. Rank r takes the r-th contiguous run of the batch and its micro-batches
are consecutive pieces of that run. Nothing here but this slicing knows the world size.

A permutation is computed entry by entry (a Feistel network over the next power of four, walked until it lands inside
[0, N)), so starting anywhere costs nothing and no rank holds a table of N entries.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), for the cycle walking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from vitds.data.counter import Stream, mix, random_bits

_NUM_ROUNDS = 8


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


def permute(entries: np.ndarray, keys: np.ndarray, num_samples: int) -> np.ndarray:
    """Send each entry of [0, num_samples) to its place under the permutation that its key names.

    Shapes: entries (n,) uint64, keys (n,) uint64 -> (n,) uint64.
    """
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = [random_bits(keys, number) for number in range(_NUM_ROUNDS)]
    placed = np.array(entries, dtype=np.uint64)
    outside = np.ones(
        placed.shape, dtype=bool
    )  # walk on from where the network left [0, num_samples): at most 4x as wide
    while outside.any():
        left, right = placed[outside] >> shift, placed[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key[outside]) & mask)
        placed[outside] = left << shift | right
        outside = placed >= np.uint64(num_samples)
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


@dataclass(frozen=True)
class NaturalOrder:
    """Each sample once an epoch, shuffled over the whole data set."""

    seed: int
    num_samples: int

    def at(self, positions: ArrayLike) -> Planned:
        """What stands at each position."""
        epochs, ids = sample_at(positions, self.seed, self.num_samples)
        return Planned(epochs, ids, np.zeros_like(ids))


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
