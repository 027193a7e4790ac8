"""The names that Hugging Face gives to a ViT's parameters (ViTForImageClassification, ViTModel). No torch.

What arrays do not tell (heads, GELU, epsilon, class names, preprocessing) stands in config.json and
preprocessor_config.json beside them. Off its native resolution transformers resizes positions by bicubic interpolation
without antialiasing; here it is with antialiasing, as in timm.

Source: huggingface/transformers, models/vit; 5.x names modules otherwise in memory (`layers.0.attention.q_proj`) than
on the disk (`encoder.layer.0.attention.attention.query`), so that both are read.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

from vitds.errors import WeightError
from vitds.layouts.array import ForeignArray, Shapes, vote
from vitds.layouts.found import Found, one_or_three, usual_heads
from vitds.layouts.own import parameters
from vitds.model.registry import ModelSpec

ANCHOR = re.compile(r"(.*?)(?:vit\.)?embeddings\.patch_embeddings\.projection\.(?:weight|bias)")
_IGNORED = re.compile(r"(vit\.)?(pooler\..*|embeddings\.mask_token)|decoder\..*")
_ACTIVATIONS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_EPSILON, _HEADS = 1e-12, 12  # of a ViTConfig that does not say them
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_ON_DISK = {
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_IN_MEMORY = _ON_DISK | {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def read_layout(
    shapes: Shapes, config: Mapping[str, Any] | None = None, preprocessor: Mapping[str, Any] | None = None
) -> Found:
    """The model that the arrays tell, and all arrays of it; `config` and `preprocessor` are the JSON files beside them.

    Raises: WeightError for an activation that this model does not have.
    """
    stated = config or {}
    is_in_memory = any(re.search(r"(^|\.)layers\.\d+\.attention\.q_proj\.", key) for key in shapes)
    blocks, names = ("layers", _IN_MEMORY) if is_in_memory else ("encoder.layer", _ON_DISK)
    root = "vit." if any(key.startswith("vit.") for key in shapes) else ""
    spec, unknown = _infer(shapes, stated, root + re.escape(blocks), names)

    num_classes = vote(shapes, r"classifier\.(weight|bias)", 0) or 0
    num_positions = vote(shapes, r".*embeddings\.position_embeddings", -2) or 2
    grid = _grid(spec, num_positions - 1, stated.get("image_size"))
    arrays = []
    for name, shape in parameters(spec, 1 + grid[0] * grid[1], num_classes).items():
        module, _, kind = name.rpartition(".") if "." in name else (name, "", "")
        if module == "head":
            arrays.append(ForeignArray(f"classifier.{kind}", shape, name))
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            theirs = [f"{root}{blocks}.{match[1]}.{part}.{kind}" for part in names[match[2]]]
            arrays += _block_arrays(shapes, theirs, shape, name)
        else:
            key = ".".join(part for part in (root + _OUTSIDE_BLOCKS[module], kind) if part)
            arrays.append(ForeignArray(key, shape, name))

    ignored = frozenset(key for key in shapes if _IGNORED.fullmatch(key))
    notes = ["a pooler is left out: it is no part of the features"] if any("pooler." in key for key in ignored) else []
    data, data_notes = (
        preprocessing(preprocessor) if preprocessor else (None, ("there is no preprocessor_config.json",))
    )
    return Found(
        spec,
        (grid[0] * spec.patch_size, grid[1] * spec.patch_size),
        num_classes,
        None,
        tuple(arrays),
        unknown,
        ignored,
        (*notes, *data_notes),
        assumed=("heads", "gelu", "norm_eps") if config is None else (),
        classes=_classes(stated.get("id2label"), num_classes),
        data=data,
        loss="bce" if stated.get("problem_type") == "multi_label_classification" else "softmax",
    )


def preprocessing(stated: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The entries of a run's data section that a preprocessor_config.json states, and what they cannot express."""
    notes = []
    data: dict[str, Any] = {"mean": 0.0, "std": 1.0}
    if stated.get("do_normalize", True):
        data = {key: one_or_three([float(x) for x in stated.get(f"image_{key}", [0.5])]) for key in ("mean", "std")}
    if not (stated.get("do_rescale", True) and math.isclose(stated.get("rescale_factor", 1 / 255), 1 / 255)):
        notes.append("they were evaluated with pixels in another range than [0, 1], before mean and std")
    if stated.get("resample", 2) in _INTERPOLATIONS:
        data["interpolation"] = _INTERPOLATIONS[stated.get("resample", 2)]
    else:
        notes.append(f"they were evaluated with PIL's filter {stated['resample']}, which this reader of images lacks")
    size, crop = stated.get("size"), stated.get("crop_size")
    if stated.get("do_center_crop") and isinstance(size, Mapping) and "shortest_edge" in size and crop:
        height = crop["height"] if isinstance(crop, Mapping) else crop
        data |= {"eval_crop": "center", "crop_fraction": height / size["shortest_edge"]}
    elif stated.get("crop_pct"):
        data |= {"eval_crop": "center", "crop_fraction": float(stated["crop_pct"])}
    else:
        data["eval_crop"] = "squash"
    return data, tuple(notes)


def _infer(
    shapes: Shapes, config: Mapping[str, Any], blocks: str, names: Mapping[str, tuple[str, ...]]
) -> tuple[ModelSpec, list[str]]:
    """Read the architecture off the shapes and the config, and list what neither gives."""
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise WeightError(
            f'not supported: hidden_act "{activation}" in config.json', fix=f"known: {', '.join(_ACTIVATIONS)}"
        )
    block = rf"{blocks}\.(\d+)\."
    numbers = [int(match[1]) for key in shapes if (match := re.match(block, key))]
    patches = r".*embeddings\.patch_embeddings\.projection\.weight"
    votes = {
        "width": vote(shapes, rf"{block}layernorm_(before|after)\.(weight|bias)", -1),
        "mlp": vote(shapes, rf"{block}{re.escape(names['mlp.fc1'][0])}\.(weight|bias)", 0),
        "patch_size": vote(shapes, patches, -1),
        "in_channels": vote(shapes, patches, -3),
    }
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    spec = ModelSpec(
        name="",
        depth=max(numbers, default=-1) + 1,
        heads=operator.index(config.get("num_attention_heads", _HEADS) if config else usual_heads(sizes["width"])),
        gelu=_ACTIVATIONS[activation],
        resize="bicubic",
        norm_eps=float(config.get("layer_norm_eps", _EPSILON)),
        **sizes,
    )
    return spec, [quantity for quantity, size in votes.items() if not size]


def _grid(spec: ModelSpec, num_patches: int, image_size: Any) -> tuple[int, int]:
    """Rows and columns of the patch grid: the config's when they fit the positions, else a square."""
    if image_size:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height // spec.patch_size * (width // spec.patch_size) == num_patches:
            return height // spec.patch_size, width // spec.patch_size
    side = max(math.isqrt(num_patches), 1)
    return side, side


def _block_arrays(shapes: Shapes, keys: list[str], shape: tuple[int, ...], name: str) -> list[ForeignArray]:
    """The arrays of one parameter of a block: one, or the three of query, key and value."""
    if len(keys) == 1:
        return [ForeignArray(keys[0], shape, name)]
    if name.endswith("qkv.bias") and not any(re.search(r"\.(query|q_proj)\.bias$", key) for key in shapes):
        return [ForeignArray("", shape, name, move="zeros")]
    return [ForeignArray(key, (shape[0] // 3, *shape[1:]), name, part) for part, key in enumerate(keys)]


def _classes(id2label: Any, num_classes: int) -> list[str] | None:
    """Class names by label, unless one is missing or they are the placeholders LABEL_0, LABEL_1, ..."""
    if not isinstance(id2label, Mapping) or len(id2label) != num_classes or not num_classes:
        return None
    names = [name for label in range(num_classes) if isinstance(name := id2label.get(str(label)), str)]
    if len(names) < num_classes or names == [f"LABEL_{label}" for label in range(num_classes)]:
        return None
    return names
