"""What a layout reads off the names and shapes of a file's arrays. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.layouts.array import ForeignArray
from vitds.model.registry import ModelSpec


@dataclass(frozen=True)
class Found:
    """The model that a file's shapes tell, and every array that a whole file of it holds.

    `unknown` lists quantities that no array gives; `ignored` the keys of arrays that belong to something else than the
    model (a decoder, a text tower) and are left out; `notes` are lines that the user should see.
    """

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None
    arrays: tuple[ForeignArray, ...]
    unknown: list[str]
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
