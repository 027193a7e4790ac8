"""Every target, and the one way to write any of them: beside its place, checked, and renamed when it is whole.

torch is imported only by the targets that are programs (onnx, torch-export), and to resize positions: importing it
takes more memory than writing any model does otherwise.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitds.durable import directories_for, fsync, put_in_place
from vitds.errors import UsageError, WeightError
from vitds.layouts.array import ForeignArray, differences
from vitds.layouts.files import read_array_file
from vitds.layouts.google import written_layout
from vitds.layouts.own import own_layout
from vitds.model.registry import grid_size
from vitds.run_config import DataConfig
from vitds.weights.export.huggingface import huggingface_layout, write_huggingface
from vitds.weights.export.refusal import refuse_what_is_lost
from vitds.weights.export.stream import OnBytes, num_bytes, write_npz, write_safetensors
from vitds.weights.export.timm import timm_layout, write_timm
from vitds.weights.lazy import LazyArrays
from vitds.weights.open import NOT_FINITE, OpenWeights
from vitds.weights_header import WeightsHeader, read_header

_MAX_LINES = 8


@dataclass(frozen=True)
class Target:
    """One format: how it is written, and how it is loaded.

    `write(path, weights, data, on_bytes)` makes a file, or a directory when `suffix` is empty; `beside` are suffixes of
    files that it makes next to it. `gelu` says where the reader finds which GELU it is, `resize` how readers resample
    positions. `arrays` is the part of the result that `layout` describes, and that is read back.
    """

    write: Callable[[Path, OpenWeights, DataConfig, OnBytes], None]
    loading: Sequence[str]
    gelu: Mapping[str, str]
    resize: str | None = None
    suffix: str = ""
    beside: Sequence[str] = ()
    arrays: str = ""
    layout: Callable[[WeightsHeader], Sequence[ForeignArray]] | None = None


def own_arrays(header: WeightsHeader) -> Sequence[ForeignArray]:
    """Every array of the model under our own name."""
    return own_layout(header.spec, header.image_size, header.num_classes, header.pre_logits)


def google_arrays(header: WeightsHeader) -> Sequence[ForeignArray]:
    """Every array of the model in Google's layout; positions that a formula gives are not stored."""
    layout = written_layout(header.spec, header.image_size, header.num_classes, header.pre_logits)
    return tuple(entry for entry in layout if entry.key)


def description(header: WeightsHeader) -> dict[str, Any]:
    """What exported weights say of themselves; `read_header` reads it."""
    return {
        "model": header.spec.name,
        "image_size": list(header.image_size),
        "num_classes": header.num_classes,
        "pre_logits": header.pre_logits,
        "classes": header.classes,
        "data": header.data,
    } | ({"loss": header.loss} if header.loss != "softmax" else {})


def _write_safetensors(path: Path, weights: OpenWeights, _: DataConfig, on_bytes: OnBytes) -> None:
    metadata = {"format": "pt", "vitds": json.dumps(description(weights.header), ensure_ascii=False)}
    write_safetensors(path, weights.arrays, own_arrays(weights.header), metadata, on_bytes)


def _write_npz(path: Path, weights: OpenWeights, _: DataConfig, on_bytes: OnBytes) -> None:
    write_npz(path, weights.arrays, google_arrays(weights.header), on_bytes)
    text = json.dumps(description(weights.header), indent=1, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def _write_onnx(path: Path, weights: OpenWeights, data: DataConfig, on_bytes: OnBytes) -> None:
    from vitds.weights.export.onnx import write_onnx

    write_onnx(path, weights, description(weights.header), data, on_bytes)


def _write_program(path: Path, weights: OpenWeights, data: DataConfig, on_bytes: OnBytes) -> None:
    from vitds.weights.export.program import write_program

    write_program(path, weights, description(weights.header), data, on_bytes)


TARGETS = {
    "safetensors": Target(
        _write_safetensors,
        loading=['vitds.create_model("auto", weights="{out}")', 'safetensors.torch.load_file("{out}")'],
        gelu={"tanh": "in the file's metadata", "erf": "in the file's metadata"},
        suffix=".safetensors",
        layout=own_arrays,
    ),
    "timm": Target(
        write_timm,
        loading=[
            'timm.create_model("local-dir:{out}", pretrained=True)',
            'transformers.AutoModelForImageClassification.from_pretrained("{out}")  # with timm installed',
        ],
        gelu={"tanh": 'act_layer "gelu_tanh" in config.json', "erf": "timm's default"},
        resize="bicubic",
        arrays="model.safetensors",
        layout=timm_layout,
    ),
    "hf": Target(
        write_huggingface,
        loading=[
            'transformers.ViTForImageClassification.from_pretrained("{out}")',
            'transformers.pipeline("image-classification", model="{out}")',
        ],
        gelu={"tanh": 'hidden_act "gelu_pytorch_tanh" in config.json', "erf": 'hidden_act "gelu" in config.json'},
        resize="bicubic without antialiasing",
        arrays="model.safetensors",
        layout=huggingface_layout,
    ),
    "npz": Target(
        _write_npz,
        loading=['vitds.create_model("auto", weights="{out}")', 'numpy.load("{out}")  # Google\'s names'],
        gelu={"tanh": "Google's code has no other"},
        resize="bilinear",
        suffix=".npz",
        beside=[".json"],
        layout=google_arrays,
    ),
    "onnx": Target(
        _write_onnx,
        loading=['onnxruntime.InferenceSession("{out}")  # opset 20'],
        gelu={"tanh": "part of the graph", "erf": "part of the graph"},
        suffix=".onnx",
        beside=[".onnx.data"],
    ),
    "torch-export": Target(
        _write_program,
        loading=['torch.export.load("{out}").module()'],
        gelu={"tanh": "part of the program", "erf": "part of the program"},
        suffix=".pt2",
    ),
}


def notes_for(target: str, header: WeightsHeader, source: WeightsHeader) -> list[str]:
    """What the receiver of an export should know; `source` is the header of the weights before any resizing."""
    spec, resize = header.spec, TARGETS[target].resize
    kind = "the tanh approximation" if spec.gelu == "tanh" else "the exact one (erf)"
    notes = [f"GELU is {kind}: {TARGETS[target].gelu[spec.gelu]}"]
    if header.image_size != source.image_size:
        notes.append(f"positions resized from {source.image_size[0]} x {source.image_size[1]} px, {spec.resize}")
    if resize not in (None, spec.resize):
        notes.append(
            f"at another image size {target} readers resize positions otherwise ({resize}, these weights are "
            f"{spec.resize}): export with --image-size instead"
        )
    if header.classes is None and header.num_classes:
        notes.append("the weights name no classes")
    if header.data is None:
        notes.append(
            "the weights state no preprocessing: Google's is taken (squash, bilinear, mean 0.5, std 0.5); "
            "--set data.mean=... states another"
        )
    return notes


def check_place(out: Path, target: str) -> None:
    """Raises: UsageError when OUT exists, or has not the suffix that its readers want."""
    suffix = TARGETS[target].suffix
    if not out.name.endswith(suffix):
        raise UsageError(f"{target} is a file *{suffix}", where=str(out), fix=f"name it {out.name}{suffix}")
    for path in (out, *(out.with_suffix(beside) for beside in TARGETS[target].beside)):
        if path.exists() or path.is_symlink():
            raise UsageError("exists", where=str(path), fix="name another OUT, or remove it yourself first")


def total_bytes(weights: OpenWeights) -> int:
    """How many bytes of arrays a target writes, nearly."""
    return sum(num_bytes(entry.shape) for entry in own_arrays(weights.header))


def resized(weights: OpenWeights, image_size: tuple[int, int]) -> OpenWeights:
    """The same weights for another image size: positions are resampled, by the model's own convention.

    Raises: ConfigError when the size does not fit the patches.
    """
    header = weights.header
    grid_size(header.spec, image_size)
    if image_size == header.image_size:
        return weights

    def positions() -> np.ndarray:
        import torch

        from vitds.weights.load import positions_at

        return positions_at(image_size, torch.from_numpy(weights.arrays["pos_embed"]), header).numpy()

    makers = {name: partial(weights.arrays.__getitem__, name) for name in weights.arrays}
    arrays = LazyArrays(makers).replaced("pos_embed", positions)
    return OpenWeights(arrays, replace(header, image_size=image_size))


def export_weights(weights: OpenWeights, out: Path, target: str, on_bytes: OnBytes = lambda _: None) -> None:
    """Write the weights for a target; OUT appears whole, or not at all. Missing parent directories are made.

    Raises: UsageError when OUT exists or the target cannot express the model; WeightError when a parameter is missing,
    of another shape, or one too many, or when OUT cannot be written.
    """
    check_place(out, target)
    refuse_what_is_lost(weights.header, target)
    weights = _checked(weights)
    data = DataConfig(**(weights.header.data or {}))
    try:
        with (
            directories_for(out),
            tempfile.TemporaryDirectory(prefix=f".{out.name}.writing-", dir=out.parent) as directory,
        ):
            written = Path(directory) / out.name
            TARGETS[target].write(written, weights, data, on_bytes)
            _check_written(written, weights.header, TARGETS[target])
            check_place(out, target)  # nobody else has written there meanwhile
            _publish(written, out)
    except OSError as error:
        fix = "nothing was left behind"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"{shutil.disk_usage(_existing(out.parent)).free / 2**30:.2f} GiB are free there; {fix}"
        raise WeightError(f"cannot be written: {error.strerror or error}", where=str(out), fix=fix) from None


def _checked(weights: OpenWeights) -> OpenWeights:
    """The same weights, of which each array is found to have the shape that it must have when it is made.

    Nothing may be missing, and nothing is left out without a word.
    """
    expected = {entry.name: entry.shape for entry in own_arrays(weights.header)}
    lines = [f"missing {name}" for name in expected if name not in weights.arrays]
    lines += [f"extra {name}" for name in weights.arrays if name not in expected]
    if lines:
        what = f"not the parameters of {weights.header.spec.name}"
        raise WeightError(what, fix="\n".join(sorted(lines)[:_MAX_LINES]))

    def make(name: str) -> np.ndarray:
        array = weights.arrays[name]
        if array.shape != expected[name]:
            raise WeightError(f"{name} has shape {array.shape}, expected {expected[name]}")
        if not np.isfinite(array).all():
            raise WeightError(f"{name} {NOT_FINITE}")
        return array

    return replace(weights, arrays=LazyArrays({name: partial(make, name) for name in expected}))


def _check_written(path: Path, header: WeightsHeader, target: Target) -> None:
    """Read back what was written: every array of the layout, no other, and the model that they are of."""
    if target.layout is None:  # programs read themselves back
        return
    wrong = differences(read_array_file(path / target.arrays).shapes, target.layout(header))
    if not wrong and _essence(found := read_header(path)) != _essence(header):
        wrong = [f"it reads as {found}, with {'no' if found.classes is None else len(found.classes)} class names"]
    if wrong:
        raise WeightError("differs from what was written", where=str(path), fix="\n".join(wrong[:_MAX_LINES]))


def _essence(header: WeightsHeader) -> tuple[Any, ...]:
    """What every format keeps; how positions are resized and whether a formula gave them, some do not."""
    spec = replace(header.spec, name="", resize="", positions="")
    return spec, header.image_size, header.num_classes, header.pre_logits, header.classes


def _publish(written: Path, out: Path) -> None:
    """Move everything that lies beside `written` to where OUT is to be, OUT itself last."""
    for path in [*written.parent.rglob("*"), written.parent]:
        fsync(path)
    moved: list[Path] = []
    try:
        for path in sorted(written.parent.iterdir(), key=lambda path: path == written):
            put_in_place(path, out.parent / path.name)
            moved.append(out.parent / path.name)
    except OSError:
        for path in moved:
            path.unlink()
        raise
    fsync(out.parent)


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory
