"""Which elements of which parameters lie where in a rank's flat vectors, and how they are filled from a checkpoint.

ZeRO lays masters and moments out by world size, stage and parameter group. A checkpoint of another layout is restored
by name instead: every rank knows which fragments of which parameters its own vectors hold, and reads those alone.
Nothing here knows DeepSpeed; `engine.py` brings the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitds.weights.stored import StoredTensor
from vitds.weights.zero import SavedState


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements in its flattened order, and where in a rank's flat vector it lies.

    A parameter of the vector's group that has no element on this rank is a fragment of length 0.
    """

    name: str
    start: int
    numel: int
    offset: int


def runs_of_rank(
    shapes: Mapping[str, Sequence[int]], paddings: Sequence[int], rank: int, run_numel: int
) -> list[Fragment]:
    """ZeRO stages 1 and 2: the parameters end to end, each with its padding behind it, cut into runs of one length."""
    fragments, position, begin, end = [], 0, rank * run_numel, (rank + 1) * run_numel
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = math.prod(shape)
        first, last = max(position, begin), min(position + numel, end)
        is_here = first < last
        fragments.append(Fragment(name, first - position, last - first, first - begin) if is_here else _none_of(name))
        position += numel + padding
    return fragments


def parts_of_rank(shapes: Mapping[str, Sequence[int]], rank: int, world_size: int) -> list[Fragment]:
    """ZeRO stage 3: of each parameter the rank's one of `world_size` equal parts, end to end; the last ones padded."""
    fragments, offset = [], 0
    for name, shape in shapes.items():
        part_numel = math.ceil(math.prod(shape) / world_size)
        numel = min(part_numel, math.prod(shape) - rank * part_numel)
        fragments.append(Fragment(name, rank * part_numel, numel, offset) if numel > 0 else _none_of(name))
        offset += part_numel
    return fragments


def fill(vector: Tensor, fragments: Sequence[Fragment], read: Callable[[str, int, int], Tensor]) -> None:
    """Write `read(name, start, numel)` to where each fragment lies, and zeros to what is padding."""
    flat = vector.detach().view(-1)
    flat.zero_()
    for fragment in fragments:
        if fragment.numel:
            values = read(fragment.name, fragment.start, fragment.numel)
            flat[fragment.offset : fragment.offset + fragment.numel].copy_(values)


def restore(
    master: Tensor, kept: dict[str, Any], fragments: Sequence[Fragment], saved: SavedState, step_on_device: bool
) -> None:
    """Fill a vector of masters, and all that the optimizer keeps beside it, from a checkpoint of any layout.

    `step_on_device`: fused optimizers count their steps on the vector's device.
    """
    for key, by_name in saved.states.items():
        one = by_name[fragments[0].name]
        if isinstance(one, tuple):
            vector = master if key == "master" else kept.setdefault(key, torch.empty_like(master.detach()))
            fill(vector, fragments, lambda *run, key=key: torch.from_numpy(saved.run(key, *run)))
        elif isinstance(one, StoredTensor):
            device = master.device if step_on_device else "cpu"
            kept[key] = torch.from_numpy(saved.arrays(key)[fragments[0].name]).to(device)
        else:
            kept[key] = one


def _none_of(name: str) -> Fragment:
    return Fragment(name, 0, 0, 0)
