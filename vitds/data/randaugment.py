"""RandAugment: a few of sixteen operations in a row, drawn evenly, all at one magnitude.

Operations, their strength at magnitude 10 and the grey that fills what they uncover are those of big_vision, with its
quirks: a higher magnitude posterises and solarises less (from 10 on, solarising does nothing). Its lengths are in
pixels, for images of 224; ours are the same shares of the side. What an operation does to pixels is torchvision's,
which follows PIL.

Source: Cubuk et al., "RandAugment" (2020); google-research/big_vision, pp/archive/autoaugment.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

DRAWS_PER_LAYER = 4  # which operation, its sign, and the row and column of a cutout
_GREY = 128
_TRANSLATION = 100 / 224  # of the side, at magnitude 10
_CUTOUT = 40 / 224  # half the side of the square

Draws = tuple[float, float, float]  # sign, row, column


def randaugment(image_CHW: Tensor, numbers: np.ndarray, magnitude: float) -> Tensor:
    """Apply one operation for every `DRAWS_PER_LAYER` numbers in [0, 1).

    Shapes: (3, H, W) uint8, (layers * DRAWS_PER_LAYER,) -> (3, H, W) uint8.
    """
    for which, *draws in numbers.reshape(-1, DRAWS_PER_LAYER).tolist():
        operation = OPERATIONS[int(which * len(OPERATIONS))]
        image_CHW = operation(image_CHW, magnitude / 10, (draws[0], draws[1], draws[2]))
    return image_CHW


def _auto_contrast(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.autocontrast(image)


def _equalize(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.equalize(image)


def _invert(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.invert(image)


def _rotate(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.rotate(image, _signed(30 * strength, draws), InterpolationMode.NEAREST, fill=_GREY)


def _posterize(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.posterize(image, min(8, int(4 * strength)))


def _solarize(image: Tensor, strength: float, draws: Draws) -> Tensor:
    threshold = int(256 * strength)
    return F.solarize(image, threshold) if threshold < 256 else image


def _color(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.adjust_saturation(image, _factor(strength))


def _contrast(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.adjust_contrast(image, _factor(strength))


def _brightness(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.adjust_brightness(image, _factor(strength))


def _sharpness(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return F.adjust_sharpness(image, _factor(strength))


def _shear_x(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return _shear(image, [math.degrees(math.atan(_signed(0.3 * strength, draws))), 0.0])


def _shear_y(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return _shear(image, [0.0, math.degrees(math.atan(_signed(0.3 * strength, draws)))])


def _translate_x(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return _shift(image, 2, _signed(_TRANSLATION * strength, draws))


def _translate_y(image: Tensor, strength: float, draws: Draws) -> Tensor:
    return _shift(image, 1, _signed(_TRANSLATION * strength, draws))


def _cutout(image: Tensor, strength: float, draws: Draws) -> Tensor:
    spans = []
    for side, draw in zip(image.shape[1:], draws[1:], strict=True):
        center, half = int(draw * side), round(_CUTOUT * strength * side)
        spans.append(slice(max(0, center - half), center + half))
    image = image.clone()
    image[:, spans[0], spans[1]] = _GREY
    return image


def _solarize_add(image: Tensor, strength: float, draws: Draws) -> Tensor:
    brighter = (image.short() + int(110 * strength)).clamp_(max=255).to(image.dtype)
    return torch.where(image < 128, brighter, image)


def _signed(value: float, draws: Draws) -> float:
    return value if draws[0] < 0.5 else -value


def _factor(strength: float) -> float:
    """Of an enhancement: 1 changes nothing."""
    return 1.8 * strength + 0.1


def _shear(image: Tensor, degrees_xy: list[float]) -> Tensor:
    """Shear about the top left corner."""
    corner, nearest = [0.0, 0.0], InterpolationMode.NEAREST
    return F.affine(image, 0.0, [0.0, 0.0], 1.0, degrees_xy, nearest, fill=_GREY, center=corner)


def _shift(image: Tensor, axis: int, share: float) -> Tensor:
    """Move along one axis by a share of the side."""
    side = image.shape[axis]
    pixels = max(-side, min(side, round(share * side)))
    shifted = image.roll(pixels, axis)
    shifted.narrow(axis, 0 if pixels > 0 else side + pixels, abs(pixels)).fill_(_GREY)
    return shifted


OPERATIONS: tuple[Callable[[Tensor, float, Draws], Tensor], ...] = (
    *(_auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _color, _contrast, _brightness, _sharpness),
    *(_shear_x, _shear_y, _translate_x, _translate_y, _cutout, _solarize_add),
)
