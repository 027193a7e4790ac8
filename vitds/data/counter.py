"""Random numbers as a pure function of integers: no generator, no state, the same on every rank, worker and numpy.

A tuple of counters is folded into 64 bits with the finalizer of splitmix64, which is a bijection: as long as the last
counter alone differs, two draws never collide. Every use opens with its own `Stream`, so draws never meet across uses.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); constants of Vigna's splitmix64.c.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np
from numpy.typing import ArrayLike

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


@unique
class Stream(IntEnum):
    """The first counter of every draw: what the draw is for."""

    ORDER = 1
    AUGMENT = 2
    MIXUP = 3
    REPLACEMENT = 4
    DROPOUT = 5
    PIXELS = 6
    ERASE = 7
    SHARD_ORDER = 8
    WINDOW = 9
    CLASS_ORDER = 10
    CLASS_PASS = 11
    MIXTURE = 12
    SHUFFLE_BUFFER = 13


def mix(bits: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of the 64-bit integers whose output looks random."""
    with np.errstate(over="ignore"):  # wrapping around is the arithmetic meant here; numpy warns about it for scalars
        bits = bits + _GOLDEN
        bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
        bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
        return bits ^ (bits >> np.uint64(31))


def random_bits(*counters: ArrayLike) -> np.ndarray:
    """64 random bits for each tuple of counters (integers or integer arrays, broadcast against each other)."""
    bits = np.zeros((), np.uint64)
    for counter in counters:
        bits = mix(bits ^ np.asarray(counter).astype(np.uint64))
    return bits


def uniform(*counters: ArrayLike) -> np.ndarray:
    """A float64 in [0, 1) for each tuple of counters."""
    return (random_bits(*counters) >> np.uint64(11)) * 2.0**-53
