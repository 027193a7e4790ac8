"""What happens to a training image once it has the model's size, uint8 in and out, and the numbers that decide it.

Everything random is a function of (seed, epoch, sample id, copy), never of a worker or of what came before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vitds.data.color import JITTER_DRAWS, THREE_AUGMENT_DRAWS, color_jitter, three_augment
from vitds.data.counter import Stream, uniform
from vitds.data.erase import ERASE_DRAWS, erase
from vitds.data.randaugment import DRAWS_PER_LAYER, randaugment

if TYPE_CHECKING:
    from vitds.run_config import DataConfig


def num_draws(data: DataConfig) -> int:
    """How many random numbers `augment` takes for one image."""
    return sum(num for num, _ in _operations(data))


def draws(seed: int, epochs: np.ndarray, ids: np.ndarray, copies: np.ndarray, num: int) -> np.ndarray:
    """The random numbers of each training image, in [0, 1): the crop's, then those that `augment` takes.

    The first do not depend on how many there are.

    Shapes: epochs (B,), ids (B,), copies (B,) -> (B, num) float64.
    """
    return uniform(Stream.AUGMENT, seed, epochs[:, None], ids[:, None], copies[:, None], np.arange(num))


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
