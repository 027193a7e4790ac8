"""The training losses, always in float32: softmax cross-entropy, and binary cross-entropy of each class by itself.

Both take integer labels (one class an image) or a row of class probabilities an image: one-hot rows blended by mixup,
or zeros and ones where images have any number of classes, which only the binary loss makes sense of.

Label smoothing moves a target t to (1 - s) t + s / L, whatever its kind. Class weights multiply the term of their
class, and the sum is divided by the number of images (and classes), never by the sum of the weights as torch's mean of
a weighted softmax loss is: so a global batch gives one gradient, however it is cut into micro-batches and ranks.

Source: Touvron et al., "DeiT III" (2022), section 3, for the binary loss; timm loss/binary_cross_entropy.py for the
smoothing of its targets (timm's smooth_dense, which moves rows of zeros and ones towards 1/2, is another rule).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits_BL: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights_L: Tensor | None = None
) -> Tensor:
    """Mean softmax cross-entropy of a micro-batch.

    Shapes: (B, L) and integer labels (B,) or class probabilities (B, L) -> scalar.
    """
    logits_BL = logits_BL.float()
    if class_weights_L is None:
        return F.cross_entropy(logits_BL, targets, label_smoothing=label_smoothing)
    weighted = F.cross_entropy(logits_BL, targets, class_weights_L, label_smoothing=label_smoothing, reduction="sum")
    return weighted / len(logits_BL)


def binary_cross_entropy(
    logits_BL: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights_L: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of a micro-batch, mean over images and classes.

    Shapes: (B, L) and integer labels (B,) or class probabilities (B, L) -> scalar.
    """
    num_classes = logits_BL.shape[1]
    smooth_BL = (1 - label_smoothing) * as_rows(targets, num_classes) + label_smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits_BL.float(), smooth_BL, class_weights_L)


LOSSES = {"softmax": cross_entropy, "bce": binary_cross_entropy}


def as_rows(targets: Tensor, num_classes: int) -> Tensor:
    """Targets as a row an image; outputs without a class are never true.

    Shapes: integer labels (B,), or rows (B, up to L) -> (B, L) float32.
    """
    if targets.ndim == 1:
        return F.one_hot(targets, num_classes).float()
    return F.pad(targets, (0, num_classes - targets.shape[1]))


def probabilities(kind: str, logits_BL: Tensor) -> Tensor:
    """What the outputs of a model that was trained with this loss mean: of a softmax they add up to 1.

    Shapes: (B, L) -> (B, L) float32.
    """
    return logits_BL.float().sigmoid() if kind == "bce" else logits_BL.float().softmax(dim=1)


def sample_losses(kind: str, logits_BL: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample of an evaluation: neither smoothed nor weighted.

    Shapes: (B, L) and integer labels (B,), or for bce also rows (B, up to L) -> (B,) float32.
    """
    logits_BL = logits_BL.float()
    if kind == "softmax":
        return F.cross_entropy(logits_BL, targets, reduction="none")
    rows_BL = as_rows(targets, logits_BL.shape[1])
    return F.binary_cross_entropy_with_logits(logits_BL, rows_BL, reduction="none").mean(dim=1)
