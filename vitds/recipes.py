"""Named recipes: what a paper does to its training images, and with its targets, as entries of the configuration.

`data.recipe` fills those entries that neither the file nor a flag gives. A recipe says every entry that it is about,
also where that is the default, so that it stays the paper's whatever the defaults become.
"""

from __future__ import annotations

from typing import Any

from vitds.document import Document
from vitds.errors import ConfigError, did_you_mean

# Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), fine-tuning; google-research/vision_transformer,
# vit_jax/input_pipeline.py: an Inception crop, a flip, pixels in [-1, 1]; evaluation on the whole image, squashed.
_VIT = {
    "data.train_crop": "random",
    "data.crop_scale": [0.05, 1.0],
    "data.crop_ratio": [3 / 4, 4 / 3],
    "data.flip": 0.5,
    "data.interpolation": "bilinear",
    "data.mean": 0.5,
    "data.std": 0.5,
    "data.repeats": 1,
    "data.randaugment_layers": 0,
    "data.three_augment": False,
    "data.color_jitter": 0.0,
    "data.erase": 0.0,
    "data.mixup_alpha": 0.0,
    "data.cutmix_alpha": 0.0,
    "data.eval_crop": "squash",
    "label_smoothing": 0.0,
}


def _augreg(layers: int, magnitude: float, mixup_alpha: float) -> dict[str, Any]:
    return _VIT | {
        "data.randaugment_layers": layers,
        "data.randaugment_magnitude": magnitude,
        "data.mixup_alpha": mixup_alpha,
        "data.eval_crop": "center",
        "data.crop_fraction": 0.875,
    }


# Touvron et al., "DeiT III: Revenge of the ViT" (2022), table of hyperparameters; facebookresearch/deit,
# README_revenge.md (commands), augment.py (3-Augment). Its mixup and cutmix are timm's: either one, evenly, by batch.
_DEIT_III = _VIT | {
    "data.interpolation": "bicubic",
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.three_augment": True,
    "data.color_jitter": 0.3,
    "data.cutmix_alpha": 1.0,
    "data.eval_crop": "center",
    "data.crop_fraction": 1.0,
}

RECIPES: dict[str, dict[str, Any]] = {
    "vit-finetune": _VIT,
    # Steiner et al., "How to train your ViT?" (2021), section 3.3; google-research/big_vision, configs/vit_i21k.py.
    "augreg-none": _augreg(0, 0, 0.0),
    "augreg-light1": _augreg(2, 0, 0.0),
    "augreg-light2": _augreg(2, 10, 0.2),
    "augreg-medium1": _augreg(2, 15, 0.2),
    "augreg-medium2": _augreg(2, 15, 0.5),
    "augreg-strong1": _augreg(2, 20, 0.5),
    "augreg-strong2": _augreg(2, 20, 0.8),
    "deit3": _DEIT_III  # on ImageNet-1k
    | {
        "data.crop_scale": [0.08, 1.0],
        "data.repeats": 3,
        "data.mixup_alpha": 0.8,
        "data.cutmix_share": 0.5,
        "data.mixed_targets": "ones",
        "loss": "bce",
    },
    "deit3-21k": _DEIT_III | {"data.train_crop": "simple", "loss": "softmax", "label_smoothing": 0.1},
}


def apply_recipe(document: Document) -> list[str]:
    """Fill the entries that the document's recipe names and that neither the file nor a flag gives; a warning that
    names those which the file gives otherwise.

    Raises: ConfigError when there is no such recipe, naming the nearest.
    """
    name = document.get("vitds.data.recipe")
    if not isinstance(name, str):  # none, or for run_config to refuse
        return []
    if name not in RECIPES:
        where = document.where("vitds.data.recipe")
        raise ConfigError(f'no recipe "{name}"', where=where, fix=did_you_mean(name, RECIPES))
    kept = [
        key
        for key, value in RECIPES[name].items()
        if document.get(f"vitds.{key}", value) != value and not document.source(f"vitds.{key}").startswith("flag")
    ]
    for key, value in RECIPES[name].items():
        document.fill(f"vitds.{key}", value, f"recipe {name}")
    return [f"data.recipe {name}, but {document.file} gives its own {', '.join(kept)}"] if kept else []
