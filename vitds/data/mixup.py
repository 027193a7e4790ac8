"""Mixup of neighbours: positions 2i and 2i + 1 of a global batch are blended by a coefficient of (seed, step, i).

Source: Zhang et al., "mixup: beyond empirical risk minimization" (2018).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vitds.data.counter import Stream, uniform

_NUM_ATTEMPTS = 16  # each accepts more than 95 of 100: all fail once in 10^20


def mixup_coefficients(alpha: float, seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) for each pair of a global batch.

    Shapes: (P,) -> (P,) float64 in [0, 1].
    """
    log_first, log_second = (_log_gamma_draws(alpha, seed, step, pairs, half) for half in (0, 1))
    return 1 / (1 + np.exp(np.clip(log_second - log_first, -700, 700)))  # X / (X + Y), which alone would underflow


def _log_gamma_draws(shape: float, seed: int, step: int, pairs: np.ndarray, half: int) -> np.ndarray:
    """Logarithms of Gamma(shape) draws: Marsaglia and Tsang (2000), boosted by one as they do for a shape below 1."""
    u = 1 - uniform(
        Stream.MIXUP, seed, step, pairs[:, None, None], half, np.arange(_NUM_ATTEMPTS)[:, None], np.arange(4)
    )
    normal = np.sqrt(-2 * np.log(u[..., 0])) * np.cos(2 * np.pi * u[..., 1])
    d = shape + 1 - 1 / 3
    v = np.maximum(1 + normal / np.sqrt(9 * d), 0) ** 3
    with np.errstate(divide="ignore"):
        accepted = (v > 0) & (np.log(u[..., 2]) < normal**2 / 2 + d - d * v + d * np.log(v))
    first = accepted.argmax(axis=1)
    rows = np.arange(len(pairs))
    return np.log(d * v[rows, first]) + np.log(u[rows, 0, 3]) / shape


def mixup(images_BCHW: Tensor, labels: Tensor, coefficients: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Blend each image with its neighbour: c * own + (1 - c) * other, and their one-hot targets alike.

    Shapes: (B, C, H, W) float, (B,) int64, (B/2,) -> (B, C, H, W), (B, L) float32.
    """
    own = coefficients.repeat_interleave(2)
    targets = one_hot(labels, num_classes).float()
    return _blend(images_BCHW, own.to(images_BCHW.dtype)), _blend(targets, own.float())


def _blend(values: Tensor, own: Tensor) -> Tensor:
    other = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.lerp(other, values, own.reshape(-1, *[1] * (values.ndim - 1)))
