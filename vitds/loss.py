"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BL: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of a micro-batch, always computed in float32.

    Shapes: (B, L) and integer labels (B,) or class probabilities (B, L) -> scalar.
    """
    return F.cross_entropy(logits_BL.float(), targets, label_smoothing=label_smoothing)
