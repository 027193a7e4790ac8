"""Arrays of a foreign layout to our parameters and back: renaming and moving axes, no arithmetic; every bit survives.

`vitds.layouts` says which array is which parameter; here stands how its axes move. Two exceptions compute: register
tokens that have positions of their own are added to them, because the model has no place for these, and positions that
a file leaves to a formula.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

import numpy as np

from vitds.layouts.array import ForeignArray
from vitds.model.positions import sincos2d_positions
from vitds.weights.lazy import LazyArrays


def to_parameters(arrays: Mapping[str, np.ndarray], layout: Iterable[ForeignArray]) -> LazyArrays:
    """Our parameters, contiguous and in float32, from the arrays of a file; keys that the layout lacks are not read."""
    parts = defaultdict(list)
    for entry in layout:
        parts[entry.name].append(entry)
    stack = cache(arrays.__getitem__)  # read once, not once for every layer

    def read(entry: ForeignArray) -> np.ndarray:
        match entry.move:
            case "zeros":
                return np.zeros(entry.shape, np.float32)
            case "sincos2d":
                side = math.isqrt(entry.shape[1])
                return sincos2d_positions((side, side), entry.shape[2], has_class_token=entry.shape[1] > side * side)
        whole = (arrays.__getitem__ if entry.layer is None else stack)(entry.key).reshape(entry.shape)
        return whole if entry.layer is None else whole[entry.layer]

    return LazyArrays({name: partial(_whole_parameter, read, entries) for name, entries in parts.items()})


def _whole_parameter(read: Callable[[ForeignArray], np.ndarray], entries: list[ForeignArray]) -> np.ndarray:
    found = [_to_parameter(read(entry), entry) for entry in entries]
    if entries[0].part is None:
        return np.ascontiguousarray(sum(found[1:], start=found[0]), np.float32)
    # Query, key and value come in this order, and each fills its run of rows, head by head.
    return np.ascontiguousarray(np.concatenate(found), np.float32)


def from_parameter(parameter: np.ndarray, entry: ForeignArray) -> np.ndarray:
    """The array that a parameter of ours is in a foreign layout: the inverse of one entry's move."""
    if entry.part is not None:
        num_rows = math.prod(entry.shape) // parameter[0].size
        parameter = parameter[entry.part * num_rows : (entry.part + 1) * num_rows]
    match entry.move:
        case "conv":
            return parameter.transpose(2, 3, 1, 0)
        case "dense" | "query" | "out":
            return parameter.T.reshape(entry.shape)
        case "patches":
            return parameter[:, -entry.shape[-2] :].reshape(entry.shape)
        case _:
            return parameter.reshape(entry.shape)


def _to_parameter(array: np.ndarray, entry: ForeignArray) -> np.ndarray:
    if entry.rows:
        array = np.concatenate([array[:, start:stop] for start, stop in entry.rows], axis=1)
    match entry.move:
        case "flat":
            return array.reshape(-1)
        case "conv":
            return array.transpose(3, 2, 0, 1)
        case "dense":
            return array.T
        case "query":
            return array.reshape(array.shape[0], -1).T
        case "out":
            return array.reshape(-1, array.shape[-1]).T
        case "patches":
            patches = array.reshape(1, -1, array.shape[-1])
            return np.concatenate([np.zeros_like(patches[:, :1]), patches], axis=1)
        case _:
            return array
