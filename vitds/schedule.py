"""Learning-rate schedules as pure functions of the step: warmup, then linear, cosine or constant. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_TYPES = ("linear", "cosine", "constant")


def lr_factor(decay_type: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor on the base learning rate that applied step k (counted from 0) trains with.

    Warmup rises linearly from 0; linear and cosine then fall to 0 at `total_steps`.
    Source: jeonsworld/ViT-pytorch utils/scheduler.py (WarmupLinear-, WarmupCosine- and WarmupConstantSchedule).
    """
    decay_steps = max(1, total_steps - warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / decay_steps
        if decay_type == "linear":
            return max(0.0, 1.0 - progress)
        if decay_type == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return 1.0

    return factor
