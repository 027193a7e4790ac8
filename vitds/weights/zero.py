"""Weights and optimizer states out of a DeepSpeed checkpoint directory, of any ZeRO stage and world size, by name.

Neither DeepSpeed nor torch is needed. How DeepSpeed lays a model out on disk, and so the three cases below:

    no *_optim_states.pt   stage 0, or weights only: `module` of mp_rank_00_model_states.pt is whole; `optimizer` there
                           counts the parameters through its groups, in the order of vitds' `param_shapes`
    stages 1 and 2         per parameter group, every rank holds a run of one flat fp32 vector; end to end they are the
                           group's parameters in the order of `param_shapes`. `module` is whole too, but 16-bit in a
                           16-bit run, and the only home of frozen parameters and buffers.
    stage 3                every parameter is cut on its own into world_size equal parts, the last one padded; a rank's
                           parts lie end to end in its `fp32_flat_groups`, frozen ones in `frozen_param_fragments`.

What the optimizer keeps beside a flat vector (its moments, an average of the weights) is laid out as that vector is.
The files are pickles: only their structure is read, by names on a short allow-list; a parameter's values are read from
where they lie when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


def _named(kind: Any, name: Any) -> int:
    """Takes the place of getattr: Python 3.11.0 to 3.11.3 pickles a member of an enumeration by it.

    Raises: WeightError for an attribute of anything else.
    """
    if kind is not CHECKPOINT_STAND_INS["deepspeed.runtime.zero.config.ZeroStageEnum"] or name not in _STAGES:
        raise WeightError("holds builtins.getattr of something else than a ZeRO stage: nothing was run")
    return _STAGES.index(name)


_STAGES = ("disabled", "optimizer_states", "gradients", "weights")


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


# What makes up one tensor, end to end, perhaps with padding behind it; and its shape.
_Parts = tuple[list[StoredTensor], Shape]
_States = dict[str, dict[str, Any]]
_TORCH_NAMES = {"momentum": "momentum_buffer"}


def open_checkpoint(directory: Path, state: str = "master") -> LazyArrays:
    """Whole fp32 arrays of one committed global_stepN directory by parameter name; only files in its manifest are read.

    `state` is "master" (the weights), or what the optimizer keeps of each trainable parameter: "momentum", "exp_avg",
    "exp_avg_sq", "ema", "step" (a number each). Weights and their average ("ema") are of the whole model: frozen
    parameters and buffers are the same in both. At stage 0 in 16 bits, and for parameters frozen in a 16-bit run, the
    masters are the rounded weights that the model used.

    Raises: CheckpointError when the directory has no manifest, differs from it, was written by a model-parallel run, or
    holds no such state.
    """
    manifest = read_manifest(directory)
    damaged = damage(directory, manifest)
    if damaged:
        raise CheckpointError("damaged checkpoint", where=str(directory), fix="\n".join(damaged[:8]))
    return read_checkpoint(directory).arrays(state)


@dataclass(frozen=True)
class SavedState:
    """The structure of a checkpoint: what it keeps of each parameter, and where that lies."""

    directory: Path
    zero_stage: int
    world_size: int
    common: dict[str, Any]  # what rank 0 wrote beside the tensors: counters, schedule, client state
    loss_scaler: Any  # of fp16, with DeepSpeed's attributes, else None
    param_groups: list[dict[str, Any]]  # the optimizer's options by group
    names_by_group: list[list[str]]  # trainable parameters in the order of the flat groups; stage 3: of its sub-groups
    states: _States  # state name -> parameter name -> its parts, or a number ("step")

    def arrays(self, state: str) -> LazyArrays:
        """One state of all parameters by name.

        Raises: CheckpointError when the checkpoint holds no such state.
        """
        found = self.states.get(_TORCH_NAMES.get(state, state))
        if found is None and state == "ema":
            raise CheckpointError(
                "the run kept no average of its weights",
                where=str(self.directory),
                fix="leave out --ema; --ema-decay keeps one in training",
            )
        if found is None:
            held = ", ".join(sorted(self.states))
            raise CheckpointError(
                f"holds no {state} of its parameters", where=str(self.directory), fix=f"it has {held}"
            )
        if state == "ema":
            found = self.states["master"] | found
        return LazyArrays({name: partial(_whole_array, kept) for name, kept in found.items()})

    def run(self, state: str, name: str, start: int, numel: int) -> np.ndarray:
        """`numel` values of one state of one parameter, from `start` on in its flattened order."""
        pieces, shape = self.states[state][name]
        if any(len(piece.shape) != 1 for piece in pieces):  # of stage 0 and of frozen parameters
            return _joined(pieces, shape).reshape(-1)[start : start + numel]
        return _joined(_cut(pieces, start, numel), (numel,))


def read_checkpoint(directory: Path) -> SavedState:
    """The structure of one committed global_stepN directory, whose files were compared with its manifest.

    Raises: CheckpointError when it was written by a model-parallel run, or by no run at all.
    """
    files = read_manifest(directory).files
    model_files = sorted((n for n in files if n.endswith("_model_states.pt")), key=_rank_of)
    optim_files = sorted((n for n in files if n.endswith("_optim_states.pt")), key=_rank_of)
    if not model_files:
        raise CheckpointError("no *_model_states.pt: not a DeepSpeed checkpoint", where=str(directory))
    try:
        models = [read_file(directory / name) for name in model_files]
        optims = [read_file(directory / name)["optimizer_state_dict"] for name in optim_files]
        if models[0].get("mp_world_size", 1) != 1:
            raise CheckpointError("written by a model-parallel run, which is not supported", where=str(directory))
        return _read(directory, models, optims)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"unexpected content: {error!r}", where=str(directory)) from None


def read_file(path: Path) -> Any:
    """What one of DeepSpeed's files holds, with a StoredTensor in the place of every tensor.

    Raises: CheckpointError when it is damaged, or holds an object that is not on the allow-list.
    """
    try:
        return read_stored(path, _STAND_INS)
    except WeightError as error:
        fix = error.fix and "use a checkpoint that DeepSpeed or vitds wrote"
        raise CheckpointError(error.what, where=error.where, fix=fix) from None


def _rank_of(name: str) -> int:
    """The data-parallel rank in a file name: 3 in bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt."""
    return int(name.split("pp_rank_")[1].split("_")[0]) if "pp_rank_" in name else 0


def _read(directory: Path, models: list[dict[str, Any]], shards: list[dict[str, Any]]) -> SavedState:
    """A later state of the same name takes the earlier one's place; an alias of a parameter has what that has."""
    first = models[0]
    if not shards:
        stage, world_size, base = 0, first.get("dp_world_size", 1), [first.get("optimizer") or {}]
    else:
        partition_count = shards[0]["partition_count"]
        world_size = max(partition_count) if isinstance(partition_count, list) else partition_count
        if len(shards) != world_size:
            raise CheckpointError(f"{len(shards)} optimizer files where {world_size} ranks wrote one each")
        stage = 3 if "fp32_flat_groups" in shards[0] else int(shards[0].get("zero_stage", 1))
        base = [shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for shard in shards]
    shapes_by_group: list[dict[str, Shape]] = first.get("param_shapes") or []
    moments = [optimizer.get("state", {}) for optimizer in base]

    if stage == 0:
        states: _States = {"master": _whole(first["module"], first["module"])} | _by_index(shapes_by_group, moments[0])
    elif stage == 3:
        masters: list[Sequence[StoredTensor]] = [shard["fp32_flat_groups"] for shard in shards]
        states = _from_parts(shapes_by_group, masters, moments)
        frozen = {
            name: ([model["frozen_param_fragments"][name] for model in models], shape)
            for name, shape in (first["frozen_param_shapes"] or {}).items()
        }
        states["master"] = _whole(first["module"], first["buffer_names"]) | states["master"] | frozen
    else:
        states = _from_runs(shapes_by_group, shards, moments)
        states["master"] = _whole(first["module"], first["module"]) | states["master"]
    for alias, name in (first["shared_params"] if shards else {}).items():
        for kept in states.values():
            if name in kept:
                kept[alias] = kept[name]
    return SavedState(
        directory,
        stage,
        world_size,
        common={key: value for key, value in first.items() if key not in ("module", "optimizer")},
        loss_scaler=shards[0].get("loss_scaler") if shards else None,
        param_groups=[
            {key: value for key, value in group.items() if key != "params"} for group in base[0].get("param_groups", [])
        ],
        names_by_group=[list(shapes) for shapes in shapes_by_group],
        states=states,
    )


def _whole(module: dict[str, StoredTensor], names: Iterable[str]) -> dict[str, _Parts]:
    """Tensors that lie in the file as they are."""
    return {name: ([module[name]], module[name].shape) for name in names}


def _by_index(shapes_by_group: list[dict[str, Shape]], moments: dict[int, dict[str, Any]]) -> _States:
    """Stage 0: the optimizer counts the parameters through its groups and keeps the states of each as they are."""
    states: _States = {}
    for index, (name, shape) in enumerate(_all(shapes_by_group)):
        for key, kept in moments.get(index, {}).items():
            states.setdefault(key, {})[name] = ([kept], shape) if _is_of(kept, shape) else kept
    return states


def _from_runs(
    shapes_by_group: list[dict[str, Shape]], shards: list[dict[str, Any]], moments: list[dict[int, dict[str, Any]]]
) -> _States:
    """Stages 1 and 2: cut each group's flat vector, joined over ranks, at the parameters' sizes."""
    states: _States = {"master": {}}
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(shapes_by_group):
        vectors: dict[str, Any] = {"master": [shard["single_partition_of_fp32_groups"][group] for shard in shards]}
        vectors |= {key: [of_rank[group][key] for of_rank in moments] for key in moments[0].get(group, {})}
        offset = 0
        for index, (name, shape) in enumerate(shapes.items()):
            for key, runs in vectors.items():
                is_vector = isinstance(runs[0], StoredTensor) and runs[0].shape
                kept = (_cut(runs, offset, math.prod(shape)), shape) if is_vector else runs[0]
                states.setdefault(key, {})[name] = kept
            offset += math.prod(shape) + (paddings[group][index] if paddings else 0)
    return states


def _from_parts(
    shapes_by_group: list[dict[str, Shape]],
    masters: list[Sequence[StoredTensor]],
    moments: list[dict[int, dict[str, Any]]],
) -> _States:
    """Stage 3: take every rank's part of each parameter, in order; a rank's vectors lie in one or more pieces."""
    pieces = range(len(masters[0]))
    vectors: dict[str, list[Sequence[Any]]] = {"master": masters}
    for key in moments[0].get(0, {}):
        vectors[key] = [[of_rank[piece][key] for piece in pieces] for of_rank in moments]
    states: _States = {"master": {}}
    offset = 0
    for name, shape in _all(shapes_by_group):
        part_numel = math.ceil(math.prod(shape) / len(masters))
        for key, ranks in vectors.items():
            if isinstance(ranks[0][0], StoredTensor) and ranks[0][0].shape:
                kept: Any = [part for of_rank in ranks for part in _cut(of_rank, offset, part_numel)], shape
            else:
                kept = ranks[0][_piece_at(masters[0], offset)]
            states.setdefault(key, {})[name] = kept
        offset += part_numel
    return states


def _all(shapes_by_group: list[dict[str, Shape]]) -> Iterator[tuple[str, Shape]]:
    return ((name, shape) for shapes in shapes_by_group for name, shape in shapes.items())


def _is_of(kept: Any, shape: Shape) -> bool:
    """True for a value per element of a parameter, false for one of the whole parameter, such as its step."""
    return isinstance(kept, StoredTensor) and kept.shape == tuple(shape)


def _piece_at(pieces: Sequence[StoredTensor], offset: int) -> int:
    """Which of the vectors that lie end to end holds the value at `offset`."""
    for index, piece in enumerate(pieces):
        if offset < piece.numel:
            return index
        offset -= piece.numel
    raise IndexError(f"nothing lies at {offset}")


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


def _whole_array(kept: Any) -> np.ndarray:
    """One state of one parameter: its parts joined, or a number."""
    if isinstance(kept, tuple):
        return _joined(*kept)
    return np.asarray(kept.read() if isinstance(kept, StoredTensor) else kept, dtype=np.float32).reshape(())


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
