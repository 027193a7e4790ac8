"""The names that timm gives to a ViT's parameters, and those who follow it: DeiT III, MAE, DINOv2, SigLIP. No torch.

Our own names differ by one word (`patch_embed.weight`), so that every table here is a renaming of ours. What arrays do
not tell (GELU, resizing, heads) is timm's habit, or stands in the config.json of a timm directory.

Source: huggingface/pytorch-image-models, timm/models/{vision_transformer,deit}.py; facebookresearch/{deit,mae,dinov2}.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from vitds.errors import WeightError
from vitds.layouts.array import ForeignArray, Shapes, vote
from vitds.layouts.found import Found, one_or_three, usual_heads
from vitds.layouts.own import parameters
from vitds.model.registry import CONVENTIONS, ModelSpec

ANCHOR = re.compile(r"(.*?)patch_embed(?:\.proj)?\.(?:weight|bias)")
_BLOCK = re.compile(r"blocks\.(?:(\d+)\.)?(\d+)\.(.+)")  # DINOv2's own files may count chunks of blocks first
_IGNORED = re.compile(r"decoder_.*|mask_token")  # MAE's decoder; what MAE and DINOv2 put in the place of hidden patches

# SigLIP 2 has the tanh approximation, and no array tells. Architectures of timm/models/vision_transformer.py.
_TANH = re.compile(r"vit_(so400m_patch16|giantopt_patch16|base_patch32)_siglip.*|vit_large_patch16_siglip(_gap)?_512")
_HEADS = {"vit_base_patch16_gap_224": 16, "test_vit": 2, "test_vit2": 2, "test_vit3": 3, "test_vit4": 3}
_ACTIVATIONS = {None: "erf", "gelu": "erf", "gelu_tanh": "tanh"}
# Arguments of an architecture that arrays tell, or that change training alone.
_TOLD_BY_ARRAYS = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size",
    "strict_img_size", "num_heads", "act_layer", "global_pool", "pool_include_prefix",
}  # fmt: skip
# Others, with the values that are this model.
_NEUTRAL = {
    "pos_embed": ("learn",), "pre_norm": (False,), "final_norm": (True,), "fc_norm": (None, False),
    "proj_bias": (True,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,), "dynamic_img_pad": (False,),
    "norm_layer": (None, "layernorm"), "embed_norm_layer": (None,), "attn_layer": (None, "attn"),
    "mlp_layer": (None,), "block_fn": (None,), "embed_layer": (None,), "use_naflex": (None, False),
}  # fmt: skip


def read_layout(shapes: Shapes, config: Mapping[str, Any] | None = None) -> Found:
    """The model that the arrays tell, and all arrays of it; `config` is the config.json of a timm directory.

    Raises: WeightError for what the config says and this model cannot compute, and for positions that are no grid.
    """
    is_ours = "patch_embed.weight" in shapes and "patch_embed.proj.weight" not in shapes
    arguments = _model_arguments(config or {})
    spec, unknown, assumed = _infer(shapes, config or {}, arguments)
    if is_ours:
        spec = replace(spec, gelu="tanh", resize="bilinear")
    conventions = CONVENTIONS if is_ours else ("gelu", "resize") if config is None else ()
    _check_pooling(spec, arguments)

    num_classes = vote(shapes, r"head\.(weight|bias)", 0) or 0
    pre_logits = vote(shapes, r"pre_logits\.fc\.(weight|bias)|head\.pre_logits\.(weight|bias)", 0)
    num_rows = vote(shapes, "pos_embed", -2) or 1 + (spec.pooling == "token")
    num_prefix, grid = _grid(spec, num_rows, _image_size(config or {}, arguments), arguments)
    num_positions = grid[0] * grid[1] + (spec.pooling == "token")
    renamed = _renaming(shapes, is_ours)
    arrays: list[ForeignArray] = []
    for name, shape in parameters(spec, num_positions, num_classes, pre_logits).items():
        key = renamed(name)
        if name == "pos_embed":
            arrays += _positions(spec, num_rows, num_prefix)
        elif name.endswith("attn.qkv.bias") and not _has_qkv_bias(shapes):
            arrays.append(ForeignArray("", shape, name, move="zeros"))
        else:
            arrays.append(ForeignArray(key, shape, name))

    notes = []
    if num_prefix > 1:
        notes.append(f"{spec.registers} register tokens have positions of their own: they are added to the tokens")
    data, data_notes = preprocessing(config) if config else (None, ())
    if config is None and not is_ours:
        data_notes = _no_preprocessing(spec)
    if config is None and "blocks.0.gamma_1" in shapes:
        notes.append("read as DeiT III: timm's rope_ape ViTs, which are not supported, have the same arrays")
    if config is None and spec.pooling == "map":
        notes.append("SigLIP has gelu=erf, SigLIP 2 gelu=tanh: for that one say --model auto:gelu=tanh")
    return Found(
        spec,
        (grid[0] * spec.patch_size, grid[1] * spec.patch_size),
        num_classes,
        pre_logits,
        tuple(arrays),
        unknown,
        frozenset(key for key in shapes if _IGNORED.fullmatch(key)),
        (*notes, *data_notes),
        (*assumed, *conventions),
        is_ours and "heads" in assumed,
        _classes(config or {}, num_classes),
        data,
    )


def preprocessing(config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The entries of a run's data section that a timm config.json states, and a line for what they cannot express."""
    stated = config.get("pretrained_cfg") or config
    if not stated.get("mean") or not stated.get("std"):
        return None, ("config.json states no mean and std",)
    data: dict[str, Any] = {key: one_or_three([float(number) for number in stated[key]]) for key in ("mean", "std")}
    notes = []
    interpolation, mode, fraction = stated.get("interpolation"), stated.get("crop_mode"), stated.get("crop_pct")
    if interpolation in ("bilinear", "bicubic"):
        data["interpolation"] = interpolation
    elif interpolation:
        notes.append(f"they were evaluated with {interpolation} interpolation, which this reader of images lacks")
    if mode in (None, "", "center") and fraction:
        data |= {"eval_crop": "center", "crop_fraction": float(fraction)}
    elif mode == "squash" and fraction in (None, 1, 1.0):
        data["eval_crop"] = "squash"
    elif mode:
        notes.append(f'they were evaluated with crop_mode "{mode}" at {fraction}, which this reader of images lacks')
    return data, tuple(notes)


def _no_preprocessing(spec: ModelSpec) -> tuple[str, ...]:
    if spec.pooling != "token":
        return ("the file states no preprocessing",)
    return (
        "the file states no preprocessing: DeiT, MAE and DINOv2 were trained with ImageNet's, "
        "--set 'data.mean=[0.485,0.456,0.406]' --set 'data.std=[0.229,0.224,0.225]'",
    )


def _model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says beyond the architecture's name.

    Raises: WeightError for an argument that makes another function of the model than the one that we have.
    """
    arguments = dict(config.get("model_args") or {})
    if config.get("global_pool") and "global_pool" not in arguments:
        arguments["global_pool"] = config["global_pool"]
    for name, value in arguments.items():
        if name in _TOLD_BY_ARRAYS or value in _NEUTRAL.get(name, ()):
            continue
        raise WeightError(f"not supported: {name}={value!r} in the model_args of config.json")
    if arguments.get("act_layer") not in _ACTIVATIONS:
        known = ", ".join(name for name in _ACTIVATIONS if name)
        raise WeightError(f'not supported: act_layer "{arguments["act_layer"]}" in config.json', fix=f"known: {known}")
    for part, family in (("quickgelu", "CLIP, whose GELU is another one"), ("rope", "a ViT with rotary positions")):
        if part in str(config.get("architecture")):  # no array tells
            raise WeightError(f"not supported: {family}: architecture {config['architecture']}")
    return arguments


def _infer(
    shapes: Shapes, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[ModelSpec, list[str], list[str]]:
    """Read the architecture off the shapes, and list what no array gives, and what was assumed then.

    Where arrays disagree the majority decides, so that a single wrong one is found by comparing with the result.
    """
    architecture = str(config.get("architecture", "")).partition(".")[0]
    block = r"blocks\.(?:\d+\.)?\d+"
    numbers = [int(match[2]) for key in shapes if (match := _BLOCK.fullmatch(key))]
    votes = {
        "width": vote(shapes, rf"{block}\.norm[12]\.(weight|bias)", -1),
        "mlp": vote(shapes, rf"{block}\.mlp\.fc1\.(weight|bias)", 0),
        "patch_size": vote(shapes, r"patch_embed(\.proj)?\.weight", -1),
        "in_channels": vote(shapes, r"patch_embed(\.proj)?\.weight", -3),
    }
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    width = sizes["width"]
    has_scale = any(re.fullmatch(rf"{block}\.(ls1\.gamma|gamma_1)", key) for key in shapes)
    head_width = vote(shapes, rf"{block}\.attn\.[qk]_norm\.(weight|bias)", -1)
    heads = width // head_width if head_width else arguments.get("num_heads") or _HEADS.get(architecture)
    if heads is None and "giantopt" in architecture:
        heads = 16
    tanh = "tanh" if _TANH.fullmatch(architecture) else "erf"
    spec = ModelSpec(
        name="",
        depth=max(numbers, default=-1) + 1,
        heads=operator.index(heads or usual_heads(width)),
        pooling="token" if "cls_token" in shapes else "map" if "attn_pool.latent" in shapes else "gap",
        registers=vote(shapes, "reg_token|register_tokens", -2) or 0,
        layer_scale=float(arguments.get("init_values") or 1e-5) if has_scale else None,
        qk_norm=head_width is not None,
        gelu=_ACTIVATIONS[arguments["act_layer"]] if arguments.get("act_layer") else tanh,
        resize="bicubic",
        **sizes,
    )
    unknown = [quantity for quantity, size in votes.items() if not size]
    return spec, unknown, [] if heads or architecture else ["heads"]


def _check_pooling(spec: ModelSpec, arguments: Mapping[str, Any]) -> None:
    """Raises: WeightError when the config pools in a way that the arrays do not tell and this model does not have."""
    ours = {"token": ("token", ""), "gap": ("avg",), "map": ("map",)}[spec.pooling]
    stated = arguments.get("global_pool", ours[0])
    if stated not in ours:
        tokens = "a class token" if spec.pooling == "token" else "no class token"
        raise WeightError(f'not supported: global_pool "{stated}" in config.json, beside {tokens}')
    if spec.registers and (bool(arguments.get("pool_include_prefix")) != (spec.pooling == "map")):
        if spec.pooling == "map":
            raise WeightError("not supported: a map head that leaves the register tokens out")
        if spec.pooling == "gap":
            raise WeightError("not supported: an average over the register tokens too (pool_include_prefix)")


def _image_size(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that config.json states."""
    size = arguments.get("img_size") or (config.get("pretrained_cfg") or config).get("input_size")
    if not size:
        return None
    return (size, size) if isinstance(size, int) else (operator.index(size[-2]), operator.index(size[-1]))


def _grid(
    spec: ModelSpec, num_rows: int, image_size: tuple[int, int] | None, arguments: Mapping[str, Any]
) -> tuple[int, tuple[int, int]]:
    """How many rows of the positions are not for patches, and the grid of the others.

    Raises: WeightError when neither the stated image size nor a square fits.
    """
    class_tokens = int(spec.pooling == "token")
    choices = [0, class_tokens, class_tokens + spec.registers] if spec.registers else [class_tokens, 0]
    if arguments.get("no_embed_class"):
        choices = [0]
    if image_size:
        height, width = image_size[0] // spec.patch_size, image_size[1] // spec.patch_size
        for num_prefix in choices:
            if num_rows - num_prefix == height * width > 0:
                return num_prefix, (height, width)
    for num_prefix in choices:
        side = math.isqrt(max(num_rows - num_prefix, 0))
        if side and side * side == num_rows - num_prefix:
            return num_prefix, (side, side)
    raise WeightError(
        f"pos_embed has {num_rows} rows, expected a square number for the patches and {choices[0]} more",
        fix="for images that are no squares the config.json of a timm directory states img_size",
    )


def _positions(spec: ModelSpec, num_rows: int, num_prefix: int) -> Iterator[ForeignArray]:
    """Where the rows of the positions go: to the positions, and where registers have some, to the registers."""
    shape = (1, num_rows, spec.width)
    class_tokens = int(spec.pooling == "token")
    if num_prefix > class_tokens:
        rows = ((0, class_tokens), (num_prefix, num_rows)) if class_tokens else ((num_prefix, num_rows),)
        yield ForeignArray("pos_embed", shape, "pos_embed", rows=rows)
        yield ForeignArray("pos_embed", shape, "reg_token", rows=((class_tokens, num_prefix),))
    else:
        yield ForeignArray("pos_embed", shape, "pos_embed", move="patches" if num_prefix < class_tokens else "same")


def _renaming(shapes: Shapes, is_ours: bool) -> Callable[[str], str]:
    """Our parameter's name -> the key in this file."""
    chunks = {match[2]: match[1] for key in shapes if (match := _BLOCK.fullmatch(key)) and match[1]}
    has_gammas = any(key.endswith(".gamma_1") for key in shapes)

    def renamed(name: str) -> str:
        if is_ours:
            return name
        if has_gammas:
            name = re.sub(r"ls([12])\.gamma", r"gamma_\1", name)
        if match := _BLOCK.fullmatch(name):
            _, block, rest = match.groups()
            return f"blocks.{chunks[block]}.{block}.{rest}" if block in chunks else name
        if name == "reg_token" and "register_tokens" in shapes:
            return "register_tokens"
        name = re.sub(r"^patch_embed\.", "patch_embed.proj.", name)
        return re.sub(r"^head\.pre_logits\.", "pre_logits.fc.", name)

    return renamed


def _has_qkv_bias(shapes: Shapes) -> bool:
    return any(key.endswith("attn.qkv.bias") for key in shapes)


def _classes(config: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """Class names by label, when config.json has one for each."""
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or config.get("labels")
    if isinstance(names, Mapping):
        names = [names.get(str(label)) for label in range(num_classes)]
    if isinstance(names, list) and len(names) == num_classes > 0 and all(isinstance(name, str) for name in names):
        return names
    return None
