"""Steps, epochs and samples: one conversion each, exact, in whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction


def steps_for_epochs(epochs: float, num_samples: int, global_batch: int) -> int:
    """Global steps that see `epochs` epochs, rounded up: the last batch may reach into the next epoch."""
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch)


def steps_for_samples(num_samples: int, global_batch: int) -> int:
    """Global steps that see at least `num_samples` samples."""
    return -(-num_samples // global_batch)


def epochs_for_steps(num_steps: int, num_samples: int, global_batch: int) -> float:
    """Epochs that `num_steps` global steps walk through."""
    return num_steps * global_batch / num_samples
