"""Which updates change the weights: those with finite gradients. It is decided on the device, and nothing waits for it.

torch's fused optimizers read two tensors before they touch anything: `found_inf`, which leaves weights, moments and
their count of updates as they are, and `grad_scale`, by which they divide the gradients, and so clip them on the way.
Source: torch/amp/grad_scaler.py, `_maybe_opt_step` and the note on `_step_supports_amp_scaling`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class UpdateGate:
    """Stands before an optimizer's updates, and remembers on the device which of them it let through."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Clip to `max_norm` (0 is no limit) what `optimizer`, one that `stands_before` knows, is about to apply."""
        self._optimizer: Any = optimizer
        self._max_norm = max_norm
        self._shut: list[Tensor] = []  # 1 for an update that changed nothing, 0 for another
        self._num_judged = 0  # since `check_judged`
        optimizer.register_step_pre_hook(_start_momentum)

    @staticmethod
    def stands_before(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer can be told so: a fused one, whose first step is no other than its later ones."""
        return all(group.get("fused") and not group.get("dampening") for group in optimizer.param_groups)

    def judge(self, norm: Tensor) -> bool:
        """Let the next update through if `norm`, of its gradients over all ranks, is finite; DeepSpeed's mark is -1.

        Returns False, as is_invalid_grad_norm does of a norm that is finite: the host does not know of another.
        """
        self._optimizer.found_inf = (~norm.isfinite() | (norm < 0)).float()
        self._shut.append(self._optimizer.found_inf)
        self._num_judged += 1
        if self._max_norm > 0:
            self._optimizer.grad_scale = ((norm + 1e-6) / self._max_norm).clamp(min=1.0).float()
        return False

    def check_judged(self) -> None:
        """Behind an update: it must have been judged once, or neither skipping nor clipping means anything."""
        assert self._num_judged == 1, f"an update was judged {self._num_judged} times"
        self._num_judged = 0

    def outcomes(self) -> list[bool]:
        """Whether each update since the last call changed the weights; waits for the device."""
        shut, self._shut = self._shut, []
        return [not value for value in torch.stack(shut).tolist()] if shut else []


def _start_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Begin SGD's momentum at 0: torch allocates it in the first step, which leaves it unwritten where it is shut."""
    for group in optimizer.param_groups:
        for vector in group["params"] if group.get("momentum") else ():
            if vector.grad is not None:
                state = optimizer.state[vector]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(vector)
