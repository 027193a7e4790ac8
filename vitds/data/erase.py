"""Random erasing: a box of a training image becomes noise.

Source: Zhong et al., "Random Erasing Data Augmentation" (2020).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vitds.data.counter import Stream, uniform

_NUM_ATTEMPTS = 10
ERASE_DRAWS = 2 + 4 * _NUM_ATTEMPTS  # whether, the noise, and area, aspect, top and left for each attempt at a box
_SCALE = (0.02, 0.33)  # of the image's area
_RATIO = (0.3, 3.3)  # height / width

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Statistic = float | tuple[float, ...]  # of pixels in [0, 1], for all channels or for each


def erase(image_CHW: Tensor, numbers: np.ndarray, probability: float, mean: Statistic, std: Statistic) -> Tensor:
    """Fill a random box, with the given probability, with noise of this mean and deviation, pixel by pixel.

    The model is given the noise as standard normal where uint8 does not cut it off, as timm's mode "pixel" makes it.

    Shapes: (3, H, W) uint8, (ERASE_DRAWS,) -> (3, H, W) uint8.
    """
    box = erased_box(image_CHW.shape[1], image_CHW.shape[2], numbers[2:]) if numbers[0] < probability else None
    if box is None:
        return image_CHW
    key, pixels = int(numbers[1] * 2**53), np.arange(3 * box[2] * box[3])  # a number in [0, 1) has 53 bits
    first, second = uniform(Stream.ERASE, key, np.arange(2)[:, None], pixels)
    normal = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)  # Box and Muller (1958)
    centre, spread = (255 * np.resize(value, (3, 1, 1)) for value in (mean, std))
    noise = (centre + spread * normal.reshape(3, *box[2:])).round().clip(0, 255).astype(np.uint8)
    return F.erase(image_CHW, *box, torch.from_numpy(noise))


def erased_box(height: int, width: int, numbers: np.ndarray) -> Box | None:
    """The box to erase: ten attempts at one smaller than the image, else none.

    Shapes: (4 * 10,) numbers in [0, 1).
    Source: torchvision.transforms.v2.RandomErasing, with `numbers` in the place of its generator.
    """
    log_low, log_high = (math.log(ratio) for ratio in _RATIO)
    for area_draw, ratio_draw, top_draw, left_draw in numbers.reshape(_NUM_ATTEMPTS, 4).tolist():
        area = height * width * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top, left = int(top_draw * (height - box_height + 1)), int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    return None
