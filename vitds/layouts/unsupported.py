"""Models that are recognised by their arrays and that vitds has no model for, so that they are refused by name."""

from __future__ import annotations

import re

from vitds.errors import WeightError
from vitds.layouts.array import Shapes

# pattern that one key matches, and what it tells; the first match decides
_FAMILIES = [
    (r"rope_embed\.|storage_tokens|qkv\.bias_mask", "DINOv3: its positions are rotary"),
    (r"layer_scale1\.lambda1", "Hugging Face's Dinov2 or DINOv3; of DINOv2 its own files and timm's are read"),
    (r"mlp\.fc1_g\.|mlp\.w1\.|mlp\.ffn_ln\.|rope\.freqs", "a ViT with SwiGLU MLPs, as EVA-02 and AIMv2 have"),
    (r"mlp\.w12\.|weights_in\.", "a ViT with SwiGLU MLPs, as DINOv2's giant has"),
    (r"layers\.\d+\.blocks\.\d+\.att", "Swin: windows with relative positions"),
    (r"relative_position_bias_table|^beit", "BEiT: relative positions, biases of q and v alone"),
    (r"attn\.[qv]_bias", "EVA or EVA-02: biases of q and v alone"),
    (r"(attn|mlp)\.(norm|inner_attn_ln)\.", "BEiT-3: norms inside of attention and MLP"),
    (r"dist_token|head_dist|distillation_token", "a distilled DeiT: it has a second class token and a second head"),
    (r"blocks\.\d+\.(in_proj|attns)\.", "a ViT with parallel blocks"),
    (
        r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\.|visual\.class_embedding",
        "CLIP, or PE, which follows it: a norm before the blocks",
    ),
    (r"(^|\.)vision_model\.", "CLIP or SigLIP in Hugging Face's layout; of SigLIP timm's and open_clip's are read"),
    (r"(^|\.)fc_norm\.", "a ViT that pools first and normalises then (fc_norm), as MAE's fine-tuned classifiers do"),
    (r"patch_embed\.backbone\.", "timm's hybrid, whose ResNet computes another function than Google's; take its .npz"),
    (r"conv_dw\.|dwconv\.", "a convolutional network: ConvNeXt, EfficientNet and the like"),
    (r"(^|\.)layer1\.0\.conv1\.weight|embedder\.convolution\.weight", "ResNet"),
]


def refuse_by_name(shapes: Shapes) -> None:
    """Raises: WeightError when the arrays are of a model that is known and not supported."""
    for pattern, family in _FAMILIES:
        key = next((key for key in shapes if re.search(pattern, key)), None)
        if key is not None:
            raise _refusal(family, key)
    fc1, fc2 = shapes.get("blocks.0.mlp.fc1.weight", ()), shapes.get("blocks.0.mlp.fc2.weight", ())
    if len(fc1) == len(fc2) == 2 and fc1[0] == 2 * fc2[1]:
        raise _refusal("a ViT with SwiGLU MLPs, as DINOv2's giant has", "blocks.0.mlp.fc1.weight")
    if "pos_embed" not in shapes and {"reg_token", "blocks.0.gamma_1"} <= shapes.keys():
        raise _refusal("DINOv3: its positions are rotary", "blocks.0.gamma_1")


def _refusal(family: str, key: str) -> WeightError:
    return WeightError(f"not supported: {family}", fix=f"told by {key}")
