"""From a decoded image to one of the model's size: the training and the evaluation transform, uint8 in and out.

Everything random is a function of (seed, epoch, sample id, copy), never of a worker or of what came before. Boxes
follow torchvision's RandomResizedCrop; pixels are resampled by torchvision on uint8 tensors, with antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitds.data.color import JITTER_DRAWS, THREE_AUGMENT_DRAWS, color_jitter, three_augment
from vitds.data.counter import Stream, uniform
from vitds.data.erase import ERASE_DRAWS, erase
from vitds.data.randaugment import DRAWS_PER_LAYER, randaugment

if TYPE_CHECKING:
    from vitds.run_config import DataConfig

_NUM_ATTEMPTS = 10
_PADDING = 4  # pixels on each side, the usual of CIFAR
NUM_DRAWS = 4 * _NUM_ATTEMPTS + 1  # per image: area, aspect, top, left for each attempt at a box, and the flip

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def num_draws(data: DataConfig) -> int:
    """How many random numbers the training transform of one image takes: NUM_DRAWS, then those of `augment`."""
    return NUM_DRAWS + sum(num for num, _ in _operations(data))


def draws(seed: int, epochs: np.ndarray, ids: np.ndarray, copies: np.ndarray, num: int = NUM_DRAWS) -> np.ndarray:
    """The random numbers of each image's training transform, in [0, 1); the first do not depend on how many there are.

    Shapes: epochs (B,), ids (B,), copies (B,) -> (B, num) float64.
    """
    return uniform(Stream.AUGMENT, seed, epochs[:, None], ids[:, None], copies[:, None], np.arange(num))


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: np.ndarray
) -> Box:
    """A box of `scale` times the image's area and an aspect within `ratio`: ten attempts, then the largest central one.

    Source: torchvision.transforms.RandomResizedCrop.get_params, with `numbers` in the place of its generator.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in numbers[: 4 * _NUM_ATTEMPTS].reshape(_NUM_ATTEMPTS, 4).tolist():
        target_area = area * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        box_width = round(math.sqrt(target_area * aspect))
        box_height = round(math.sqrt(target_area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    aspect = width / height
    if aspect < ratio[0]:
        box_height, box_width = max(1, min(height, round(width / ratio[0]))), width
    elif aspect > ratio[1]:
        box_height, box_width = height, max(1, min(width, round(height * ratio[1])))
    else:
        box_height, box_width = height, width
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize(image_CHW: Tensor, size_hw: tuple[int, int], interpolation: str) -> Tensor:
    """Resample to `size_hw`, losing the aspect if need be.

    Shapes: (C, h, w) uint8 -> (C, H, W) uint8.
    """
    return F.resize(image_CHW, list(size_hw), InterpolationMode(interpolation), antialias=True)


def train_transform(image_CHW: Tensor, numbers: np.ndarray, data: DataConfig, image_size: tuple[int, int]) -> Tensor:
    """Crop as `data.train_crop` says, resize, mirror with probability `data.flip`, then `augment`.

    Shapes: (C, h, w) uint8, (num_draws(data),) -> (C, H, W) uint8.
    """
    if data.train_crop == "random":
        height, width = image_CHW.shape[1:]
        top, left, height, width = random_box(height, width, data.crop_scale, data.crop_ratio, numbers)
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    image_CHW = resize(image_CHW, image_size, data.interpolation)
    if data.train_crop == "pad":
        top, left = (int(number * (2 * _PADDING + 1)) for number in numbers[:2])
        padded = F.pad(image_CHW, [_PADDING])
        image_CHW = padded[:, top : top + image_size[0], left : left + image_size[1]]
    if numbers[NUM_DRAWS - 1] < data.flip:
        image_CHW = image_CHW.flip(-1)
    return augment(image_CHW, numbers[NUM_DRAWS:], data)


def augment(image_CHW: Tensor, numbers: np.ndarray, data: DataConfig) -> Tensor:
    """What happens to a training image that has its size: each operation that is on takes its numbers, in turn.

    Shapes: (3, H, W) uint8, numbers in [0, 1) -> (3, H, W) uint8.
    """
    for num, operation in _operations(data):
        image_CHW, numbers = operation(image_CHW, numbers[:num]), numbers[num:]
    return image_CHW


def _operations(data: DataConfig) -> list[tuple[int, Callable[[Tensor, np.ndarray], Tensor]]]:
    """The operations that are on and how many numbers each takes; new ones come last, so that streams stay."""
    layers, magnitude = data.randaugment_layers, data.randaugment_magnitude
    every: list[tuple[bool, int, Callable[[Tensor, np.ndarray], Tensor]]] = [
        (layers > 0, DRAWS_PER_LAYER * layers, lambda image, numbers: randaugment(image, numbers, magnitude)),
        (data.three_augment, THREE_AUGMENT_DRAWS, three_augment),
        (data.color_jitter > 0, JITTER_DRAWS, lambda image, numbers: color_jitter(image, numbers, data.color_jitter)),
        (data.erase > 0, ERASE_DRAWS, lambda image, numbers: erase(image, numbers, data.erase, data.mean, data.std)),
    ]
    return [(num, operation) for is_on, num, operation in every if is_on]


def eval_transform(image_CHW: Tensor, data: DataConfig, image_size: tuple[int, int]) -> Tensor:
    """Resize straight to the image size ("squash", the paper's), or cover it with a margin and cut out the centre.

    Shapes: (C, h, w) uint8 -> (C, H, W) uint8.
    """
    if data.eval_crop == "squash":
        return resize(image_CHW, image_size, data.interpolation)
    height, width = image_CHW.shape[1:]
    size = _covering_size(height, width, data, image_size)
    return F.center_crop(resize(image_CHW, size, data.interpolation), list(image_size))


def eval_box(height: int, width: int, data: DataConfig, image_size: tuple[int, int]) -> Box:
    """The part of an image of (height, width) pixels that `eval_transform` shows the model, to the nearest pixel."""
    if data.eval_crop == "squash":
        return 0, 0, height, width
    size_h, size_w = _covering_size(height, width, data, image_size)
    box_h, box_w = max(1, round(height * image_size[0] / size_h)), max(1, round(width * image_size[1] / size_w))
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w


def _covering_size(height: int, width: int, data: DataConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """What an image is resized to, aspect kept, before its centre is cut out."""
    cover_h, cover_w = (int(side / data.crop_fraction) for side in image_size)
    if cover_h * width >= cover_w * height:  # the height decides how far the image shrinks
        return cover_h, max(cover_w, cover_h * width // height)
    return max(cover_h, cover_w * height // width), cover_w
