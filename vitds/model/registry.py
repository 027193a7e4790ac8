"""The table of architectures: every model is an entry here, never a subclass. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vitds.errors import ConfigError, did_you_mean


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
    resize: str = "bilinear"  # of position embeddings: bilinear, aligned corners (Google) | bicubic, antialiased (timm)
    norm_eps: float = 1e-6  # of LayerNorm
    positions: str = "learned"  # learned | sincos2d: fixed, by big_vision's formula


# Sources: Ti to H and the hybrids are google-research/vision_transformer, vit_jax/configs/models.py (its "+" is our
# first "-"); g, G and e are google-research/big_vision, models/vit.py, with a class token like timm's.
_TABLE: list[tuple] = [
    # name            width depth heads    mlp patch  resnet
    ("ViT-Ti_16",       192,   12,    3,   768,   16),
    ("ViT-S_16",        384,   12,    6,  1536,   16),
    ("ViT-S_32",        384,   12,    6,  1536,   32),
    ("ViT-B_8",         768,   12,   12,  3072,    8),
    ("ViT-B_16",        768,   12,   12,  3072,   16),
    ("ViT-B_32",        768,   12,   12,  3072,   32),
    ("ViT-L_16",       1024,   24,   16,  4096,   16),
    ("ViT-L_32",       1024,   24,   16,  4096,   32),
    ("ViT-H_14",       1280,   32,   16,  5120,   14),
    ("ViT-g_14",       1408,   40,   16,  6144,   14),
    ("ViT-G_14",       1664,   48,   16,  8192,   14),
    ("ViT-e_14",       1792,   56,   16, 15360,   14),
    ("R-ViT-Ti_16",     192,   12,    3,   768,    8, ()),  # 32 pixels per token, whatever its name says
    ("R26-ViT-S_32",    384,   12,    6,  1536,    1, (2, 2, 2, 2)),
    ("R50-ViT-B_16",    768,   12,   12,  3072,    1, (3, 4, 9)),
    ("R50-ViT-L_32",   1024,   24,   16,  4096,    1, (3, 4, 6, 3)),
]  # fmt: skip
MODELS: dict[str, ModelSpec] = {row[0]: ModelSpec(*row) for row in _TABLE}

# Fields that change numbers and not shapes, so that most weights files do not tell them.
CONVENTIONS = ("gelu", "resize", "norm_eps", "positions")
# What `:timm` after a name stands for: weights that were trained by timm, DeiT, MAE or DINOv2.
_TIMM = "gelu=erf,resize=bicubic"


def get_spec(name: str) -> ModelSpec:
    """The architecture called `name`.

    It is one of `MODELS`, or one with modifiers, `ViT-B_16:gelu=erf,resize=bicubic` (`ViT-B_16:timm` for short), or a
    string `custom:width=64,depth=4,heads=4,mlp=128,patch=4`. Modifiers are `registers`, `pooling` (token, gap, map),
    `layer_scale`, `qk_norm` (true, false), `channels`, `gelu` (tanh, erf), `resize` (bilinear, bicubic), `norm_eps` and
    `positions` (learned, sincos2d). A custom string takes them too, and `resnet` (units per stage as 3x4x9; 0 is the
    root alone) and `resnet_width`.
    `get_spec(spec.name) == spec` holds for every spec that this returns.

    Raises: ConfigError for a name, key or value that is not valid.
    """
    base, stated = split_name(name)
    if base == "custom":
        return _custom_spec(name, stated)
    canonical = base.replace("+", "-", 1)  # Google writes R50+ViT-B_16
    if canonical not in MODELS:
        raise ConfigError(f'unknown model "{base}"', fix=did_you_mean(_googles_name(base), MODELS))
    if fixed := [key for key, (field, _, _) in _CUSTOM_KEYS.items() if key in _FIXED_KEYS and field in stated]:
        raise ConfigError(
            f'"{fixed[0]}" of {canonical} is fixed, in model "{name}"',
            fix="state all sizes: custom:width=...,depth=...",
        )
    return _sound(named(replace(MODELS[canonical], **stated))) if stated else MODELS[canonical]


_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g", "gigantic": "G"}
_ELSEWHERE = rf"(?:^|/)(?:vit|deit3?)[-_]({'|'.join(_SIZES)}|[bslh])[-_](?:patch)?(\d+)"


def _googles_name(name: str) -> str:
    """The name of a model that timm, Hugging Face or torchvision call `name`, as vit_base_patch16_224; else `name`."""
    found = re.search(_ELSEWHERE, name.lower())
    return f"ViT-{_SIZES.get(found[1], found[1].upper())}_{found[2]}" if found else name


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """The part of a model name before its modifiers ("ViT-B_16", "custom", "auto"), and the fields that they state.

    Raises: ConfigError for a modifier that is not valid.
    """
    base, colon, modifiers = name.partition(":")
    return base, _fields(name, _TIMM if modifiers == "timm" else modifiers) if colon else {}


def named(spec: ModelSpec) -> ModelSpec:
    """The same architecture under its canonical name: the registry's, with modifiers, else a custom string."""
    for known in MODELS.values():
        if all(getattr(spec, field) == getattr(known, field) for field in _fixed_fields()):
            return replace(spec, name=_name_with_modifiers(known.name, spec, known, set(_CUSTOM_KEYS) - _FIXED_KEYS))
    defaults = ModelSpec("", 0, 0, 0, 0, 0)
    return replace(spec, name=_name_with_modifiers("custom", spec, defaults, set(_CUSTOM_KEYS)))


def pixels_per_token(spec: ModelSpec) -> int:
    """Side, in image pixels, of the square that becomes one token."""
    if spec.resnet is None:
        return spec.patch_size
    # The root halves the map twice (convolution, max-pool), every stage after the first halves it once more.
    return spec.patch_size * 4 * 2 ** max(len(spec.resnet) - 1, 0)


def grid_size(spec: ModelSpec, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patch grid for an image of (height, width) pixels.

    Raises: ConfigError when a side is no positive multiple of `pixels_per_token(spec)`.
    """
    pixels = pixels_per_token(spec)
    for side in image_size:
        if side < pixels or side % pixels:
            below = side // pixels * pixels
            valid = " or ".join(str(size) for size in (below, below + pixels) if size > 0)
            raise ConfigError(
                f"image size {image_size[0]}x{image_size[1]} does not fit {spec.name}: "
                f"{side} is not divisible by its {pixels} pixels per token",
                fix=f"nearest valid: {valid} instead of {side}",
            )
    return image_size[0] // pixels, image_size[1] // pixels


def num_tokens(spec: ModelSpec, image_size: tuple[int, int]) -> int:
    """Tokens of one image in a block: its patches, and the class token and registers where there are any."""
    grid_h, grid_w = grid_size(spec, image_size)
    return grid_h * grid_w + (spec.pooling == "token") + spec.registers


def drop_path_rates(depth: int, rate: float) -> list[float]:
    """The rate of each block: 0 for the first, rising linearly to `rate` for the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def draws_subset(rate: float) -> bool:
    """Whether a block with this rate of drop-path computes a subset, where the run does so: above 0.1, as in DINOv2."""
    return round(rate, 6) > 0.1


def num_kept_patches(num_patches: int, token_drop: float) -> int:
    """How many patch tokens of an image training keeps; at least one."""
    return max(round(num_patches * (1 - token_drop)), 1)


def num_parameters(
    spec: ModelSpec, image_size: int | tuple[int, int], num_classes: int, pre_logits: int | None = None
) -> int:
    """The exact number of parameters, by arithmetic alone.

    Units: image_size in pixels, one number for a square; pre_logits is the width of that layer, None for none.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    grid_h, grid_w = grid_size(spec, size)
    width, has_class_token = spec.width, spec.pooling == "token"
    norm = 2 * width
    attention = 4 * (width * width + width)
    mlp = 2 * width * spec.mlp + spec.mlp + width

    stem, channels = _stem_parameters(spec)
    patch_embed = channels * spec.patch_size**2 * width + width
    tokens = (grid_h * grid_w + 2 * has_class_token + spec.registers) * width  # positions, class token, registers
    block = 2 * norm + attention + mlp
    if spec.layer_scale is not None:
        block += 2 * width
    if spec.qk_norm:
        block += 2 * 2 * (width // spec.heads)
    pool = width + attention + norm + mlp if spec.pooling == "map" else 0
    features = pre_logits or width
    head = features * num_classes + num_classes + (width * features + features if pre_logits else 0)
    return stem + patch_embed + tokens + spec.depth * block + norm + pool + head


def _stem_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameters of the ResNet stem, and the channels of the map that is cut into patches."""
    if spec.resnet is None:
        return 0, spec.in_channels
    channels = spec.resnet_width
    total = 7 * 7 * spec.in_channels * channels + 2 * channels
    for stage, units in enumerate(spec.resnet):
        inner = spec.resnet_width * 2**stage
        outer = 4 * inner
        for unit in range(units):
            total += channels * inner + 9 * inner * inner + inner * outer + 2 * (inner + inner + outer)
            if unit == 0:
                total += channels * outer + 2 * outer  # the projection on the residual road
            channels = outer
    return total, channels


def _positive_int(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError
    return number


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _positive_float(text: str) -> float:
    if (number := _finite(text)) <= 0:
        raise ValueError
    return number


def _stages(text: str) -> tuple[int, ...]:
    return () if text == "0" else tuple(_positive_int(units) for units in text.split("x"))


def _one_of(**choices: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in choices:
            raise ValueError
        return choices[text]

    return parse


# key of a custom string: (field of ModelSpec, how its text is read, what a valid value is)
_CUSTOM_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "width": ("width", _positive_int, "a positive integer"),
    "depth": ("depth", _positive_int, "a positive integer"),
    "heads": ("heads", _positive_int, "a positive integer"),
    "mlp": ("mlp", _positive_int, "a positive integer"),
    "patch": ("patch_size", _positive_int, "a positive integer"),
    "resnet": ("resnet", _stages, "units per stage, as 3x4x9, or 0 for the root alone"),
    "resnet_width": ("resnet_width", _positive_int, "a positive integer"),
    "pooling": ("pooling", _one_of(token="token", gap="gap", map="map"), "token, gap or map"),
    "registers": ("registers", _count, "an integer, 0 or more"),
    "layer_scale": ("layer_scale", _finite, "a number"),
    "qk_norm": ("qk_norm", _one_of(true=True, false=False), "true or false"),
    "channels": ("in_channels", _positive_int, "a positive integer"),
    "gelu": ("gelu", _one_of(tanh="tanh", erf="erf"), "tanh or erf"),
    "resize": ("resize", _one_of(bilinear="bilinear", bicubic="bicubic"), "bilinear or bicubic"),
    "norm_eps": ("norm_eps", _positive_float, "a positive number"),
    "positions": ("positions", _one_of(learned="learned", sincos2d="sincos2d"), "learned or sincos2d"),
}
_REQUIRED = ("width", "depth", "heads", "mlp", "patch")
_FIXED_KEYS = {*_REQUIRED, "resnet", "resnet_width"}  # what a name of the table stands for


def _fixed_fields() -> list[str]:
    return [_CUSTOM_KEYS[key][0] for key in _FIXED_KEYS]


def _fields(name: str, text: str) -> dict[str, Any]:
    """The fields that `key=value,...` states, in the model name `name`."""
    fields: dict[str, Any] = {}
    for entry in text.split(","):
        key, _, value = (part.strip() for part in entry.partition("="))
        if key not in _CUSTOM_KEYS:
            raise ConfigError(f'unknown key "{key}" in model "{name}"', fix=did_you_mean(key, _CUSTOM_KEYS))
        field, parse, valid = _CUSTOM_KEYS[key]
        if field in fields:
            raise ConfigError(f'key "{key}" appears twice in model "{name}"')
        try:
            fields[field] = parse(value)
        except ValueError:
            raise ConfigError(f'{key}="{value}" in model "{name}" is not valid', fix=f"{key} is {valid}") from None
    return fields


def _custom_spec(name: str, stated: dict[str, Any]) -> ModelSpec:
    """The spec of a custom string; its name becomes canonical (fixed order, defaults left out)."""
    if missing := [key for key in _REQUIRED if _CUSTOM_KEYS[key][0] not in stated]:
        example = "custom:width=64,depth=4,heads=4,mlp=128,patch=4"
        raise ConfigError(f'model "{name}" lacks {", ".join(missing)}', fix=f"a whole one: {example}")
    spec = ModelSpec(name="", **stated)
    if spec.width % spec.heads:
        raise ConfigError(
            f'width {spec.width} is not divisible by {spec.heads} heads in model "{name}"',
            fix=f"widths that fit: {max(spec.width // spec.heads, 1) * spec.heads} and multiples of {spec.heads}",
        )
    if spec.resnet is not None and spec.resnet_width % 32:
        raise ConfigError(
            f'resnet_width {spec.resnet_width} in model "{name}" is not divisible by 32',
            fix="the stem's group normalisation has 32 groups: 32, 64, 96, ...",
        )
    return _sound(named(spec))


def _sound(spec: ModelSpec) -> ModelSpec:
    """Raises: ConfigError for modifiers that contradict the sizes."""
    if spec.positions == "sincos2d" and spec.width % 4:
        raise ConfigError(f"sincos2d positions of width {spec.width}", fix="the formula gives multiples of 4")
    return spec


def _name_with_modifiers(base: str, spec: ModelSpec, defaults: ModelSpec, keys: set[str]) -> str:
    """`base`, and after a colon every one of `keys` whose value is not the default."""
    entries = []
    for key, (field, _, _) in _CUSTOM_KEYS.items():
        value = getattr(spec, field)
        if key not in keys or value == getattr(defaults, field):
            continue
        if field == "resnet":
            value = "x".join(map(str, value)) or "0"
        entries.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return f"{base}:{','.join(entries)}" if entries else base
