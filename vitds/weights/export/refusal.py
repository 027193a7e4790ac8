"""What each target cannot express, and by how much its logits would be off if it were written all the same. No torch.

The deviations were measured: float32, CPU, the tiny reference weights of tests/weights/reference/gen_npz.py (logits of
deviation near 1), largest absolute difference of a logit over its two images. tests/weights/test_export.py measures
them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitds.errors import UsageError
from vitds.weights_header import WeightsHeader

_GOOGLES_EPSILON = 1e-6  # timm's and Flax's as well


@dataclass(frozen=True)
class Obstacle:
    """A part of a model that a target lacks: what the target does in its place, and how far its logits are off then."""

    why: str
    deviation: float | None = None


_TIMM = {
    "hybrid": Obstacle("timm's stem has other epsilons (StdConv 1e-8 under the root, GroupNorm 1e-5)", 0.05),
    "pre_logits": Obstacle("timm has removed the layer, the head would read the features themselves", 4.0),
    "norm_eps": Obstacle("timm's LayerNorm has epsilon 1e-6 and no setting for it, instead of 1e-5 say", 6e-5),
}
_HF = {
    "hybrid": Obstacle("transformers has no hybrid ViT any more"),
    "no head": Obstacle("ViTForImageClassification would get a random one"),
    "pre_logits": Obstacle("ViTForImageClassification lacks it, the head would read the features themselves", 4.0),
    "registers": Obstacle("ViTForImageClassification has no register tokens", 0.5),
    "layer_scale": Obstacle("ViTForImageClassification has no LayerScale", 0.6),
    "qk_norm": Obstacle("ViTForImageClassification does not normalise queries and keys", 1.0),
    "pooling gap": Obstacle("ViTForImageClassification reads a class token, which would be empty", 1.0),
    "pooling map": Obstacle("ViTForImageClassification reads a class token, which would be empty", 4.0),
    "centre crop": Obstacle("image processors resize by one side, and cannot cover a height and a width that differ"),
}
_NPZ = {
    "gelu erf": Obstacle("Google's code computes the tanh approximation", 3e-4),
    "norm_eps": Obstacle("Google's code has epsilon 1e-6, instead of 1e-5 say", 6e-5),
    "registers": Obstacle("Google's layout has no register tokens", 0.5),
    "layer_scale": Obstacle("Google's layout has no LayerScale", 0.6),
    "qk_norm": Obstacle("Google's layout has no norm of queries and keys", 1.0),
}
OBSTACLES: dict[str, dict[str, Obstacle]] = {
    "safetensors": {},
    "timm": _TIMM,
    "hf": _HF,
    "npz": _NPZ,
    "onnx": {},
    "torch-export": {},
}


def special_parts(header: WeightsHeader) -> list[str]:
    """What sets a model apart from the plain ViT with a head, in the words of OBSTACLES."""
    spec = header.spec
    found = {
        "hybrid": spec.resnet is not None,
        "no head": not header.num_classes,
        "pre_logits": header.pre_logits is not None,
        "registers": spec.registers > 0,
        "layer_scale": spec.layer_scale is not None,
        "qk_norm": spec.qk_norm,
        f"pooling {spec.pooling}": spec.pooling != "token",
        f"gelu {spec.gelu}": spec.gelu != "tanh",
        "norm_eps": spec.norm_eps != _GOOGLES_EPSILON,
        "centre crop": (header.data or {}).get("eval_crop") == "center" and len(set(header.image_size)) == 2,
    }
    return [part for part, is_there in found.items() if is_there]


def refuse_what_is_lost(header: WeightsHeader, target: str) -> None:
    """Raises: UsageError when the target cannot compute these logits; it says why, and how far off they would be."""
    obstacles, parts = OBSTACLES[target], special_parts(header)
    lost = [part for part in parts if part in obstacles]
    if lost:
        lines = [f"{part}: {obstacles[part].why}{_off_by(obstacles[part].deviation)}" for part in lost]
        holding = [other for other in OBSTACLES if OBSTACLES[other].keys().isdisjoint(parts)]
        lines.append(f"formats that hold it: {', '.join(holding)}")
        raise UsageError(f"{header.spec.name} cannot be exported to {target}", fix="\n".join(lines))


def _off_by(deviation: float | None) -> str:
    return "" if deviation is None else f"; logits would be off by {deviation:g}, measured on small reference weights"
