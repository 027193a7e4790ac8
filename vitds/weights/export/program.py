"""The model as a program of torch.export: a .pt2 file that runs without vitds, for any batch size.

The program is traced without weights, saved empty, and filled array by array: torch.export.save wants all of them at
once. What is filled is the archive's documented layout.
Source: https://docs.pytorch.org/docs/stable/export/pt2_archive.html
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from vitds.model.vit import VisionTransformer
from vitds.run_config import DataConfig
from vitds.weights.export.stream import OnBytes, check_held
from vitds.weights.open import OpenWeights
from vitds.weights_header import WeightsHeader

_CONFIG = "data/weights/model_weights_config.json"
BATCH = {0: torch.export.Dim("batch", min=1)}


def traceable(header: WeightsHeader) -> tuple[VisionTransformer, Tensor]:
    """The model with memory for its parameters that nothing has touched yet, and images to trace it with."""
    with torch.device("meta"):
        model = VisionTransformer(header.spec, header.image_size, header.num_classes, header.pre_logits)
    model.to_empty(device="cpu").requires_grad_(False).eval()
    return model, torch.zeros(2, header.spec.in_channels, *header.image_size)


def program_properties(description: Mapping[str, object], data: DataConfig) -> dict[str, str]:
    """What travels with a program, as JSON by name: all of `description`, and for people classes and preprocessing."""
    entries = ("eval_crop", "crop_fraction", "interpolation", "mean", "std")
    preprocessing = {"image_size": description["image_size"]} | {entry: getattr(data, entry) for entry in entries}
    properties = {"vitds": description, "classes": description["classes"], "preprocessing": preprocessing}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in properties.items()}


def write_program(
    path: Path, weights: OpenWeights, description: Mapping[str, object], data: DataConfig, on_bytes: OnBytes
) -> None:
    """Write a .pt2 file."""
    model, images = traceable(weights.header)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=(BATCH,))
    with FakeTensorMode():
        for name, parameter in program.state_dict.items():
            program.state_dict[name] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
    empty = io.BytesIO()
    properties = program_properties(description, data)
    torch.export.save(program, empty, extra_files={f"{name}.json": text for name, text in properties.items()})
    _fill(empty, path, weights, on_bytes)
    check_held(path, _held(path), {name: parameter.shape for name, parameter in program.state_dict.items()})


def _fill(empty: io.BytesIO, path: Path, weights: OpenWeights, on_bytes: OnBytes) -> None:
    """Copy the archive, with a record of its own for every parameter."""
    with zipfile.ZipFile(empty) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        root = next(name for name in source.namelist() if name.endswith(_CONFIG)).removesuffix(_CONFIG)
        config = json.loads(source.read(root + _CONFIG))
        for number, (name, entry) in enumerate(config["config"].items()):
            entry["path_name"] = f"weight_{number}"
            array = weights.arrays[name]
            with target.open(f"{root}data/weights/weight_{number}", "w", force_zip64=True) as record:
                record.write(array.data)
            on_bytes(array.nbytes)
        for name in source.namelist():
            if name == root + _CONFIG:
                target.writestr(name, json.dumps(config))
            elif not name.startswith(f"{root}data/weights/"):
                target.writestr(name, source.read(name))


def _held(path: Path) -> dict[str, int]:
    """Bytes of every parameter's record, by the archive's directory."""
    with zipfile.ZipFile(path) as archive:
        sizes = {record.filename: record.file_size for record in archive.infolist()}
        config_name = next(name for name in sizes if name.endswith(_CONFIG))
        config = json.loads(archive.read(config_name))["config"]
    records = config_name.removesuffix(_CONFIG) + "data/weights/"
    return {name: sizes.get(records + entry["path_name"], 0) for name, entry in config.items()}
