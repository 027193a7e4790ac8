"""A directory that timm and transformers load: config.json, model.safetensors and a model card. No torch.

Source: huggingface/pytorch-image-models, timm/models/_hub.py (save_for_hf), vision_transformer.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitds.layouts.array import ForeignArray
from vitds.layouts.own import own_layout
from vitds.model.registry import ModelSpec
from vitds.run_config import DataConfig
from vitds.weights.export.stream import OnBytes, write_safetensors
from vitds.weights.lazy import LazyArrays
from vitds.weights.open import OpenWeights
from vitds.weights_header import WeightsHeader

# timm's name of each architecture; its arguments stand in model_args all the same, so that nothing hangs on the name.
_ARCHITECTURES = {
    "ViT-Ti_16": "vit_tiny_patch16_224",
    "ViT-S_16": "vit_small_patch16_224",
    "ViT-S_32": "vit_small_patch32_224",
    "ViT-B_8": "vit_base_patch8_224",
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-B_32": "vit_base_patch32_224",
    "ViT-L_16": "vit_large_patch16_224",
    "ViT-L_32": "vit_large_patch32_224",
    "ViT-H_14": "vit_huge_patch14_224",
    "ViT-g_14": "vit_giant_patch14_224",
    "ViT-G_14": "vit_gigantic_patch14_224",
}
_POOLING = {"token": "token", "gap": "avg", "map": "map"}


def write_timm(directory: Path, weights: OpenWeights, data: DataConfig, on_bytes: OnBytes) -> None:
    """Write the directory's three files; what timm cannot express was refused before."""
    directory.mkdir()
    header = weights.header
    config = timm_config(header, data)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_card(header, data, config), encoding="utf-8")
    arrays = _without_class_position(weights.arrays) if header.spec.registers else weights.arrays
    write_safetensors(directory / "model.safetensors", arrays, timm_layout(header), {"format": "pt"}, on_bytes)


def timm_layout(header: WeightsHeader) -> list[ForeignArray]:
    """Every array of the model under timm's name."""
    layout = []
    for entry in own_layout(header.spec, header.image_size, header.num_classes):
        if entry.name.startswith("patch_embed."):
            entry = replace(entry, key=entry.key.replace("patch_embed.", "patch_embed.proj."))
        if entry.name == "pos_embed" and header.spec.registers and header.spec.pooling == "token":
            # With no_embed_class neither the class token nor the registers have a position.
            entry = replace(entry, shape=(1, entry.shape[1] - 1, entry.shape[2]), move="patches")
        layout.append(entry)
    return layout


def timm_config(header: WeightsHeader, data: DataConfig) -> dict[str, Any]:
    """The content of config.json."""
    spec = header.spec
    height, width = header.image_size
    size = height if height == width else [height, width]
    # Without num_classes: transformers passes that on by itself, and timm was seen to fail on getting it twice.
    model_args: dict[str, Any] = {
        "img_size": size,
        "patch_size": spec.patch_size,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "mlp_ratio": _mlp_ratio(spec),
    }
    if spec.in_channels != 3:
        model_args["in_chans"] = spec.in_channels
    if spec.gelu == "tanh":
        model_args["act_layer"] = "gelu_tanh"
    if spec.pooling != "token":
        # Our mean is taken after the norm, timm's before it unless fc_norm is off.
        model_args |= {"global_pool": _POOLING[spec.pooling], "class_token": False, "fc_norm": False}
    if spec.registers:
        model_args |= {"reg_tokens": spec.registers, "no_embed_class": True}
        if spec.pooling == "map":
            model_args["pool_include_prefix"] = True
    if spec.layer_scale is not None:
        model_args["init_values"] = spec.layer_scale
    if spec.qk_norm:
        model_args["qk_norm"] = True
    is_squash = data.eval_crop == "squash"
    config: dict[str, Any] = {
        "architecture": _architecture(spec),
        "num_classes": header.num_classes,
        "num_features": spec.width,
        "global_pool": _POOLING[spec.pooling],
        "model_args": model_args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [spec.in_channels, height, width],
            "fixed_input_size": True,
            "interpolation": data.interpolation,
            "crop_pct": 1.0 if is_squash else data.crop_fraction,
            "crop_mode": "squash" if is_squash else "center",
            "mean": per_channel(data.mean, spec.in_channels),
            "std": per_channel(data.std, spec.in_channels),
            "num_classes": header.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if header.classes:
        config["label_names"] = header.classes
    return config


def per_channel(value: float | tuple[float, ...], channels: int) -> list[float]:
    """Mean or deviation as one number for each channel."""
    numbers = value if isinstance(value, tuple | list) else (value,)
    return list(numbers) * channels if len(numbers) == 1 else list(numbers)


def _architecture(spec: ModelSpec) -> str:
    return _ARCHITECTURES.get(spec.name.partition(":")[0], "vit_base_patch16_224")


def _mlp_ratio(spec: ModelSpec) -> float:
    """The ratio of which timm, which multiplies and cuts off, makes this MLP's width."""
    ratio = spec.mlp / spec.width
    return ratio if int(spec.width * ratio) == spec.mlp else math.nextafter(ratio, math.inf)


def _without_class_position(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The class token with its position added, as the model does with every image."""
    if "cls_token" not in arrays:
        return arrays
    makers = {name: partial(arrays.__getitem__, name) for name in arrays}
    return LazyArrays(makers).replaced("cls_token", lambda: arrays["cls_token"] + arrays["pos_embed"][:, :1])


def _card(header: WeightsHeader, data: DataConfig, config: dict[str, Any]) -> str:
    """README.md: what this is, how it is loaded, and how it is not."""
    (height, width), classes = header.image_size, header.num_classes
    arguments = ", ".join(f"{key}={value!r}" for key, value in config["model_args"].items())
    crop = "squashed to it" if data.eval_crop == "squash" else f"centre crop of {data.crop_fraction:g}"
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- transformers
---
# {header.spec.name}

A Vision Transformer, {height} x {width} px, {f"{classes} classes" if classes else "no head"}, float32, out of vitds.
Images: {data.interpolation}, {crop}, mean {data.mean}, std {data.std} (`config.json` has it all).

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_DIRECTORY", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

By architecture and file, all arguments are needed:

```python
model = timm.create_model(
    "{config["architecture"]}",
    checkpoint_path="PATH_OF_THIS_DIRECTORY/model.safetensors",
    num_classes={classes},
    {arguments},
)
```

In transformers it is `AutoModelForImageClassification.from_pretrained("PATH_OF_THIS_DIRECTORY")`, with timm installed.

Two ways to get it wrong without a word:

- `ViTForImageClassification.from_pretrained` on this directory gives a random model with two classes. For that class
  export with `--format hf`.
- `pretrained_cfg_overlay=dict(file=...)` with another `num_classes` than the overlay's drops the head.
"""
