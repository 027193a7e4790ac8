"""From epochs to global steps: exact, in whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction


def steps_for_epochs(epochs: float, num_samples: int, global_batch: int) -> int:
    """Global steps that see `epochs` epochs, rounded up: the last batch may reach into the next epoch."""
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch)
