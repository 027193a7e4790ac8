"""A moving average of the weights, kept where the optimizer keeps its moments.

DeepSpeed shards, saves and restores whatever stands in the state of the optimizer that it wraps, so the average is one
more entry there, "ema": at ZeRO stages 1 to 3 each rank averages its own fp32 masters and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_SWAPPED_AT_ONCE = 2**26  # values: 256 MiB of room, whatever the model


class WeightAverage:
    """The exponential moving average of what an optimizer updates: ema += (1 - decay) * (weight - ema).

    It starts as the weights before the first update and follows applied updates only; what is frozen has none.
    Source: Polyak and Juditsky 1992; the form of timm's ModelEmaV3 and of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Follow the updates of `optimizer`, the one that holds fp32 masters and their moments."""
        self._optimizer = optimizer
        self._decay = decay
        self._starts: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average where the weights are and the weights where the average is, bit for bit."""
        for weights, kept in self._optimizer.state.items():
            if "ema" in kept:
                parts = (tensor.detach().view(-1).split(_SWAPPED_AT_ONCE) for tensor in (weights, kept["ema"]))
                for weight, average in zip(*parts, strict=True):
                    copy = weight.clone()
                    weight.copy_(average)
                    average.copy_(copy)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keep the weights that the average starts from; torch's optimizers begin with an empty state."""
        for weights in _updated(optimizer):
            if "ema" not in optimizer.state.get(weights, {}):
                self._starts[weights] = weights.detach().clone()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updated = list(_updated(optimizer))
        for weights in updated:
            if weights in self._starts:
                optimizer.state[weights]["ema"] = self._starts.pop(weights)
        if updated:
            averages = [optimizer.state[weights]["ema"] for weights in updated]
            is_shut = getattr(optimizer, "found_inf", None)  # on the device: the update changed nothing
            if is_shut is None:
                torch._foreach_lerp_(averages, updated, 1 - self._decay)
            else:
                torch._foreach_lerp_(averages, updated, [(1 - is_shut) * (1 - self._decay)] * len(updated))


def _updated(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What a step of the optimizer updates: DeepSpeed shows it one flat vector after the other."""
    return (tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.grad is not None)
