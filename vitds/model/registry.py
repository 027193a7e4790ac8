"""The table of architectures: every model is an entry here, never a subclass. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """All that fixes a model's parameters apart from image size and classes.

    Units: patch_size in pixels of the (stem's) input map; widths in channels.
    """

    name: str
    width: int
    depth: int
    heads: int
    mlp: int
    patch_size: int
    resnet: tuple[int, ...] | None = None  # units per stage of the ResNet stem; () is the root alone, None is no stem
    resnet_width: int = 64  # channels of the stem's root
    pooling: str = "token"  # token | gap | map
    registers: int = 0
    layer_scale: float | None = None  # initial value, None: no LayerScale
    qk_norm: bool = False
    in_channels: int = 3
    gelu: str = "tanh"  # tanh (Google) | erf (timm)
