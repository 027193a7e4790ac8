"""A directory for transformers: config.json, preprocessor_config.json and model.safetensors. No torch.

Names are those on disk: transformers 5 has others in memory, and still reads and writes these.
Source: huggingface/transformers, models/vit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitds.layouts.array import ForeignArray
from vitds.layouts.own import own_layout
from vitds.run_config import DataConfig
from vitds.weights.export.stream import OnBytes, write_safetensors
from vitds.weights.export.timm import per_channel
from vitds.weights.open import OpenWeights
from vitds.weights_header import WeightsHeader

_PIL_FILTERS = {"bilinear": 2, "bicubic": 3}
_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}
_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def write_huggingface(directory: Path, weights: OpenWeights, data: DataConfig, on_bytes: OnBytes) -> None:
    """Write the directory's three files; what ViTForImageClassification cannot express was refused before."""
    directory.mkdir()
    header = weights.header
    for name, content in (("config", vit_config(header)), ("preprocessor_config", preprocessor_config(header, data))):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / f"{name}.json").write_text(text, encoding="utf-8")
    layout = huggingface_layout(header)
    write_safetensors(directory / "model.safetensors", weights.arrays, layout, {"format": "pt"}, on_bytes)


def huggingface_layout(header: WeightsHeader) -> list[ForeignArray]:
    """Every array of the model under the name of ViTForImageClassification."""
    layout = []
    for entry in own_layout(header.spec, header.image_size, header.num_classes):
        module, _, kind = entry.name.rpartition(".") if "." in entry.name else (entry.name, "", "")
        if module in _NAMES:
            layout.append(ForeignArray(_NAMES[module] + f".{kind}" * bool(kind), entry.shape, entry.name))
            continue
        _, block, part = module.split(".", 2)
        layer = f"vit.encoder.layer.{block}"
        if part in _BLOCK_NAMES:
            layout.append(ForeignArray(f"{layer}.{_BLOCK_NAMES[part]}.{kind}", entry.shape, entry.name))
        else:
            third = (entry.shape[0] // 3, *entry.shape[1:])
            for index, projection in enumerate(("query", "key", "value")):
                key = f"{layer}.attention.attention.{projection}.{kind}"
                layout.append(ForeignArray(key, third, entry.name, index))
    return layout


def vit_config(header: WeightsHeader) -> dict[str, Any]:
    """The content of config.json; what is not said here is transformers' default, which differs from Google's."""
    spec = header.spec
    height, width = header.image_size
    names = header.classes or [f"LABEL_{label}" for label in range(header.num_classes)]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp,
        "hidden_act": "gelu_pytorch_tanh" if spec.gelu == "tanh" else "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": spec.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": spec.patch_size,
        "num_channels": spec.in_channels,
        "qkv_bias": True,
        "dtype": "float32",
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in reversed(list(enumerate(names)))},
    } | ({"problem_type": "multi_label_classification"} if header.loss == "bce" else {})


def preprocessor_config(header: WeightsHeader, data: DataConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json: our evaluation transform in the words of transformers."""
    height, width = header.image_size
    size = {"height": height, "width": width}
    config: dict[str, Any] = {
        "do_resize": True,
        "resample": _PIL_FILTERS[data.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": per_channel(data.mean, header.spec.in_channels),
        "image_std": per_channel(data.std, header.spec.in_channels),
    }
    if data.eval_crop == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": size} | config
    # transformers cuts half a pixel more to the left where ours rounds: on some photos the crop lies one pixel aside.
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": int(height / data.crop_fraction)},
        "do_center_crop": True,
        "crop_size": size,
        "do_convert_rgb": True,
    } | config
