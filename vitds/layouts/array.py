"""How arrays of somebody else's file become our parameters: one entry an array, read in both directions. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]

Move = Literal["same", "flat", "conv", "dense", "query", "out", "patches", "zeros", "sincos2d"]
"""How the axes of one array move on the way to our parameter; nothing is ever computed.

    same     as it is
    flat     any shape -> one axis: query bias (N, K) -> (N*K,), GroupNorm (1, 1, 1, C) -> (C,)
    conv     (H, W, I, O) -> (O, I, H, W)
    dense    (I, O) -> (O, I)
    query    (I, N, K) -> (N*K, I)
    out      (N, K, O) -> (O, N*K)
    patches  positions without the class token's row, (1, T, D) or (T, D) -> (1, 1 + T, D), the new row zero
    zeros    the file has no such array (a layer without bias): the parameter is zero, `key` is empty
    sincos2d the file has no such array: positions are computed for whatever grid is asked for, `key` is empty
"""


@dataclass(frozen=True)
class ForeignArray:
    """One array of a foreign layout: its key, its shape there, the parameter of ours that it fills, and how.

    `part` is 0, 1, 2 for the query, key and value thirds of a fused parameter's rows. `rows` are the runs of a table of
    positions (its axis 1) that the parameter takes, one after the other. Entries of one parameter without a part are
    added: that happens to register tokens which have positions of their own, and nowhere else. `layer` is the slice
    that is meant where one array stacks all blocks, along its first axis.
    """

    key: str
    shape: tuple[int, ...]
    name: str
    part: int | None = None
    move: Move = "same"
    rows: tuple[tuple[int, int], ...] = ()
    layer: int | None = None


def vote(shapes: Shapes, pattern: str, axis: int) -> int | None:
    """The most frequent size of one axis among the arrays whose key matches, None without any.

    A single wrong array is outvoted, and then found by comparing with what the majority implies.
    """
    sizes = Counter(
        shape[axis] for key, shape in shapes.items() if len(shape) >= abs(axis) and re.fullmatch(pattern, key)
    )
    return sizes.most_common(1)[0][0] if sizes else None


def shape_for(array: ForeignArray, shape: tuple[int, ...], heads: int, depth: int) -> tuple[int, ...]:
    """The shape that `array` has in the file of another model, whose parameter of that name has `shape`."""
    if array.part is not None:
        shape = (shape[0] // (3 if ".qkv." in array.name else 2), *shape[1:])
    inner = array.shape if array.layer is None else array.shape[1:]
    match array.move:
        case "conv":
            shape = (*shape[2:], shape[1], shape[0])
        case "dense":
            shape = shape[::-1]
        case "query":
            shape = (shape[1], heads, shape[0] // heads)
        case "out":
            shape = (heads, shape[1] // heads, shape[0])
        case "flat":
            shape = (heads, shape[0] // heads) if len(inner) == 2 else (*inner[:-1], *shape)
    return shape if array.layer is None else (depth, *shape)


def differences(found: Shapes, arrays: Iterable[ForeignArray], compare_shapes: bool = True) -> list[str]:
    """One line for each array that is missing, of another shape, or extra."""
    expected = {array.key: array.shape for array in arrays if array.key}

    def fits(key: str) -> bool:
        # Some writers drop the leading ones of the GroupNorm vectors.
        return found[key] == expected[key] or (expected[key][:3] == (1, 1, 1) and found[key] == expected[key][3:])

    lines = [f"missing {key}" for key in expected if key not in found]
    if compare_shapes:
        differing = [key for key in expected if key in found and not fits(key)]
        lines += [f"wrong shape {key}: {found[key]}, expected {expected[key]}" for key in differing]
    return lines + [f"extra {key} {found[key]}" for key in found if key not in expected]
