"""What a layout reads off the names and shapes of a file's arrays. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitds.layouts.array import ForeignArray
from vitds.model.registry import ModelSpec


@dataclass(frozen=True)
class Found:
    """The model that a file's shapes tell, and every array that a whole file of it holds.

    `unknown` lists quantities that no array gives, `assumed` those that were guessed then; `must_be_named` says that
    a guess of the heads is worth nothing, so that the user has to name the model; `ignored` the keys of arrays that
    belong to something else than the model (a decoder, a text tower) and are left out; `classes`, `data` and `loss`
    (softmax or bce) are what a file beside the arrays says; `notes` are lines that the user should see.
    """

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None
    arrays: tuple[ForeignArray, ...]
    unknown: list[str]
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    must_be_named: bool = False
    classes: list[str] | None = None
    data: dict[str, Any] | None = None
    loss: str = "softmax"


# The ViTs whose heads are not 64 wide: so400m, H, g, G, e.
_SIXTEEN_HEADS = (1152, 1280, 1408, 1664, 1792)


def usual_heads(width: int) -> int:
    """The number of heads that ViTs of this width have, for layouts in which no array tells it."""
    return 16 if width in _SIXTEEN_HEADS else max(width // 64, 1)


def assumed_note(spec: ModelSpec, guessed: Sequence[str]) -> str:
    """A line that says what was guessed of `spec`, and how the user states another value."""
    values = ", ".join(f"{quantity}={getattr(spec, quantity)}" for quantity in guessed)
    ways = [f"auto:{quantity}=..." for quantity in guessed if quantity != "heads"][:1]
    ways += ["custom:..."] * ("heads" in guessed)
    return f"no array tells, assumed: {values}; --model {' or '.join(ways)} states another"


def one_or_three(numbers: list[float]) -> float | tuple[float, ...]:
    """Mean or deviation as a run's configuration has it: one number when all channels share it."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)
