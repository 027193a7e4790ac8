"""From an opened image to one of the model's size: boxes, resizes, mirror; uint8 in and out.

Only the window that a box names is asked of the image, so a decoder need not make the rest. Boxes follow torchvision's
RandomResizedCrop and are a function of numbers that the caller draws. Pixels are resampled on the window alone, with
antialiasing: by torch ("fast"), or by Pillow ("exact"), as torchvision's transforms do on PIL images, bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from vitds.run_config import DataConfig

_NUM_ATTEMPTS = 10
_PADDING = 4  # pixels on each side, the usual of CIFAR
_MAX_ASPECT = 20  # of what is resized with its aspect kept
NUM_DRAWS = 4 * _NUM_ATTEMPTS + 1  # per image: area, aspect, top, left for each attempt at a box, and the flip

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class OpenImage(Protocol):
    """An image of known size, whose pixels are made when they are asked for."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    def window(self, box: Box) -> np.ndarray:
        """The pixels in a box. Shapes: -> (3, h, w) uint8."""


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


def resize(pixels_CHW: np.ndarray, size_hw: tuple[int, int], data: DataConfig) -> Tensor:
    """Resample to `size_hw`, losing the aspect if need be, as `data.resampling` and `data.interpolation` say.

    Shapes: (3, h, w) uint8 -> (3, H, W) uint8.
    """
    if data.resampling == "exact":
        filter_ = Image.Resampling[data.interpolation.upper()]
        image = Image.fromarray(pixels_CHW.transpose(1, 2, 0)).resize(size_hw[::-1], filter_)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F.resize(torch.from_numpy(pixels_CHW), list(size_hw), InterpolationMode(data.interpolation), antialias=True)


def train_crop(image: OpenImage, numbers: np.ndarray, data: DataConfig, image_size: tuple[int, int]) -> Tensor:
    """Crop as `data.train_crop` says, resize, mirror with probability `data.flip`.

    Shapes: numbers (NUM_DRAWS,) in [0, 1) -> (3, H, W) uint8.
    """
    box = (0, 0, image.height, image.width)
    if data.train_crop == "random":
        box = random_box(image.height, image.width, data.crop_scale, data.crop_ratio, numbers)
    if data.train_crop == "simple":
        box = _central_box(image.height, image.width)
    size = _covering_size(*box[2:], image_size) if data.train_crop == "simple" else image_size
    image_CHW = resize(image.window(box), size, data)
    if data.train_crop in ("pad", "simple"):
        mode = "reflect" if data.train_crop == "simple" and min(size) > _PADDING else "constant"
        image_CHW = F.pad(image_CHW, [_PADDING], padding_mode=mode)
        spare = (side - kept + 1 for side, kept in zip(image_CHW.shape[1:], image_size, strict=True))
        top, left = (int(number * places) for number, places in zip(numbers[:2].tolist(), spare, strict=True))
        image_CHW = image_CHW[:, top : top + image_size[0], left : left + image_size[1]]
    return image_CHW.flip(-1) if numbers[NUM_DRAWS - 1] < data.flip else image_CHW


def eval_crop(image: OpenImage, data: DataConfig, image_size: tuple[int, int]) -> Tensor:
    """Resize straight to the image size ("squash", the paper's), or cover it with a margin and cut out the centre.

    Shapes: -> (3, H, W) uint8.
    """
    if data.eval_crop == "squash":
        return resize(image.window((0, 0, image.height, image.width)), image_size, data)
    box = _central_box(image.height, image.width)
    size = _covering_size(*box[2:], image_size, data.crop_fraction)
    return F.center_crop(resize(image.window(box), size, data), list(image_size))


def eval_box(height: int, width: int, data: DataConfig, image_size: tuple[int, int]) -> Box:
    """The part of an image of (height, width) pixels that `eval_crop` shows the model, to the nearest pixel."""
    if data.eval_crop == "squash":
        return 0, 0, height, width
    _, _, kept_h, kept_w = _central_box(height, width)
    size_h, size_w = _covering_size(kept_h, kept_w, image_size, data.crop_fraction)
    box_h, box_w = max(1, round(kept_h * image_size[0] / size_h)), max(1, round(kept_w * image_size[1] / size_w))
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w


def _central_box(height: int, width: int) -> Box:
    """All of an image, but of one that is longer than _MAX_ASPECT times its width only the middle: a line of 100,000
    pixels, resized until its width covers a model's input, would fill the memory.
    """
    kept_h, kept_w = min(height, _MAX_ASPECT * width), min(width, _MAX_ASPECT * height)
    return (height - kept_h) // 2, (width - kept_w) // 2, kept_h, kept_w


def _covering_size(height: int, width: int, image_size: tuple[int, int], crop_fraction: float = 1.0) -> tuple[int, int]:
    """What an image is resized to, aspect kept, before a part of `crop_fraction` of it is cut out."""
    cover_h, cover_w = (int(side / crop_fraction) for side in image_size)
    if cover_h * width >= cover_w * height:  # the height decides how far the image shrinks
        return cover_h, max(cover_w, cover_h * width // height)
    return max(cover_h, cover_w * height // width), cover_w
