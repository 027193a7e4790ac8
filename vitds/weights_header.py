"""What a weights file or checkpoint is of: architecture, image size, head, classes, preprocessing. Without torch.

A file is read by the headers of its arrays alone (`vitds.layouts`); a directory says it in its MANIFEST.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from vitds.errors import CheckpointError, ConfigError, WeightError, did_you_mean
from vitds.layouts.array import ForeignArray, Shapes, differences, shape_for
from vitds.layouts.files import ArrayFile, read_array_file
from vitds.layouts.found import Found, assumed_note
from vitds.layouts.own import parameters
from vitds.layouts.recognise import DESCRIPTION_KEYS, recognise
from vitds.manifest import MANIFEST_NAME, read_manifest
from vitds.model.registry import CONVENTIONS, ModelSpec, get_spec, named, num_parameters, split_name
from vitds.published_weights import how_to_fetch
from vitds.run_config import check_entry

_MAX_LINES = 8
# How the weights' images were prepared: these entries of the run's "data" section travel with the weights.
PREPROCESSING = ("eval_crop", "crop_fraction", "interpolation", "mean", "std")
# The weights of a timm or Hugging Face directory, the first that is there; an index names the files of large models.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_READABLE = ("float32", "float16", "bfloat16", "float64")
_READABLE_NPZ = ("float32", "bfloat16")


@dataclass(frozen=True)
class WeightsHeader:
    """What the weights are of.

    Units: image_size is (height, width) in pixels; num_classes is 0 without a head; pre_logits is that layer's width.
    `classes` are names by label and `data` the entries of DataConfig that prepare an image, each None when the weights
    do not say; `dtype` (fp32, bf16, fp16) is the precision in which their run evaluates them, and `loss` (softmax, bce)
    what it minimised, so what an output means; `arrays` is how a file's arrays become our parameters, empty for a
    checkpoint; `files` hold them, below `section` in a PyTorch file; `assumed` are quantities that no array gives, and
    `must_be_named` weights that only an architecture's name makes readable; `notes` are lines that the user should see.
    """

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None
    format: Literal["npz", "safetensors", "torch", "checkpoint"]
    classes: list[str] | None = None
    data: dict[str, Any] | None = None
    dtype: str = "fp32"
    loss: str = "softmax"
    arrays: tuple[ForeignArray, ...] = field(default=(), repr=False, compare=False)
    files: tuple[Path, ...] = field(default=(), repr=False, compare=False)
    section: tuple[str, ...] = field(default=(), repr=False, compare=False)
    assumed: tuple[str, ...] = field(default=(), repr=False, compare=False)
    must_be_named: bool = field(default=False, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people: model, image size, classes, pre_logits, parameters."""
        (height, width), classes = self.image_size, self.num_classes
        count = num_parameters(self.spec, self.image_size, classes, self.pre_logits)
        head = f"{classes} classes" if classes else "no head"
        head += f", pre_logits of {self.pre_logits}" * (self.pre_logits is not None)
        return f"{self.spec.name}, {height} x {width} px, {head}, {count:,} parameters"


def read_header(path: str | Path, model: str | None = None) -> WeightsHeader:
    """What the weights at `path` are of.

    It is a weights file (.npz, .safetensors, .pth), a timm or Hugging Face directory, a run directory, its
    checkpoints/, one global_stepN/, or a pointer to one (checkpoints/best); what it holds decides, not its name.
    `model` is the architecture that they are asked for, with or without modifiers; without it, or with "auto", it is
    read off the shapes. Conventions that shapes do not tell (GELU, resizing, epsilon) are the weights' own, unless
    `model` states them; heads that no array tells are those of `model`. What is guessed then is in the notes.

    Raises: WeightError when there is nothing, when arrays are missing, extra, pickled or of the wrong shape or type
    (each one named), or when they are of another model than the one asked for.
    """
    path = Path(path)
    base, stated = split_name(model) if model else ("auto", {})
    wanted = get_spec(model) if model and base != "auto" else None
    if not path.exists():
        raise WeightError("does not exist", where=str(path), fix=how_to_fetch(path.name))
    header = _read_any(path)
    if header.must_be_named and wanted is None:
        raise WeightError(
            "its arrays have vitds' own names, and none of them tells the number of heads",
            where=str(path),
            fix="name the model: --model ViT-B_16, or custom:...,heads=...\n"
            "or export the weights with tools/export_weights.py, which records it",
        )
    if "heads" in header.assumed and wanted is not None:
        header = replace(header, spec=replace(header.spec, heads=wanted.heads))
    told = {*stated, "heads"} if wanted is not None else set(stated)
    if guessed := [quantity for quantity in header.assumed if quantity not in told]:
        header = replace(header, notes=(*header.notes, assumed_note(header.spec, guessed)))
    if wanted is None:
        wanted = named(replace(header.spec, **stated))
    differing = list(_differing(header, wanted, stated))
    if differing:
        differing += _first_array(header, wanted)
        differing.append(f"without a model's name, or with --model auto, {header.spec.name} is taken")
        raise WeightError(f"of {header.spec.name}, not {wanted.name}", where=str(path), fix="\n".join(differing))
    return replace(
        header, spec=named(replace(header.spec, **{key: stated[key] for key in CONVENTIONS if key in stated}))
    )


def stated_preprocessing(settings: Sequence[str]) -> dict[str, Any]:
    """Entries of DataConfig out of `data.mean=[0.485,0.456,0.406]` and the like, for weights that do not state theirs.

    Raises: ConfigError for an entry that does not prepare images for evaluation, or a value that is not valid.
    """
    stated = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = key.removeprefix("data.")
        if name not in PREPROCESSING or not equals:
            valid = [f"data.{entry}" for entry in PREPROCESSING]
            raise ConfigError(f'"{setting}" sets no preprocessing', where="--set", fix=did_you_mean(key, valid))
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        try:
            stated[name] = check_entry(f"data.{name}", value)
        except ValueError as error:
            raise ConfigError(f'"data.{name}" {error}', where="--set") from None
    return stated


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


def _first_array(header: WeightsHeader, wanted: ModelSpec) -> Iterator[str]:
    """A line for the first array of a file that `wanted` would have otherwise, or not at all."""
    theirs = parameters(wanted, 1, header.num_classes, header.pre_logits)
    for array in header.arrays:
        if not array.key or array.rows or array.name == "pos_embed":  # positions depend on the image size too
            continue
        if array.name not in theirs:
            yield f"{array.key} {array.shape}: {wanted.name} has no such array"
            return
        expected = shape_for(array, theirs[array.name], wanted.heads, wanted.depth)
        if expected != array.shape:
            yield f"{array.key} {array.shape}, expected {expected}"
            return
    known = {array.name for array in header.arrays}
    if known and (missing := next((name for name in theirs if name not in known), None)):
        yield f"no array for {missing} {theirs[missing]} of {wanted.name}"


def resolve_checkpoint(path: str | Path) -> Path:
    """The global_stepN directory meant by a run directory, its checkpoints/, a pointer file in there, or itself.

    Raises: WeightError when there is no committed checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise WeightError("does not exist", where=str(path))
    if (path / MANIFEST_NAME).is_file():
        return path
    for pointer in (path, path / "latest", path / "checkpoints" / "latest"):
        if pointer.is_file():
            tag = _pointed_to(pointer)
            if tag and (pointer.parent / tag / MANIFEST_NAME).is_file():
                return pointer.parent / tag
            what = f'{pointer.name} names "{tag or ""}", which is no committed checkpoint'
            raise WeightError(what, where=str(pointer.parent))
    raise WeightError(
        "holds no checkpoint",
        where=str(path),
        fix="expected a weights file (.npz, .safetensors, .pth), a timm or Hugging Face directory (config.json and "
        "model.safetensors),\na run directory, its checkpoints/ (with latest), or one global_stepN/ with its manifest",
    )


def _pointed_to(path: Path) -> str | None:
    """The global_stepN that a pointer file names, None for any other file."""
    with open(path, "rb") as stream:
        text = stream.read(64)
    match = re.fullmatch(rb"(global_step\d+)\s*", text)
    return match[1].decode() if match else None


def _read_any(path: Path) -> WeightsHeader:
    if path.is_dir():
        for name in _WEIGHT_FILES:
            if (path / name).is_file():
                return _read_file_header(path / name, path)
        if (path / "config.json").is_file():
            expected = ", ".join(_WEIGHT_FILES)
            raise WeightError("has a config.json and no weights", where=str(path), fix=f"expected one of {expected}")
        return _read_manifest_header(path)
    if not path.is_file():  # a pipe or a device has no end
        raise WeightError("is no file", where=str(path))
    try:
        if _pointed_to(path):
            return _read_manifest_header(path)
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    # A file under the name that it has in a directory is read with what lies beside it.
    return _read_file_header(path, path.parent if path.name in _WEIGHT_FILES else None)


def _read_manifest_header(path: Path) -> WeightsHeader:
    directory = resolve_checkpoint(path)
    try:
        info = read_manifest(directory).info
        height, width = info["image_size"]
        spec = get_spec(info["model"])
        data = {"mean": info["mean"], "std": info["std"]} if "mean" in info else {}
        data |= info.get("data") or info.get("config", {}).get("vitds", {}).get("data", {})
        return WeightsHeader(
            spec,
            (height, width),
            info["num_classes"],
            info["pre_logits"],
            "checkpoint",
            classes=info.get("classes"),
            data={key: data[key] for key in PREPROCESSING if key in data} or None,
            dtype=info.get("dtype", "fp32"),
            loss=info.get("loss") or info.get("config", {}).get("vitds", {}).get("loss", "softmax"),
            notes=() if data else ("no preprocessing is recorded with these weights",),
        )
    except CheckpointError as error:
        raise WeightError(error.what, where=error.where) from None
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise WeightError(f"MANIFEST.json does not describe a model: {error!r}", where=str(directory)) from None


def _read_file_header(path: Path, directory: Path | None = None) -> WeightsHeader:
    """The header of one file, or of an index and its files; `directory` may hold a config.json that describes them."""
    files = _indexed_files(path) if path.suffix == ".json" else {path: None}
    read = {one: read_array_file(one) for one in files}
    file = next(iter(read.values()))
    if len(read) > 1 or path.suffix == ".json":
        for one, keys in files.items():
            if missing := sorted(set(keys or ()) - read[one].shapes.keys()):
                raise WeightError(f"missing {missing[0]}, which {path.name} says is here", where=str(one))
        shapes = {key: shape for one in read.values() for key, shape in one.shapes.items()}
        dtypes = {key: dtype for one in read.values() for key, dtype in one.dtypes.items()}
        file = replace(file, shapes=shapes, dtypes=dtypes)
    config = preprocessor = None
    if directory is not None:
        config, preprocessor = (_json(directory / name) for name in ("config.json", "preprocessor_config.json"))
    description = _described_beside(path) if file.format == "npz" else None
    try:
        found = recognise(file, config, preprocessor, description)
        header = _checked(directory or path, file, found)
    except WeightError as error:
        beside = f"\n{path.with_suffix('.json')} says that it is of {description.get('model')}" if description else ""
        raise WeightError(error.what, where=str(directory or path), fix=error.fix + beside) from None
    return replace(header, files=tuple(files), section=file.section)


def _indexed_files(index: Path) -> dict[Path, list[str]]:
    """The files of a model that was saved in pieces, each with the keys that it holds."""
    body = _json(index) or {}
    files: dict[Path, list[str]] = {}
    for key, name in (body.get("weight_map") or {}).items():
        if not isinstance(name, str) or name != Path(name).name or not name.isprintable():
            raise WeightError(f"{key} is said to be in {name!r}, which is no file beside it", where=str(index))
        files.setdefault(index.parent / name, []).append(key)
    if not files:
        raise WeightError('has no "weight_map"', where=str(index))
    return files


def _described_beside(path: Path) -> dict[str, Any] | None:
    """What vitds wrote beside an .npz that it exported, for the format itself has no place for it."""
    body = _json(path.with_suffix(".json"))
    return body if body and body.keys() >= DESCRIPTION_KEYS else None


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file."""
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(body, dict):
        raise WeightError("is no JSON object", where=str(path))
    return body


def _checked(path: Path, file: ArrayFile, found: Found) -> WeightsHeader:
    """The header that a layout found, when the file holds every array of it and no other.

    Raises: WeightError that names what is missing, extra, refused, or of the wrong shape.
    """
    shapes: Shapes = {key: shape for key, shape in file.shapes.items() if key not in found.ignored}
    types = {array.key: file.dtypes[array.key] for array in found.arrays if array.key in file.dtypes}
    readable = _READABLE_NPZ if file.format == "npz" else _READABLE
    problems = [
        f"{key} holds pickled Python objects: never loaded"
        if dtype == "object"
        else f"{key} is {dtype}: {', '.join(readable)} are read"
        for key, dtype in types.items()
        if dtype not in readable
    ]
    problems += differences(shapes, found.arrays, compare_shapes=not found.unknown)
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
    rounded = ["stored in float64: rounded to float32"] if "float64" in types.values() else []
    return WeightsHeader(
        spec,
        found.image_size,
        found.num_classes,
        found.pre_logits,
        file.format,
        classes=found.classes,
        data=found.data,
        loss=found.loss,
        arrays=found.arrays,
        assumed=found.assumed,
        must_be_named=found.must_be_named,
        notes=(*file.notes, *found.notes, *rounded),
    )
