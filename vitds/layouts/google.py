"""Google's .npz layout: which array is which parameter, and what model the shapes tell. No torch.

    gs://vit_models/{imagenet21k,imagenet21k+imagenet2012,augreg}/*.npz
    W width, F mlp width, N heads, K head width, P patch size, C classes or channels, T tokens

`google_layout` is the one table of that format: the conversion to our parameter names, and back, is read off it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vitds.errors import WeightError
from vitds.layouts.array import ForeignArray, Shapes, vote
from vitds.layouts.found import Found
from vitds.model.registry import ModelSpec, pixels_per_token

_POSITIONS = "Transformer/posembed_input/pos_embedding"


def recognises(shapes: Shapes) -> bool:
    """True for a file that names arrays as Google does, with slashes."""
    return any("/" in key for key in shapes)


def read_layout(shapes: Shapes) -> Found:
    """The model that the shapes tell, and the arrays that such a file holds."""
    spec, unknown = _infer(shapes)
    num_classes = vote(shapes, r"head/(kernel|bias)", -1) or 0
    pre_logits = vote(shapes, r"pre_logits/(kernel|bias)", -1)
    grid = max(math.isqrt(max(vote(shapes, re.escape(_POSITIONS), -2) or 0, 1) - 1), 1)
    arrays = tuple(google_layout(spec, 1 + grid * grid, num_classes, pre_logits))
    side = grid * pixels_per_token(spec)
    return Found(spec, (side, side), num_classes, pre_logits, arrays, unknown)


def google_layout(
    spec: ModelSpec, num_positions: int, num_classes: int, pre_logits: int | None
) -> Iterator[ForeignArray]:
    """Every array of Google's file for this model; GroupNorm vectors in their published shape (1, 1, 1, C).

    Raises: WeightError for a model with parts that the layout has no place for.
    """
    extras = (spec.pooling != "token", spec.registers, spec.layer_scale is not None, spec.qk_norm)
    if any(extras):
        raise WeightError(f"Google's layout has no place for all of {spec.name}", fix="it holds class-token ViTs only")
    width, mlp, heads, head_width = spec.width, spec.mlp, spec.heads, spec.width // spec.heads
    channels = spec.in_channels
    if spec.resnet is not None:
        yield from _stem_layout(spec)
        channels = spec.resnet_width * (4 * 2 ** (len(spec.resnet) - 1) if spec.resnet else 1)

    patch = spec.patch_size
    yield ForeignArray("embedding/kernel", (patch, patch, channels, width), "patch_embed.weight", move="conv")
    yield ForeignArray("embedding/bias", (width,), "patch_embed.bias")
    yield ForeignArray("cls", (1, 1, width), "cls_token")
    yield ForeignArray(_POSITIONS, (1, num_positions, width), "pos_embed")
    for i in range(spec.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        yield from _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1", (width,))
        for part, projection in enumerate(("query", "key", "value")):
            kernel, bias = f"{attention}/{projection}/kernel", f"{attention}/{projection}/bias"
            yield ForeignArray(kernel, (width, heads, head_width), f"{ours}.attn.qkv.weight", part, "query")
            yield ForeignArray(bias, (heads, head_width), f"{ours}.attn.qkv.bias", part, "flat")
        out = (heads, head_width, width)
        yield ForeignArray(f"{attention}/out/kernel", out, f"{ours}.attn.proj.weight", move="out")
        yield ForeignArray(f"{attention}/out/bias", (width,), f"{ours}.attn.proj.bias")
        yield from _norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2", (width,))
        yield from _dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1", width, mlp)
        yield from _dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2", mlp, width)
    yield from _norm("Transformer/encoder_norm", "norm", (width,))
    if pre_logits is not None:
        yield from _dense("pre_logits", "head.pre_logits", width, pre_logits)
    yield from _dense("head", "head", pre_logits or width, num_classes)


def _stem_layout(spec: ModelSpec) -> Iterator[ForeignArray]:
    root = spec.resnet_width
    yield ForeignArray("conv_root/kernel", (7, 7, spec.in_channels, root), "stem.conv_root.weight", move="conv")
    yield from _norm("gn_root", "stem.gn_root", (1, 1, 1, root))
    channels = root
    for block, units in enumerate(spec.resnet or (), start=1):
        inner = root * 2 ** (block - 1)
        for unit in range(1, units + 1):
            convolutions = [("1", 1, channels, inner), ("2", 3, inner, inner), ("3", 1, inner, 4 * inner)]
            if unit == 1:
                convolutions.append(("_proj", 1, channels, 4 * inner))
            theirs, ours = f"block{block}/unit{unit}", f"stem.block{block}.unit{unit}"
            for suffix, size, fan_in, fan_out in convolutions:
                shape = (size, size, fan_in, fan_out)
                yield ForeignArray(f"{theirs}/conv{suffix}/kernel", shape, f"{ours}.conv{suffix}.weight", move="conv")
                yield from _norm(f"{theirs}/gn{suffix}", f"{ours}.gn{suffix}", (1, 1, 1, fan_out))
            channels = 4 * inner


def _norm(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[ForeignArray]:
    yield ForeignArray(f"{theirs}/scale", shape, f"{ours}.weight", move="flat")
    yield ForeignArray(f"{theirs}/bias", shape, f"{ours}.bias", move="flat")


def _dense(theirs: str, ours: str, num_in: int, num_out: int) -> Iterator[ForeignArray]:
    yield ForeignArray(f"{theirs}/kernel", (num_in, num_out), f"{ours}.weight", move="dense")
    yield ForeignArray(f"{theirs}/bias", (num_out,), f"{ours}.bias")


def _infer(shapes: Shapes) -> tuple[ModelSpec, list[str]]:
    """Read the architecture off the shapes, and list what they do not tell.

    Where arrays disagree the majority decides, so that a single wrong one is found by comparing with the result.
    """
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"Transformer/encoderblock_(\d{1,3})/", key))}
    units: Counter[int] = Counter()
    for key in shapes:
        if m := re.match(r"block(\d)/unit(\d{1,2})/", key):
            units[int(m[1])] = max(units[int(m[1])], int(m[2]))
    is_hybrid = bool(units) or "conv_root/kernel" in shapes
    block = r"Transformer/encoderblock_\d+"
    votes = {
        "width": vote(shapes, rf"{block}/LayerNorm_[02]/(scale|bias)", -1),
        "heads": vote(shapes, rf"{block}/MultiHeadDotProductAttention_1/(query|key|value)/(kernel|bias)", -2),
        "mlp": vote(shapes, rf"{block}/MlpBlock_3/Dense_0/(kernel|bias)", -1),
        "patch_size": vote(shapes, "embedding/kernel", -4),
        "in_channels": vote(shapes, "conv_root/kernel" if is_hybrid else "embedding/kernel", -2),
    }
    if is_hybrid:
        votes["resnet_width"] = vote(shapes, r"conv_root/kernel|gn_root/(scale|bias)", -1)
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    if is_hybrid:
        sizes["resnet"] = tuple(units[stage] for stage in range(1, max(units, default=0) + 1))
    unknown = [quantity for quantity, size in votes.items() if not size]
    return ModelSpec(name="", depth=max(blocks, default=-1) + 1, **sizes), unknown
