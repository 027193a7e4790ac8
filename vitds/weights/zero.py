"""fp32 weights out of a DeepSpeed checkpoint directory, of any ZeRO stage and world size, without DeepSpeed.

How DeepSpeed lays a model out on disk, and so the three cases below:

    no *_optim_states.pt   stage 0, or weights only: `module` of mp_rank_00_model_states.pt is whole
    stages 1 and 2         per parameter group, every rank holds a run of one flat fp32 vector; end to end they are the
                           group's parameters in the order of `param_shapes`. `module` is whole too, but 16-bit in a
                           16-bit run, and the only home of frozen parameters and buffers.
    stage 3                every parameter is cut on its own into world_size equal parts, the last one padded; a rank's
                           parts lie end to end in its `fp32_flat_groups`, frozen ones in `frozen_param_fragments`.

The files are pickles: they are read with torch's restricted unpickler and a short allow-list, never otherwise.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitds.errors import CheckpointError
from vitds.manifest import damage, read_manifest


class InertObject:
    """Takes the place of a DeepSpeed object that nobody looks at; it runs no code and holds attributes only."""


CHECKPOINT_SAFE_GLOBALS: list[Any] = [
    (InertObject, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (InertObject, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (InertObject, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""What DeepSpeed's own files hold beyond tensors and plain containers, mapped to stand-ins for reading."""


def safe_load(
    path: str | os.PathLike[str],
    map_location: Any = "cpu",
    safe_globals: Iterable[Any] = CHECKPOINT_SAFE_GLOBALS,
) -> Any:
    """Read one .pt file without running code from it; a resume passes DeepSpeed's real classes as `safe_globals`.

    Raises: CheckpointError when the file is missing or damaged, or holds an object that is not on the allow-list.
    """
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        detail = refused[0] if refused else str(error).splitlines()[0]
        raise CheckpointError(
            "holds an object that is not on the allow-list, so it was not loaded",
            where=str(path),
            fix=f"{detail}\nuse a checkpoint that DeepSpeed or vitds wrote",
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read: {reason}", where=str(path)) from None


def consolidated_state_dict(directory: Path) -> dict[str, Tensor]:
    """Whole fp32 parameters and buffers of one committed global_stepN directory; only files in its manifest are read.

    At stage 0 in 16 bits, and for parameters frozen in a 16-bit run, these are the rounded weights that the model used.

    Raises: CheckpointError when the directory has no manifest, differs from it, or was written by a model-parallel run.
    """
    manifest = read_manifest(directory)
    damaged = damage(directory, manifest)
    if damaged:
        raise CheckpointError("damaged checkpoint", where=str(directory), fix="\n".join(damaged[:8]))
    model_files = sorted((n for n in manifest.files if n.endswith("_model_states.pt")), key=_rank_of)
    optim_files = sorted((n for n in manifest.files if n.endswith("_optim_states.pt")), key=_rank_of)
    if not model_files:
        raise CheckpointError("no *_model_states.pt: not a DeepSpeed checkpoint", where=str(directory))
    models = [safe_load(directory / name) for name in model_files]
    optims = [safe_load(directory / name) for name in optim_files]
    try:
        if models[0].get("mp_world_size", 1) != 1:
            raise CheckpointError("written by a model-parallel run, which is not supported", where=str(directory))
        merged = _merge(models, [optim["optimizer_state_dict"] for optim in optims])
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in merged}
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"unexpected content: {error!r}", where=str(directory)) from None


def _rank_of(name: str) -> int:
    """The data-parallel rank in a file name: 3 in bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt."""
    return int(name.split("pp_rank_")[1].split("_")[0]) if "pp_rank_" in name else 0


def _merge(models: list[dict[str, Any]], shards: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Pairs of name and whole tensor; a later pair of the same name takes the earlier one's place."""
    first = models[0]
    if not shards:
        yield from first["module"].items()
        return
    partition_count = shards[0]["partition_count"]
    world_size = max(partition_count) if isinstance(partition_count, list) else partition_count
    if len(shards) != world_size:
        raise CheckpointError(f"{len(shards)} optimizer files where {world_size} ranks wrote one each")
    if "fp32_flat_groups" in shards[0]:
        trainable = _from_parts(first["param_shapes"], [torch.cat(shard["fp32_flat_groups"]) for shard in shards])
        merged = {name: first["module"][name] for name in first["buffer_names"]} | dict(trainable)
        for name, shape in (first["frozen_param_shapes"] or {}).items():
            merged[name] = _joined([model["frozen_param_fragments"][name] for model in models], shape)
    else:
        merged = dict(first["module"]) | dict(_from_runs(first["param_shapes"], shards))
    yield from merged.items()
    yield from ((alias, merged[name]) for alias, name in first["shared_params"].items() if name in merged)


def _from_runs(param_shapes: list[dict[str, torch.Size]], shards: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: cut each group's flat vector, joined over ranks, at the parameters' sizes."""
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(param_shapes):
        flat = torch.cat([shard["single_partition_of_fp32_groups"][group] for shard in shards])
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            yield name, flat.narrow(0, offset, math.prod(shape)).view(shape)
            offset += math.prod(shape) + (paddings[group][index] if paddings else 0)


def _from_parts(param_shapes: list[dict[str, torch.Size]], flats: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: take every rank's part of each parameter, in order."""
    offset = 0
    for name, shape in ((name, shape) for shapes in param_shapes for name, shape in shapes.items()):
        part_numel = math.ceil(math.prod(shape) / len(flats))
        yield name, _joined([flat.narrow(0, offset, part_numel) for flat in flats], shape)
        offset += part_numel


def _joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """One parameter from the ranks' equal parts, without the padding at the end."""
    return torch.cat(parts)[: math.prod(shape)].view(shape)
