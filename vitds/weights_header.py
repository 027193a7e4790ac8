"""What a weights file or checkpoint is of: architecture, image size and head, read without torch and without weights.

An .npz is read by its member headers alone (shape and dtype of each array), in the layout of Google's published ViT
files; a directory says it in its MANIFEST.json.

    gs://vit_models/{imagenet21k,imagenet21k+imagenet2012,augreg}/*.npz
    W width, F mlp width, N heads, K head width, P patch size, C classes or channels, T tokens

`google_layout` is the one table of that format: the conversion to our parameter names, and back, is read off it.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from vitds.errors import CheckpointError, ConfigError, WeightError
from vitds.manifest import MANIFEST_NAME, read_manifest
from vitds.model.registry import ModelSpec, get_spec, named, pixels_per_token

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_MAX_LINES = 8


@dataclass(frozen=True)
class WeightsHeader:
    """What the weights are of. Units: image_size is (height, width) in pixels; pre_logits is that layer's width."""

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None
    format: Literal["npz", "checkpoint"]


@dataclass(frozen=True)
class GoogleArray:
    """One array of Google's layout: its key, its shape there, and the parameter of ours that it fills.

    `part` is 0, 1, 2 for the query, key and value thirds of a fused parameter's rows. `heads_first` marks the kernel
    whose two leading axes (heads, head width) are its inputs.
    """

    key: str
    shape: tuple[int, ...]
    name: str
    part: int | None = None
    heads_first: bool = False


def google_layout(
    spec: ModelSpec, num_positions: int, num_classes: int, pre_logits: int | None
) -> Iterator[GoogleArray]:
    """Every array of Google's file for this model; GroupNorm vectors in their published shape (1, 1, 1, C).

    Raises: WeightError for a model with parts that the layout has no place for.
    """
    extras = (spec.pooling != "token", spec.registers, spec.layer_scale is not None, spec.qk_norm)
    if any(extras):
        raise WeightError(f"Google's layout has no place for all of {spec.name}", fix="it holds class-token ViTs only")
    width, mlp, heads, head_width = spec.width, spec.mlp, spec.heads, spec.width // spec.heads
    channels = spec.in_channels
    if spec.resnet is not None:
        yield from _stem_layout(spec)
        channels = spec.resnet_width * (4 * 2 ** (len(spec.resnet) - 1) if spec.resnet else 1)

    patch = spec.patch_size
    yield GoogleArray("embedding/kernel", (patch, patch, channels, width), "patch_embed.weight")
    yield GoogleArray("embedding/bias", (width,), "patch_embed.bias")
    yield GoogleArray("cls", (1, 1, width), "cls_token")
    yield GoogleArray(_POSITIONS, (1, num_positions, width), "pos_embed")
    for i in range(spec.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        yield from _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1", (width,))
        for part, projection in enumerate(("query", "key", "value")):
            kernel, bias = f"{attention}/{projection}/kernel", f"{attention}/{projection}/bias"
            yield GoogleArray(kernel, (width, heads, head_width), f"{ours}.attn.qkv.weight", part)
            yield GoogleArray(bias, (heads, head_width), f"{ours}.attn.qkv.bias", part)
        out = (heads, head_width, width)
        yield GoogleArray(f"{attention}/out/kernel", out, f"{ours}.attn.proj.weight", heads_first=True)
        yield GoogleArray(f"{attention}/out/bias", (width,), f"{ours}.attn.proj.bias")
        yield from _norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2", (width,))
        yield from _dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1", width, mlp)
        yield from _dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2", mlp, width)
    yield from _norm("Transformer/encoder_norm", "norm", (width,))
    if pre_logits is not None:
        yield from _dense("pre_logits", "head.pre_logits", width, pre_logits)
    yield from _dense("head", "head", pre_logits or width, num_classes)


def _stem_layout(spec: ModelSpec) -> Iterator[GoogleArray]:
    root = spec.resnet_width
    yield GoogleArray("conv_root/kernel", (7, 7, spec.in_channels, root), "stem.conv_root.weight")
    yield from _norm("gn_root", "stem.gn_root", (1, 1, 1, root))
    channels = root
    for block, units in enumerate(spec.resnet or (), start=1):
        inner = root * 2 ** (block - 1)
        for unit in range(1, units + 1):
            convolutions = [("1", 1, channels, inner), ("2", 3, inner, inner), ("3", 1, inner, 4 * inner)]
            if unit == 1:
                convolutions.append(("_proj", 1, channels, 4 * inner))
            theirs, ours = f"block{block}/unit{unit}", f"stem.block{block}.unit{unit}"
            for suffix, size, fan_in, fan_out in convolutions:
                shape = (size, size, fan_in, fan_out)
                yield GoogleArray(f"{theirs}/conv{suffix}/kernel", shape, f"{ours}.conv{suffix}.weight")
                yield from _norm(f"{theirs}/gn{suffix}", f"{ours}.gn{suffix}", (1, 1, 1, fan_out))
            channels = 4 * inner


def _norm(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[GoogleArray]:
    yield GoogleArray(f"{theirs}/scale", shape, f"{ours}.weight")
    yield GoogleArray(f"{theirs}/bias", shape, f"{ours}.bias")


def _dense(theirs: str, ours: str, num_in: int, num_out: int) -> Iterator[GoogleArray]:
    yield GoogleArray(f"{theirs}/kernel", (num_in, num_out), f"{ours}.weight")
    yield GoogleArray(f"{theirs}/bias", (num_out,), f"{ours}.bias")


def read_header(path: str | Path, model: str | None = None) -> WeightsHeader:
    """What the weights at `path` are of: an .npz, a run directory, its checkpoints/, or one global_stepN/.

    `model` is the architecture that they are asked for; without it, it is read off the shapes.

    Raises: WeightError when there is nothing, when arrays are missing, extra, pickled or of the wrong shape or type
    (each one named), or when they are of another model than the one asked for.
    """
    path = Path(path)
    wanted = get_spec(model) if model else None
    if not path.exists():
        raise WeightError("does not exist", where=str(path))
    header = _read_manifest_header(path) if path.is_dir() else _read_npz_header(path)
    if wanted is None:
        return header
    ignored = {"name"} | ({"gelu"} if header.format == "npz" else set())  # an .npz does not say its GELU
    differing = [
        f"{field.name}: {getattr(header.spec, field.name)}, {wanted.name} has {getattr(wanted, field.name)}"
        for field in fields(ModelSpec)
        if field.name not in ignored and getattr(header.spec, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise WeightError(f"of {header.spec.name}, not {wanted.name}", where=str(path), fix="\n".join(differing))
    return replace(header, spec=wanted)


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
        return WeightsHeader(spec, (height, width), info["num_classes"], info["pre_logits"], "checkpoint")
    except CheckpointError as error:
        raise WeightError(error.what, where=error.where) from None
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise WeightError(f"MANIFEST.json does not describe a model: {error!r}", where=str(directory)) from None


def _read_npz_header(path: Path) -> WeightsHeader:
    shapes, problems = _npz_shapes(path)
    spec, unknown = _infer(shapes)
    num_classes = _vote(shapes, r"head/(kernel|bias)", -1) or 0
    pre_logits = _vote(shapes, r"pre_logits/(kernel|bias)", -1)
    grid = max(math.isqrt(max(_vote(shapes, re.escape(_POSITIONS), -2) or 0, 1) - 1), 1)

    layout = google_layout(spec, 1 + grid * grid, num_classes, pre_logits)
    problems += _differences(shapes, {array.key: array.shape for array in layout}, compare_shapes=not unknown)
    if problems or unknown:
        what = "not a ViT in Google's layout"
        if unknown:
            what += ", no array gives its " + ", ".join(unknown)
        shown = problems[:_MAX_LINES] + [f"and {len(problems) - _MAX_LINES} more"] * (len(problems) > _MAX_LINES)
        raise WeightError(what, where=str(path), fix="\n".join(shown))
    try:
        spec = get_spec(named(spec).name)
    except ConfigError as error:
        raise WeightError(f"no model that can be built: {error.what}", where=str(path), fix=error.fix) from None
    side = grid * pixels_per_token(spec)
    return WeightsHeader(spec, (side, side), num_classes, pre_logits, "npz")


def _npz_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shape of every array in an .npz, by the member headers alone, and a line for each pickled or not float32.

    Raises: WeightError when the file is no zip of .npy members.
    """
    from numpy.lib import format as npy  # most starts have no .npz to read

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes = {}
    refused = []
    member = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, _, dtype = readers[npy.read_magic(stream)](stream)
                shapes[key] = shape
                if dtype.hasobject:
                    refused.append(f"{key} holds pickled Python objects: never loaded")
                elif dtype != "float32":
                    refused.append(f"{key} is {'bfloat16' if dtype.str == '|V2' else dtype}: only float32 is read")
    except zipfile.BadZipFile as error:
        raise WeightError(f"no .npz, or a truncated one: {error}", where=str(path)) from None
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise WeightError(f'member "{member}" is no .npy array: {error}', where=str(path)) from None
    return shapes, refused


def _infer(shapes: dict[str, tuple[int, ...]]) -> tuple[ModelSpec, list[str]]:
    """Read the architecture off the shapes, and list what they do not tell.

    Where arrays disagree the majority decides, so that a single wrong one is found by comparing with the result.
    """
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"Transformer/encoderblock_(\d{1,3})/", key))}
    units: Counter[int] = Counter()
    for key in shapes:
        if m := re.match(r"block(\d)/unit(\d{1,2})/", key):
            units[int(m[1])] = max(units[int(m[1])], int(m[2]))
    is_hybrid = bool(units) or "conv_root/kernel" in shapes
    block = r"Transformer/encoderblock_\d+"
    votes = {
        "width": _vote(shapes, rf"{block}/LayerNorm_[02]/(scale|bias)", -1),
        "heads": _vote(shapes, rf"{block}/MultiHeadDotProductAttention_1/(query|key|value)/(kernel|bias)", -2),
        "mlp": _vote(shapes, rf"{block}/MlpBlock_3/Dense_0/(kernel|bias)", -1),
        "patch_size": _vote(shapes, "embedding/kernel", -4),
        "in_channels": _vote(shapes, "conv_root/kernel" if is_hybrid else "embedding/kernel", -2),
    }
    if is_hybrid:
        votes["resnet_width"] = _vote(shapes, r"conv_root/kernel|gn_root/(scale|bias)", -1)
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    if is_hybrid:
        sizes["resnet"] = tuple(units[stage] for stage in range(1, max(units, default=0) + 1))
    unknown = [quantity for quantity, size in votes.items() if not size]
    return ModelSpec(name="", depth=max(blocks, default=-1) + 1, **sizes), unknown


def _vote(shapes: dict[str, tuple[int, ...]], pattern: str, axis: int) -> int | None:
    """The most frequent size of one axis among the arrays whose key matches, None without any."""
    sizes = Counter(
        shape[axis] for key, shape in shapes.items() if len(shape) >= abs(axis) and re.fullmatch(pattern, key)
    )
    return sizes.most_common(1)[0][0] if sizes else None


def _differences(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], compare_shapes: bool
) -> list[str]:
    """One line for each array that is missing, of another shape, or extra."""

    def fits(key: str) -> bool:
        # Some writers drop the leading ones of the GroupNorm vectors.
        return found[key] == expected[key] or (expected[key][:3] == (1, 1, 1) and found[key] == expected[key][3:])

    lines = [f"missing {key}" for key in expected if key not in found]
    if compare_shapes:
        differing = [key for key in expected if key in found and not fits(key)]
        lines += [f"wrong shape {key}: {found[key]}, expected {expected[key]}" for key in differing]
    return lines + [f"extra {key} {found[key]}" for key in found if key not in expected]
