"""Which layout a file's arrays are in, whatever stands before their names. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from vitds.errors import ConfigError, WeightError
from vitds.layouts import google, huggingface, timm, vit_pytorch
from vitds.layouts.array import Shapes
from vitds.layouts.files import ArrayFile
from vitds.layouts.found import Found
from vitds.layouts.own import own_layout
from vitds.layouts.unsupported import refuse_by_name
from vitds.model.registry import get_spec, grid_size

_NUM_SHOWN = 3
# What torch.compile, FSDP and its checkpoint wrapper put into the names of whatever they wrap, also of each block.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


DESCRIPTION_KEYS = frozenset({"model", "image_size", "num_classes", "pre_logits"})
"""What a description by vitds states at least: the "vitds" entry of a .safetensors, X.json beside X.npz."""


def recognise(
    file: ArrayFile,
    config: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Found:
    """The model that the arrays of a file are of.

    `config` and `preprocessor` are the JSON files of a timm or Hugging Face directory, `description` is what vitds
    wrote beside an .npz.

    Raises: WeightError for a layout that is not known, and by name for a model that is known and not supported.
    """
    if "vitds" in file.metadata:
        try:
            description = json.loads(file.metadata["vitds"])
        except (TypeError, ValueError, RecursionError) as error:
            raise WeightError(f'its "vitds" entry cannot be read: {error}') from None
    if description is not None:
        return _described_by_vitds(description, file.format)
    plain = {_WRAPPERS.sub("", key): key for key in file.shapes}
    if plain.keys() != file.shapes.keys() and len(plain) == len(file.shapes):
        unwrapped = replace(file, shapes={name: file.shapes[key] for name, key in plain.items()})
        found = recognise(unwrapped, config, preprocessor)
        arrays = tuple(replace(array, key=plain.get(array.key, array.key)) for array in found.arrays)
        return replace(found, arrays=arrays, ignored=frozenset(plain[key] for key in found.ignored))
    if file.format == "npz" or google.recognises(file.shapes):
        return google.read_layout(file.shapes)
    for layout in (vit_pytorch, huggingface, timm):
        prefixes = sorted({match[1] for key in file.shapes if (match := layout.ANCHOR.fullmatch(key))})
        if len(prefixes) > 1:
            named = ", ".join(f'"{prefix}"' for prefix in prefixes)
            raise WeightError(f"holds several ViTs, under {named}", fix="save the state dict of one of them")
        if prefixes:
            return _read_below(prefixes[0], layout, file.shapes, config, preprocessor)
    refuse_by_name(file.shapes)
    shown = ", ".join(list(file.shapes)[:_NUM_SHOWN]) or "no array"
    raise WeightError("not a ViT in a layout that is known", fix=f"it holds {shown}, ...")


def _read_below(
    prefix: str,
    layout: ModuleType,
    shapes: Shapes,
    config: Mapping[str, Any] | None,
    preprocessor: Mapping[str, Any] | None,
) -> Found:
    """Read the arrays whose key begins with `prefix` (`module.`, `visual.trunk.`), and leave the others out."""
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    outside = [key for key in shapes if not key.startswith(prefix)]
    refuse_by_name(inside)
    kind = _kind(config) if config is not None else layout
    if kind is not layout:
        raise WeightError("its arrays are not named as config.json tells", fix=f"it holds {next(iter(shapes))}")
    try:
        if layout is huggingface:
            found = huggingface.read_layout(inside, config, preprocessor)
        elif layout is timm:
            found = timm.read_layout(inside, config)
        else:
            found = vit_pytorch.read_layout(inside)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        if config is None:
            raise
        raise WeightError(f"config.json or preprocessor_config.json does not describe a ViT: {error!r}") from None
    arrays = tuple(replace(array, key=prefix + array.key if array.key else "") for array in found.arrays)
    notes = found.notes
    if outside:
        shown = ", ".join(outside[:_NUM_SHOWN]) + ", ..." * (len(outside) > _NUM_SHOWN)
        notes = (*notes, f'{len(outside)} arrays outside of "{prefix}" are left out: {shown}')
    ignored = frozenset(prefix + key for key in found.ignored) | frozenset(outside)
    return replace(found, arrays=arrays, notes=notes, ignored=ignored)


def _kind(config: Mapping[str, Any]) -> ModuleType:
    """Whose directory a config.json is of.

    Raises: WeightError for a model of transformers that is no ViT.
    """
    if "architecture" in config:
        return timm
    if config.get("model_type") == "vit":
        return huggingface
    if "model_type" in config:
        what = f'not supported: model_type "{config["model_type"]}" in config.json'
        raise WeightError(what, fix='of Hugging Face models "vit" is read')
    raise WeightError('config.json names no "architecture" (timm) and no "model_type" (Hugging Face)')


def _described_by_vitds(stated: Mapping[str, Any], file_format: str) -> Found:
    """What vitds wrote about its own export: Google's arrays in an .npz, our own in a .safetensors."""
    try:
        spec, (height, width) = get_spec(stated["model"]), stated["image_size"]
        grid_size(spec, (height, width))  # or it says that the size does not fit
        num_classes, pre_logits = int(stated["num_classes"]), stated["pre_logits"]
        layout = google.written_layout if file_format == "npz" else own_layout
        arrays = layout(spec, (height, width), num_classes, pre_logits)
        classes, data, loss = stated.get("classes"), stated.get("data"), stated.get("loss", "softmax")
        if loss not in ("softmax", "bce"):
            raise ValueError("the loss is softmax or bce")
        if not isinstance(classes, list | None) or not isinstance(data, dict | None):
            raise ValueError("classes are a list, data an object")
        if classes is not None and (len(classes) != num_classes or not all(isinstance(name, str) for name in classes)):
            raise ValueError(f"classes are names, as many as the head has: {num_classes}")
    except (TypeError, ValueError, KeyError, AttributeError, ConfigError) as error:
        raise WeightError(f"what vitds wrote about it does not describe a model: {error!r}") from None
    return Found(spec, (height, width), num_classes, pre_logits, arrays, [], classes=classes, data=data, loss=loss)
