"""`create_model`, the Python face of vitds: an architecture by name, with weights or without."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vitds.errors import ConfigError
from vitds.model.registry import get_spec, split_name
from vitds.model.vit import VisionTransformer
from vitds.weights.load import check_pre_logits, fit, height_width, load_weights
from vitds.world import world_from_env


def create_model(
    name: str,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    reset_head: bool = False,
    pre_logits: int | bool | None = None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    drop_path_subset: bool = False,
    token_drop: float = 0.0,
    ema: bool = False,
) -> VisionTransformer:
    """Build a Vision Transformer, float32, from images (B, 3, H, W) in [-1, 1] to logits (B, num_classes).

    What is None comes from the weights, else 224 pixels, 1000 classes, no pre_logits. The name "auto" reads the
    architecture off the weights, and says on rank 0 what it found. Their head is kept, with its pre_logits, when
    num_classes is None or theirs and reset_head is False; otherwise both go and the new head is zero.
    `pre_logits=False` drops that layer alone. With `num_classes=0` the model has no head and returns its features.
    `ema` takes the average of the weights that a checkpoint's run kept.
    Modifiers after the name (`auto:timm`, `ViT-B_16:gelu=erf`) say what a file of weights does not say itself;
    `vitds.model.registry.get_spec` lists them.

    Raises: ConfigError for a wrong name or size, WeightError or CheckpointError for weights that are missing, damaged,
    unsafe, or of another model.
    """
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"num_classes is {num_classes}, it counts classes")
    in_training = (dropout, drop_path, drop_path_subset, token_drop)
    is_auto = split_name(name)[0] == "auto"
    if weights is None:
        if is_auto:
            raise ConfigError('model "auto" reads the architecture off weights, and none were given')
        check_pre_logits(pre_logits)
        size = height_width(224 if image_size is None else image_size)
        num_classes = 1000 if num_classes is None else num_classes
        return VisionTransformer(get_spec(name), size, num_classes, pre_logits or None, *in_training)

    found = load_weights(weights, name, ema=ema)
    if is_auto and world_from_env().is_main:
        print(f"{weights}: {found.header}", *found.header.notes, sep="\n  ", file=sys.stderr)
    fitted = fit(found, image_size, num_classes, reset_head, pre_logits)
    header = fitted.header
    model = VisionTransformer(header.spec, header.image_size, header.num_classes, header.pre_logits, *in_training)
    # Only a new pre_logits layer, asked for beside a new head, keeps its initial values.
    model.load_state_dict({**model.head.state_dict(prefix="head."), **fitted.state_dict})
    return model
