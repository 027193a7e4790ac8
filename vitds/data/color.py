"""3-Augment and colour jitter: what DeiT III does to the colours of a training image.

What an operation does to pixels is torchvision's; what is drawn comes as numbers in [0, 1).

Source: Touvron et al., "DeiT III: Revenge of the ViT" (2022), section 3; facebookresearch/deit, augment.py.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

THREE_AUGMENT_DRAWS = 2  # which operation, and the blur's width
JITTER_DRAWS = 4  # the order, and the factors of brightness, contrast and saturation
_SIGMA = (0.1, 2.0)  # of the blur, in pixels, whatever the image size
_JITTERED = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
_ORDERS = list(itertools.permutations(range(len(_JITTERED))))


def three_augment(image_CHW: Tensor, numbers: np.ndarray) -> Tensor:
    """One of grey, solarised (what is at least 128 is inverted) and blurred, each as often as the others.

    Shapes: (3, H, W) uint8, (THREE_AUGMENT_DRAWS,) -> (3, H, W) uint8.
    """
    which, width = numbers.tolist()
    if which < 1 / 3:
        return F.rgb_to_grayscale(image_CHW, num_output_channels=3)
    if which < 2 / 3:
        return F.solarize(image_CHW, 128)
    return _blur(image_CHW, _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * width)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian cut off at three deviations, or where a side is too short to be mirrored that far."""
    height, width = (2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in image.shape[1:])
    return F.gaussian_blur(image, [width, height], [sigma, sigma])


def color_jitter(image_CHW: Tensor, numbers: np.ndarray, strength: float) -> Tensor:
    """Brightness, contrast and saturation times a factor within [1 - strength, 1 + strength] each, in a drawn order.

    Shapes: (3, H, W) uint8, (JITTER_DRAWS,) -> (3, H, W) uint8.
    Source: torchvision.transforms.v2.ColorJitter without hue, with `numbers` in the place of its generator.
    """
    which, *draws = numbers.tolist()
    lowest, highest = max(0.0, 1 - strength), 1 + strength
    for place in _ORDERS[int(which * len(_ORDERS))]:
        image_CHW = _JITTERED[place](image_CHW, lowest + (highest - lowest) * draws[place])
    return image_CHW
