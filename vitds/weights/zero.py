"""fp32 weights out of a DeepSpeed checkpoint directory, of any ZeRO stage and world size, without DeepSpeed.

How DeepSpeed lays a model out on disk, and so the three cases below:

    no *_optim_states.pt   stage 0, or weights only: `module` of mp_rank_00_model_states.pt is whole
    stages 1 and 2         per parameter group, every rank holds a run of one flat fp32 vector; end to end they are the
                           group's parameters in the order of `param_shapes`. `module` is whole too, but 16-bit in a
                           16-bit run, and the only home of frozen parameters and buffers.
    stage 3                every parameter is cut on its own into world_size equal parts, the last one padded; a rank's
                           parts lie end to end in its `fp32_flat_groups`, frozen ones in `frozen_param_fragments`.

The files are pickles: they are read with torch's restricted unpickler and a short allow-list, never otherwise. They are
mapped into memory, not loaded: a parameter is put together when it is asked for.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitds.errors import CheckpointError
from vitds.manifest import damage, read_manifest
from vitds.weights.lazy import LazyWeights


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
    """Whole fp32 parameters and buffers of one committed global_stepN directory, all at once; see `open_checkpoint`."""
    return dict(open_checkpoint(directory))


def open_checkpoint(directory: Path) -> LazyWeights:
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
        merged = dict(_merge(models, [optim["optimizer_state_dict"] for optim in optims]))
        return LazyWeights({name: partial(_joined, pieces, shape) for name, (pieces, shape) in merged.items()})
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"unexpected content: {error!r}", where=str(directory)) from None


# Views of the mapped files that make up one tensor, end to end, perhaps with padding behind them; and its shape.
_Parts = tuple[list[Tensor], torch.Size]


def _rank_of(name: str) -> int:
    """The data-parallel rank in a file name: 3 in bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt."""
    return int(name.split("pp_rank_")[1].split("_")[0]) if "pp_rank_" in name else 0


def _merge(models: list[dict[str, Any]], shards: list[dict[str, Any]]) -> Iterator[tuple[str, _Parts]]:
    """Every name with the parts of its tensor; a later pair of the same name takes the earlier one's place."""
    first = models[0]
    if not shards:
        yield from _whole(first["module"], first["module"])
        return
    partition_count = shards[0]["partition_count"]
    world_size = max(partition_count) if isinstance(partition_count, list) else partition_count
    if len(shards) != world_size:
        raise CheckpointError(f"{len(shards)} optimizer files where {world_size} ranks wrote one each")
    if "fp32_flat_groups" in shards[0]:
        merged = dict(_whole(first["module"], first["buffer_names"]))
        merged |= _from_parts(first["param_shapes"], [shard["fp32_flat_groups"] for shard in shards])
        for name, shape in (first["frozen_param_shapes"] or {}).items():
            merged[name] = [model["frozen_param_fragments"][name] for model in models], shape
    else:
        merged = dict(_whole(first["module"], first["module"])) | dict(_from_runs(first["param_shapes"], shards))
    yield from merged.items()
    yield from ((alias, merged[name]) for alias, name in first["shared_params"].items() if name in merged)


def _whole(module: dict[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, _Parts]]:
    """Tensors that lie in the file as they are."""
    for name in names:
        yield name, ([module[name].reshape(-1)], module[name].shape)


def _from_runs(param_shapes: list[dict[str, torch.Size]], shards: list[dict[str, Any]]) -> Iterator[tuple[str, _Parts]]:
    """Stages 1 and 2: cut each group's flat vector, joined over ranks, at the parameters' sizes."""
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(param_shapes):
        runs = [shard["single_partition_of_fp32_groups"][group] for shard in shards]
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            yield name, (_cut(runs, offset, math.prod(shape)), shape)
            offset += math.prod(shape) + (paddings[group][index] if paddings else 0)


def _from_parts(
    param_shapes: list[dict[str, torch.Size]], ranks: list[Sequence[Tensor]]
) -> Iterator[tuple[str, _Parts]]:
    """Stage 3: take every rank's part of each parameter, in order; a rank's vector lies in one or more pieces."""
    offset = 0
    for name, shape in ((name, shape) for shapes in param_shapes for name, shape in shapes.items()):
        part_numel = math.ceil(math.prod(shape) / len(ranks))
        yield name, ([piece for pieces in ranks for piece in _cut(pieces, offset, part_numel)], shape)
        offset += part_numel


def _cut(pieces: Sequence[Tensor], offset: int, numel: int) -> list[Tensor]:
    """Views of `numel` values from `offset` on, of vectors that lie end to end.

    Raises: IndexError when they end before.
    """
    found = []
    for piece in pieces:
        taken = min(max(len(piece) - offset, 0), numel)
        if taken:
            found.append(piece.narrow(0, offset, taken))
        offset, numel = max(offset - len(piece), 0), numel - taken
    if numel:
        raise IndexError(f"{numel} values are missing at the end")
    return found


def _joined(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """One fp32 tensor from its parts, without the padding at the end; a single part is not copied."""
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    tensor = flat[: math.prod(shape)].view(shape)
    return tensor.float() if tensor.is_floating_point() else tensor
