"""The names of jeonsworld/ViT-pytorch, whose runs write NAME_checkpoint.bin. No torch.

It loads Google's files, so GELU apart (erf) it computes what they say, with their resizing of positions. Its hybrid
does not: other paddings, a max-pool without any, and gn_proj with one channel a group. The weights of a hybrid are read
as Google's, whose function they were made for.

Source: jeonsworld/ViT-pytorch, models/modeling.py and modeling_resnet.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from vitds.layouts.array import ForeignArray, Shapes, vote
from vitds.layouts.found import Found, usual_heads
from vitds.layouts.own import parameters
from vitds.model.registry import ModelSpec, pixels_per_token

ANCHOR = re.compile(r"(.*?)transformer\.embeddings\.patch_embeddings\.(?:weight|bias)")
_EMBEDDINGS, _LAYERS = "transformer.embeddings", "transformer.encoder.layer"
_STEM = f"{_EMBEDDINGS}.hybrid_model"
_RENAMES = [
    (r"^patch_embed\.", f"{_EMBEDDINGS}.patch_embeddings."),
    (r"^pos_embed$", f"{_EMBEDDINGS}.position_embeddings"),
    (r"^cls_token$", f"{_EMBEDDINGS}.cls_token"),
    (r"^norm\.", "transformer.encoder.encoder_norm."),
    (r"^blocks\.(\d+)\.norm1\.", rf"{_LAYERS}.\1.attention_norm."),
    (r"^blocks\.(\d+)\.norm2\.", rf"{_LAYERS}.\1.ffn_norm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", rf"{_LAYERS}.\1.attn.out."),
    (r"^blocks\.(\d+)\.mlp\.", rf"{_LAYERS}.\1.ffn."),
    (r"^blocks\.(\d+)\.attn\.", rf"{_LAYERS}.\1.attn."),
    (r"^stem\.conv_root\.", f"{_STEM}.root.conv."),
    (r"^stem\.gn_root\.", f"{_STEM}.root.gn."),
    (r"^stem\.(block\d+\.unit\d+)\.conv_proj\.", rf"{_STEM}.body.\1.downsample."),
    (r"^stem\.", f"{_STEM}.body."),
]


def read_layout(shapes: Shapes) -> Found:
    """The model that the arrays tell, and all arrays of it."""
    spec, unknown = _infer(shapes)
    num_classes = vote(shapes, r"head\.(weight|bias)", 0) or 0
    grid = max(math.isqrt((vote(shapes, rf"{_EMBEDDINGS}\.position_embeddings", -2) or 2) - 1), 1)
    arrays = []
    for name, shape in parameters(spec, 1 + grid * grid, num_classes).items():
        key = name
        for ours, theirs in _RENAMES:
            key, was_renamed = re.subn(ours, theirs, key)
            if was_renamed:
                break
        if ".qkv." in name:
            third = (shape[0] // 3, *shape[1:])
            keys = [key.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
            arrays += [ForeignArray(key, third, name, part) for part, key in enumerate(keys)]
        else:
            arrays.append(ForeignArray(key, shape, name))
    notes = []
    if spec.resnet is not None:
        notes.append(
            "ViT-pytorch computes another function of a hybrid's weights (paddings, gn_proj): its logits differ by up "
            "to 0.6 from these, which are Google's"
        )
    side = grid * pixels_per_token(spec)
    data = {"mean": 0.5, "std": 0.5, "interpolation": "bilinear", "eval_crop": "squash"}
    return Found(
        spec, (side, side), num_classes, None, tuple(arrays), unknown, notes=tuple(notes), assumed=("heads",), data=data
    )


def _infer(shapes: Shapes) -> tuple[ModelSpec, list[str]]:
    """Read the architecture off the shapes, and list what they do not tell."""
    layer = rf"{re.escape(_LAYERS)}\.(\d+)\."
    numbers = [int(match[1]) for key in shapes if (match := re.match(layer, key))]
    units: Counter[int] = Counter()
    for key in shapes:
        if match := re.match(rf"{re.escape(_STEM)}\.body\.block(\d)\.unit(\d+)\.", key):
            units[int(match[1])] = max(units[int(match[1])], int(match[2]))
    is_hybrid = any(key.startswith(f"{_STEM}.") for key in shapes)
    patches = re.escape(f"{_EMBEDDINGS}.patch_embeddings.weight")
    root = re.escape(f"{_STEM}.root.conv.weight")
    votes = {
        "width": vote(shapes, rf"{layer}(attention|ffn)_norm\.(weight|bias)", -1),
        "mlp": vote(shapes, rf"{layer}ffn\.fc1\.(weight|bias)", 0),
        "patch_size": vote(shapes, patches, -1),
        "in_channels": vote(shapes, root if is_hybrid else patches, -3),
    }
    if is_hybrid:
        votes["resnet_width"] = vote(shapes, root, 0)
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    if is_hybrid:
        sizes["resnet"] = tuple(units[stage] for stage in range(1, max(units, default=0) + 1))
    heads = usual_heads(sizes["width"])
    spec = ModelSpec(name="", depth=max(numbers, default=-1) + 1, heads=heads, gelu="erf", **sizes)
    return spec, [quantity for quantity, size in votes.items() if not size]
