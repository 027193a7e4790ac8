"""What a weights file or checkpoint is of: architecture, image size, head, classes, preprocessing. Without torch.

A file is read by the headers of its arrays alone (`vitds.layouts`); a directory says it in its MANIFEST.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from vitds.errors import CheckpointError, ConfigError, WeightError
from vitds.layouts import google
from vitds.layouts.array import ForeignArray, Shapes, differences
from vitds.layouts.files import ArrayFile, read_array_file
from vitds.layouts.found import Found
from vitds.manifest import MANIFEST_NAME, read_manifest
from vitds.model.registry import CONVENTIONS, ModelSpec, get_spec, named, num_parameters, split_name

_MAX_LINES = 8
# How the weights' images were prepared: these entries of the run's "data" section travel with the weights.
_PREPROCESSING = ("eval_crop", "crop_fraction", "interpolation", "mean", "std")


@dataclass(frozen=True)
class WeightsHeader:
    """What the weights are of.

    Units: image_size is (height, width) in pixels; num_classes is 0 without a head; pre_logits is that layer's width.
    `classes` are names by label and `data` the entries of DataConfig that prepare an image, each None when the weights
    do not say; `dtype` (fp32, bf16, fp16) is the precision in which their run evaluates them; `arrays` is how a file's
    arrays become our parameters, empty for a checkpoint; `notes` are lines that the user should see.
    """

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None
    format: Literal["npz", "safetensors", "torch", "checkpoint"]
    classes: list[str] | None = None
    data: dict[str, Any] | None = None
    dtype: str = "fp32"
    arrays: tuple[ForeignArray, ...] = field(default=(), repr=False, compare=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people: model, image size, classes, pre_logits, parameters."""
        (height, width), classes = self.image_size, self.num_classes
        count = num_parameters(self.spec, self.image_size, classes, self.pre_logits)
        head = f"{classes} classes" if classes else "no head"
        head += f", pre_logits of {self.pre_logits}" * (self.pre_logits is not None)
        return f"{self.spec.name}, {height} x {width} px, {head}, {count:,} parameters"


def read_header(path: str | Path, model: str | None = None) -> WeightsHeader:
    """What the weights at `path` are of: a weights file, a run directory, its checkpoints/, or one global_stepN/.

    `model` is the architecture that they are asked for, with or without modifiers; without it, or with "auto", it is
    read off the shapes. Conventions that shapes do not tell (GELU, resizing, epsilon) are the weights' own, unless
    `model` states them.

    Raises: WeightError when there is nothing, when arrays are missing, extra, pickled or of the wrong shape or type
    (each one named), or when they are of another model than the one asked for.
    """
    path = Path(path)
    base, stated = split_name(model) if model else ("auto", {})
    wanted = get_spec(model) if model and base != "auto" else None
    if not path.exists():
        raise WeightError("does not exist", where=str(path))
    header = _read_manifest_header(path) if path.is_dir() else _read_file_header(path)
    if wanted is None:
        wanted = named(replace(header.spec, **stated))
    differing = list(_differing(header, wanted, stated))
    if differing:
        raise WeightError(f"of {header.spec.name}, not {wanted.name}", where=str(path), fix="\n".join(differing))
    return replace(
        header, spec=named(replace(header.spec, **{key: stated[key] for key in CONVENTIONS if key in stated}))
    )


def _differing(header: WeightsHeader, wanted: ModelSpec, stated: dict[str, Any]) -> Iterator[str]:
    """A line for each quantity in which the weights are not what is wanted."""
    for one in fields(ModelSpec):
        theirs, asked = getattr(header.spec, one.name), getattr(wanted, one.name)
        if one.name == "layer_scale":  # its initial value is no property of trained weights
            theirs, asked = theirs is not None, asked is not None
        # A checkpoint says its conventions itself; a file's are a guess that the user may correct.
        ignored = one.name == "name" or (
            one.name in CONVENTIONS and (one.name not in stated or header.format != "checkpoint")
        )
        if theirs != asked and not ignored:
            yield f"{one.name}: {theirs}, {wanted.name} has {asked}"


def resolve_checkpoint(path: str | Path) -> Path:
    """The global_stepN directory meant by a run directory, its checkpoints/, or itself.

    Raises: WeightError when there is no committed checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise WeightError("does not exist", where=str(path))
    if (path / MANIFEST_NAME).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        if (directory / "latest").is_file():
            tag = (directory / "latest").read_text().strip()
            if re.fullmatch(r"global_step\d+", tag) and (directory / tag / MANIFEST_NAME).is_file():
                return directory / tag
            raise WeightError(f'latest names "{tag}", which is no committed checkpoint', where=str(directory))
    raise WeightError(
        "holds no checkpoint",
        where=str(path),
        fix="expected an .npz, a run directory, its checkpoints/ (with latest), or one global_stepN/ with its manifest",
    )


def _read_manifest_header(path: Path) -> WeightsHeader:
    directory = resolve_checkpoint(path)
    try:
        info = read_manifest(directory).info
        height, width = info["image_size"]
        spec = get_spec(info["model"])
        data = {"mean": info["mean"], "std": info["std"]} if "mean" in info else {}
        data |= info.get("config", {}).get("vitds", {}).get("data", {})
        return WeightsHeader(
            spec,
            (height, width),
            info["num_classes"],
            info["pre_logits"],
            "checkpoint",
            classes=info.get("classes"),
            data={key: data[key] for key in _PREPROCESSING if key in data} or None,
            dtype=info.get("dtype", "fp32"),
        )
    except CheckpointError as error:
        raise WeightError(error.what, where=error.where) from None
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise WeightError(f"MANIFEST.json does not describe a model: {error!r}", where=str(directory)) from None


def _read_file_header(path: Path) -> WeightsHeader:
    file = read_array_file(path)
    found = google.read_layout(file.shapes)
    return _checked(path, file, found)


def _checked(path: Path, file: ArrayFile, found: Found) -> WeightsHeader:
    """The header that a layout found, when the file holds every array of it and no other.

    Raises: WeightError that names what is missing, extra, refused, or of the wrong shape.
    """
    shapes: Shapes = {key: shape for key, shape in file.shapes.items() if key not in found.ignored}
    problems = file.refused + differences(shapes, found.arrays, compare_shapes=not found.unknown)
    if problems or found.unknown:
        what = "not a ViT in a layout that is known"
        if found.unknown:
            what += ", no array gives its " + ", ".join(found.unknown)
        shown = problems[:_MAX_LINES] + [f"and {len(problems) - _MAX_LINES} more"] * (len(problems) > _MAX_LINES)
        raise WeightError(what, where=str(path), fix="\n".join(shown))
    try:
        spec = get_spec(named(found.spec).name)
    except ConfigError as error:
        raise WeightError(f"no model that can be built: {error.what}", where=str(path), fix=error.fix) from None
    return WeightsHeader(
        spec, found.image_size, found.num_classes, found.pre_logits, file.format, arrays=found.arrays, notes=found.notes
    )
