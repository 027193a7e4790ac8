"""`create_model`, the Python face of vitds: an architecture by name, with weights or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitds.errors import ConfigError
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.weights.load import fit, height_width, load_weights


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
) -> VisionTransformer:
    """Build a Vision Transformer, float32, from images (B, 3, H, W) in [-1, 1] to logits (B, num_classes).

    What is None comes from the weights, else 224 pixels, 1000 classes, no pre_logits. The name "auto" reads the
    architecture off the weights. Their head is kept, with its pre_logits, when num_classes is None or theirs and
    reset_head is False; otherwise both go and the new head is zero. `pre_logits=False` drops that layer alone.

    Raises: ConfigError for a wrong name or size, WeightError or CheckpointError for weights that are missing, damaged,
    unsafe, or of another model.
    """
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}, at least one class is needed")
    if weights is None:
        if name == "auto":
            raise ConfigError('model "auto" reads the architecture off weights, and none were given')
        size = height_width(image_size or 224)
        return VisionTransformer(get_spec(name), size, num_classes or 1000, pre_logits or None, dropout, drop_path)

    found = load_weights(weights, None if name == "auto" else name)
    fitted = fit(found, image_size, num_classes, reset_head, pre_logits)
    header = fitted.header
    model = VisionTransformer(header.spec, header.image_size, header.num_classes, header.pre_logits, dropout, drop_path)
    # Only a new pre_logits layer, asked for beside a new head, keeps its initial values.
    model.load_state_dict({**model.head.state_dict(prefix="head."), **fitted.state_dict})
    return model
