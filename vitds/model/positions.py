"""Position embeddings that a formula gives. No torch: an export computes them too."""

from __future__ import annotations

import numpy as np


def sincos2d_positions(grid_hw: tuple[int, int], width: int, has_class_token: bool) -> np.ndarray:
    """Sines and cosines of each patch's column and row; a class token has no position, its row is zero.

    Shapes: (1, grid_h*grid_w, D), with a class token (1, 1 + grid_h*grid_w, D); D is a multiple of 4.
    Source: google-research/big_vision, models/vit.py, posemb_sincos_2d (after MoCo v3).
    """
    y, x = np.mgrid[: grid_hw[0], : grid_hw[1]].reshape(2, -1, 1)
    omega = 1 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    patches = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return np.pad(patches, ((int(has_class_token), 0), (0, 0)))[np.newaxis].astype(np.float32)
