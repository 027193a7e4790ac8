"""fp32 weights out of a DeepSpeed checkpoint directory, of any ZeRO stage and world size, without DeepSpeed or torch.

How DeepSpeed lays a model out on disk, and so the three cases below:

    no *_optim_states.pt   stage 0, or weights only: `module` of mp_rank_00_model_states.pt is whole
    stages 1 and 2         per parameter group, every rank holds a run of one flat fp32 vector; end to end they are the
                           group's parameters in the order of `param_shapes`. `module` is whole too, but 16-bit in a
                           16-bit run, and the only home of frozen parameters and buffers.
    stage 3                every parameter is cut on its own into world_size equal parts, the last one padded; a rank's
                           parts lie end to end in its `fp32_flat_groups`, frozen ones in `frozen_param_fragments`.

The files are pickles: only their structure is read, by names on a short allow-list; a parameter's values are read from
where they lie when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitds.errors import CheckpointError, WeightError
from vitds.manifest import damage, read_manifest
from vitds.weights.lazy import LazyArrays
from vitds.weights.stored import StoredTensor, read_stored

Shape = tuple[int, ...]


class InertObject:
    """Takes the place of a DeepSpeed object that nobody looks at; it runs no code and holds attributes only."""


def _named(_: type, name: str) -> str:
    """Takes the place of getattr: Python 3.11.0 to 3.11.3 pickles a member of an enumeration by it."""
    return name


CHECKPOINT_STAND_INS: dict[str, Any] = {
    "builtins.getattr": _named,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": InertObject,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": InertObject,
    "deepspeed.utils.tensor_fragment.fragment_address": InertObject,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}
"""What DeepSpeed's own files hold beyond tensors and plain containers, mapped to stand-ins for reading."""


def _rebuilt(rebuild: Callable, _: Any, arguments: tuple, __: Any) -> Any:
    return rebuild(*arguments)


# A parameter with attributes of DeepSpeed's, which are left out.
_STAND_INS = CHECKPOINT_STAND_INS | {"torch._tensor._rebuild_from_type_v2": _rebuilt, "torch.Tensor": InertObject}


def open_checkpoint(directory: Path) -> LazyArrays:
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
    try:
        models = [read_stored(directory / name, _STAND_INS) for name in model_files]
        optims = [read_stored(directory / name, _STAND_INS) for name in optim_files]
        if models[0].get("mp_world_size", 1) != 1:
            raise CheckpointError("written by a model-parallel run, which is not supported", where=str(directory))
        merged = dict(_merge(models, [optim["optimizer_state_dict"] for optim in optims]))
        return LazyArrays({name: partial(_joined, pieces, shape) for name, (pieces, shape) in merged.items()})
    except WeightError as error:
        fix = error.fix and "use a checkpoint that DeepSpeed or vitds wrote"
        raise CheckpointError(error.what, where=error.where, fix=fix) from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"unexpected content: {error!r}", where=str(directory)) from None


# What makes up one tensor, end to end, perhaps with padding behind it; and its shape.
_Parts = tuple[list[StoredTensor], Shape]


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


def _whole(module: dict[str, StoredTensor], names: Iterable[str]) -> Iterator[tuple[str, _Parts]]:
    """Tensors that lie in the file as they are."""
    for name in names:
        yield name, ([module[name]], module[name].shape)


def _from_runs(param_shapes: list[dict[str, Shape]], shards: list[dict[str, Any]]) -> Iterator[tuple[str, _Parts]]:
    """Stages 1 and 2: cut each group's flat vector, joined over ranks, at the parameters' sizes."""
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(param_shapes):
        runs = [shard["single_partition_of_fp32_groups"][group] for shard in shards]
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            yield name, (_cut(runs, offset, math.prod(shape)), shape)
            offset += math.prod(shape) + (paddings[group][index] if paddings else 0)


def _from_parts(
    param_shapes: list[dict[str, Shape]], ranks: list[Sequence[StoredTensor]]
) -> Iterator[tuple[str, _Parts]]:
    """Stage 3: take every rank's part of each parameter, in order; a rank's vector lies in one or more pieces."""
    offset = 0
    for name, shape in ((name, shape) for shapes in param_shapes for name, shape in shapes.items()):
        part_numel = math.ceil(math.prod(shape) / len(ranks))
        yield name, ([piece for pieces in ranks for piece in _cut(pieces, offset, part_numel)], shape)
        offset += part_numel


def _cut(pieces: Sequence[StoredTensor], offset: int, numel: int) -> list[StoredTensor]:
    """`numel` values from `offset` on, of vectors that lie end to end.

    Raises: IndexError when they end before.
    """
    found = []
    for piece in pieces:
        taken = min(max(piece.numel - offset, 0), numel)
        if taken:
            found.append(piece.run(offset, taken))
        offset, numel = max(offset - piece.numel, 0), numel - taken
    if numel:
        raise IndexError(f"{numel} values are missing at the end")
    return found


def _joined(pieces: list[StoredTensor], shape: Shape) -> np.ndarray:
    """One array from its parts, without the padding at the end; float32 if it is of real numbers.

    Raises: CheckpointError when a file can no longer be read.
    """
    try:
        parts = [piece.read().reshape(-1) for piece in pieces]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(pieces[0].path)) from None
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    array = flat[: math.prod(shape)].reshape(shape)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
