"""The gradient norm of each block, from what the optimizer is about to apply: nothing waits for the device.

DeepSpeed shows its optimizer each rank's flat piece of the averaged gradients, unscaled, and clipped or still to be
clipped. Their squares by block, added up over ranks when a line of metrics is due, are the share that each block has in
the whole norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[int, int, int]  # of a flat vector: its block, begin and end


class BlockNorms:
    """Sums of squared gradients by block, of the last step."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parts: Iterable[tuple[Tensor, Sequence[Part]]], num_blocks: int
    ) -> None:
        """`parts` says of each vector that `optimizer` updates on this rank which blocks lie where in it."""
        self._parts: dict[Tensor, tuple[Tensor, list[slice]]] = {}
        self._squares = torch.zeros(num_blocks, dtype=torch.float64)
        for vector, of_vector in parts:
            self._squares = self._squares.to(vector.device)
            if of_vector:  # a rank may hold nothing of a small group but its padding
                blocks = torch.tensor([block for block, _, _ in of_vector])
                belongs = F.one_hot(blocks, num_blocks).T.to(vector.device, torch.float64)  # (num_blocks, parts)
                self._parts[vector] = (belongs, [slice(begin, end) for _, begin, end in of_vector])
        optimizer.register_step_pre_hook(self._before)

    def begin_step(self) -> None:
        """Forget the step before; DeepSpeed updates one flat vector after the other, in as many optimizer steps."""
        self._squares = torch.zeros_like(self._squares)

    @property
    def squares(self) -> Tensor:
        """Of this rank's part, (num_blocks,) float64; zeros or not finite where a step was skipped."""
        return self._squares

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for vector in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            if vector.grad is None or vector not in self._parts:
                continue
            belongs, places = self._parts[vector]
            flat = vector.grad.detach().view(-1)
            norms = torch.stack(torch._foreach_norm([flat[place] for place in places], dtype=torch.float32))
            self._squares += belongs @ norms.double().square()  # index_add_ has no fixed order on a GPU


def named(squares: Sequence[float], norm: float | None) -> dict[str, float]:
    """Norms before clipping by metric name: "embed" before the first block, then the blocks, and what is behind them.

    Clipping scales all of them alike, so that together they are `norm`; infinite where a step was skipped.
    """
    if norm is not None and math.isinf(norm):
        squares = [0.0] * len(squares)  # what a skipped update would have applied
    total = math.sqrt(sum(squares))
    scale = norm / total if norm is not None and total > 0 else math.inf
    names = ["embed", *(f"block_{i}" for i in range(len(squares) - 2)), "head"]
    shares = [math.sqrt(square) for square in squares]
    return {f"grad_norm_{name}": share * scale if total else scale for name, share in zip(names, shares, strict=True)}
