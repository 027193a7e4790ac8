"""Weights from a file or a checkpoint, and fitted to another image size, another number of classes, or a new head."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vitds.errors import ConfigError, WeightError
from vitds.model.positions import sincos2d_positions
from vitds.model.registry import grid_size
from vitds.weights.open import NOT_FINITE, open_weights
from vitds.weights_header import WeightsHeader


@dataclass(frozen=True)
class Weights:
    """fp32 parameters by our names, and what they are of."""

    state_dict: dict[str, Tensor]
    header: WeightsHeader


def load_weights(path: str | Path, model: str | None = None, *, ema: bool = False) -> Weights:
    """Load a weights file in a layout that is known, or a checkpoint directory of any ZeRO stage and world size.

    `ema` takes the average that a checkpoint's run kept.

    Raises: WeightError or CheckpointError when it is missing, damaged, unsafe, or not of `model`; WeightError when an
    array is not finite, because a model of it gives nothing else.
    """
    opened = open_weights(path, model, ema=ema)
    state_dict = {}
    for name, array in opened.arrays.items():
        state_dict[name] = torch.from_numpy(array)
        if not torch.isfinite(state_dict[name]).all():
            raise WeightError(f"{name} {NOT_FINITE}", where=str(path))
    return Weights(state_dict, opened.header)


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels, from one number for a square or from the pair.

    Raises: ConfigError for anything else.
    """
    try:
        sides = tuple(image_size) if isinstance(image_size, Iterable) else (image_size, image_size)
        height, width = map(operator.index, sides)
    except (TypeError, ValueError):
        what = f"image_size is {image_size!r}, expected pixels of a square or (height, width), as whole numbers"
        raise ConfigError(what) from None
    return height, width


def check_pre_logits(pre_logits: int | bool | None) -> None:
    """Raises: ConfigError for what is neither a width, nor False (none), nor None (that of the weights)."""
    is_width = type(pre_logits) is int and pre_logits > 0
    if not (is_width or pre_logits is None or pre_logits is False):
        raise ConfigError(
            f"pre_logits is {pre_logits!r}, expected the width of that layer",
            fix="as pre_logits=768; False is for none, None for that of the weights",
        )


def fit(
    weights: Weights,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    reset_head: bool = False,
    pre_logits: int | bool | None = None,
) -> Weights:
    """The same weights for another image size and head; None keeps what they have.

    The head stays, with its pre_logits, when the number of classes does and `reset_head` is False. Otherwise both go
    and the new head is zero (with 0 classes there is none); an asked-for new pre_logits layer (its width) is left to
    the model's initial values. `pre_logits=False` drops that layer alone.

    Raises: ConfigError when the image size does not fit the patches or pre_logits is no width, WeightError when the
    head cannot be kept as asked.
    """
    check_pre_logits(pre_logits)
    header, state_dict = weights.header, dict(weights.state_dict)
    spec = header.spec
    size = height_width(header.image_size if image_size is None else image_size)
    state_dict["pos_embed"] = positions_at(size, state_dict["pos_embed"], header)

    width_kept = header.pre_logits
    if reset_head or num_classes not in (None, header.num_classes):
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
        num_classes = header.num_classes if num_classes is None else num_classes
        width_kept = (pre_logits or None) if num_classes else None
        if num_classes:
            state_dict["head.weight"] = torch.zeros(num_classes, width_kept or spec.width)
            state_dict["head.bias"] = torch.zeros(num_classes)
    elif pre_logits is False and header.pre_logits is not None:
        if header.pre_logits != spec.width:
            raise WeightError(
                f"the head reads {header.pre_logits} pre_logits, so it does not fit features of width {spec.width}",
                fix="keep pre_logits, or reset the head",
            )
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.pre_logits.")}
        width_kept = None
    elif pre_logits and pre_logits != header.pre_logits:
        raise WeightError(
            f"pre_logits of width {pre_logits} asked for, the weights have {header.pre_logits or 'none'}",
            fix="leave pre_logits out to keep theirs, or reset the head to start a new one",
        )
    kept = header.num_classes if num_classes is None else num_classes
    classes = header.classes if kept == header.num_classes and not reset_head else None
    fitted = replace(header, image_size=size, num_classes=kept, pre_logits=width_kept, classes=classes)
    return Weights(state_dict, fitted)


def positions_at(image_size: tuple[int, int], posembed_1TD: Tensor, header: WeightsHeader) -> Tensor:
    """The position embeddings of weights for another image size: resampled, or computed when a formula gives them.

    Raises: ConfigError when the size does not fit the patches.
    """
    spec = header.spec
    grid_hw, has_class_token = grid_size(spec, image_size), spec.pooling == "token"
    if spec.positions == "sincos2d":
        return torch.from_numpy(sincos2d_positions(grid_hw, spec.width, has_class_token))
    from_grid_hw = grid_size(spec, header.image_size)
    return resize_posembed(posembed_1TD, grid_hw, from_grid_hw, has_class_token, method=spec.resize)


def resize_posembed(
    posembed_1TD: Tensor,
    grid_hw: tuple[int, int],
    from_grid_hw: tuple[int, int] | None = None,
    has_class_token: bool = True,
    method: str = "bilinear",
) -> Tensor:
    """Resample position embeddings to another patch grid, keeping the class token's row.

    `method` is "bilinear" with aligned corners, Google's, or "bicubic" with antialiasing, timm's.

    Shapes: (1, 1 + gh*gw, D) -> (1, 1 + grid_h*grid_w, D), without the ones when there is no class token.
    Units:  grids are in patches, not pixels.
    Raises: WeightError when the positions are no square and no grid was given.
    Source: google-research/vision_transformer checkpoint.py (zoom, order 1) = bilinear with aligned corners; timm
    layers/pos_embed.py, resample_abs_pos_embed.
    """
    num_patches = posembed_1TD.shape[1] - has_class_token
    side = math.isqrt(num_patches)
    gh, gw = from_grid_hw or (side, side)
    if gh * gw != num_patches:
        raise WeightError(f"{num_patches} position embeddings are no {gh} x {gw} grid")
    if (gh, gw) == grid_hw:
        return posembed_1TD
    first, patches = posembed_1TD[:, :has_class_token], posembed_1TD[:, has_class_token:]
    map_1DHW = patches.reshape(1, gh, gw, -1).permute(0, 3, 1, 2)
    if method == "bicubic":
        resized = F.interpolate(map_1DHW, size=grid_hw, mode="bicubic", antialias=True)
    else:
        resized = F.interpolate(map_1DHW, size=grid_hw, mode="bilinear", align_corners=True)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)
