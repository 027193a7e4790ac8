"""Mixup and cutmix of neighbours: positions 2i and 2i + 1 of a global batch, by numbers of (seed, step, i) alone.

Mixup blends the two images of a pair, cutmix exchanges a box between them.

Source: Zhang et al., "mixup: beyond empirical risk minimization" (2018); Yun et al., "CutMix" (2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vitds.data.counter import Stream, uniform

if TYPE_CHECKING:
    from vitds.run_config import DataConfig

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


class Mix(NamedTuple):
    """What each pair of neighbours does: a box is exchanged, and the rest of each image is `own` * itself + the other.

    Mixup has an empty box, cutmix has `own` = 1.

    Shapes: own (P,) float64, boxes (P, 4) int64: top, left, bottom and right in pixels.
    """

    own: np.ndarray
    boxes: np.ndarray


def draw_mix(data: DataConfig, image_size: tuple[int, int], seed: int, step: int, pairs: np.ndarray) -> Mix:
    """Choose between mixup and cutmix for each pair of a global batch, and draw its coefficient and box.

    Shapes: (P,) -> (P,), (P, 4).
    Source: torchvision.transforms.v2.CutMix for the box around a random centre, cut off at the edges.
    """
    which, row, column = uniform(Stream.MIXUP, seed, step, pairs, 2, np.arange(3)[:, None])
    is_cutmix = which < (data.cutmix_share if data.mixup_alpha > 0 else 1.0)
    if data.cutmix_alpha == 0:
        is_cutmix[:] = False
    own, boxes = np.ones(len(pairs)), np.zeros((len(pairs), 4), np.int64)
    if not is_cutmix.all():
        own = np.where(is_cutmix, 1.0, mixup_coefficients(data.mixup_alpha, seed, step, pairs))
    if is_cutmix.any():
        half = 0.5 * np.sqrt(1 - mixup_coefficients(data.cutmix_alpha, seed, step, pairs))
        for axis, (side, draw) in enumerate(zip(image_size, (row, column), strict=True)):
            centre, reach = (draw * side).astype(np.int64), (half * side).astype(np.int64)
            boxes[:, axis], boxes[:, 2 + axis] = (centre - reach).clip(0), (centre + reach).clip(max=side)
        boxes[~is_cutmix] = 0
    return Mix(own, boxes)


def mix(images_BCHW: Tensor, targets: Tensor, drawn: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour, and their targets by the exact share of each in the picture.

    Shapes: (B, C, H, W) float, (B,) int64 or (B, L) float32 -> (B, C, H, W), (B, L) float32.
    """
    device, (height, width) = images_BCHW.device, images_BCHW.shape[2:]
    own_B, boxes_B4 = (_sent(value, device).repeat_interleave(2, 0) for value in drawn)
    top, left, bottom, right = boxes_B4.reshape(-1, 4, 1, 1, 1).unbind(1)
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    is_exchanged = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, 1, H, W)
    weights = torch.where(is_exchanged, 0.0, own_B.to(images_BCHW.dtype).reshape(-1, 1, 1, 1))
    shares = own_B * (1 - ((bottom - top) * (right - left)).flatten().double() / (height * width))
    targets_BL = one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
    return _blend(images_BCHW, weights), _blend(targets_BL, shares.float()[:, None])


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """From memory that a GPU reads by itself: nothing waits until it has done what it was given before."""
    host = torch.from_numpy(values)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _blend(values: Tensor, own: Tensor) -> Tensor:
    """Where `own` is 0 or 1 the result is the other's or one's own value, bit for bit."""
    return torch.lerp(values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), values, own)
