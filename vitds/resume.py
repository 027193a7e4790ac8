"""Going on: which checkpoint, whether this command may continue it, and where the run stands."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vitds import collectives
from vitds.checkpoint import CheckpointStore, Choice, committed_checkpoints, step_of
from vitds.data.cache import Cache, named_cache
from vitds.data.decode import jpeg_decoder_name
from vitds.data.index import INDEX_NAME
from vitds.data.loader import RankLoader
from vitds.data.stream import merge_done
from vitds.dataset_facts import split_paths
from vitds.engine import Engine
from vitds.errors import EXIT_DONE, CheckpointError, DataError, UsageError
from vitds.manifest import read_manifest
from vitds.preflight import Plan
from vitds.run_config import RunConfig
from vitds.run_directory import COMMITTED_NAME
from vitds.stream_facts import is_stream, shard_name, shard_urls
from vitds.transport import Url, location
from vitds.verdict import EXIT_NAME, read_verdict
from vitds.world import World

# What may differ between a checkpoint and the command that goes on from it: none of it changes which samples are seen,
# with which augmentation, or what is minimised. State that is laid out in another way is restored by name. fp8 rounds
# inside of a step, as compile and attention do more finely: weights, gradients and moments keep their precision. A run
# that 8 bits lead astray is to go on without them, and its log says so.
_FREE_KEYS = frozenset(
    [
        *(
            f"vitds.{key}"
            for key in """name output_dir pretrained resume stop_at_step eval_every save_every log_every keep_last
            eval_batch_size workers track max_bad_samples epochs activation_checkpointing attention auto_micro_batch
            compile fp8
            data.path data.val_path data.eval_crop data.crop_fraction data.cache_dir data.cache_gib data.allow_pipe
            data.shuffle_buffer extend_to layer_decay keep_every save_in_background max_skipped_in_a_row on_divergence
            max_rewinds hang_timeout_s worker_timeout_s profile log_block_norms""".split()
        ),
        *(
            f"zero_optimization.{key}"
            for key in """stage round_robin_gradients sub_group_size overlap_comm reduce_scatter contiguous_gradients
            allgather_partitions
            allgather_bucket_size reduce_bucket_size use_multi_rank_bucket_allreduce stage3_prefetch_bucket_size
            stage3_max_live_parameters stage3_max_reuse_distance stage3_param_persistence_threshold
            stage3_model_persistence_threshold stage3_gather_16bit_weights_on_model_save zero_hpz_partition_size
            prefetch_bucket_size max_live_parameters max_reuse_distance param_persistence_threshold
            model_persistence_threshold gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
            cpu_offload cpu_offload_param cpu_offload_use_pin_memory log_trace_cache_warnings
            enable_sanity_checks""".split()
        ),
        "zero_allow_untested_optimizer",  # vitds sets it where the stage asks for it
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
        *("wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    ]
)
_FREE_SECTIONS = (
    *("activation_checkpointing", "comms_logger", "flops_profiler", "timers", "aio"),
    *("tensorboard", "wandb", "comet", "csv_monitor"),
    *("zero_optimization.offload_optimizer", "zero_optimization.offload_param", "zero_force_ds_cpu_optimizer"),
)
# What --extend-to changes.
_LENGTH = frozenset({"vitds.num_steps", "scheduler.params.total_num_steps"})
# Different by nature, so not worth a line.
_OF_THE_COMMAND = frozenset({"vitds.name", "vitds.resume", "vitds.stop_at_step", "vitds.pretrained"})

Best = tuple[float | None, float | None, int | None]


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    `samples_seen` is a position in the stream, in samples of all ranks: what is left out after a divergence was seen
    once, and counts. Without such batches it is the step times the global batch.
    """

    step: int = 0
    samples_seen: int = 0
    best_top1: float | None = None
    best_map: float | None = None  # in place of top-1 where samples have any number of classes
    best_step: int | None = None
    skipped_in_a_row: int = 0
    last_save_failed: bool = False
    # Shard and key, of all ranks, and how many samples each counts for; older checkpoints have a list of the former.
    bad_samples: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    shards_done: list[int] = dataclasses.field(default_factory=lambda: [0])  # of a stream, as `merge_done` gives it
    left_out: list[int] = dataclasses.field(default_factory=list)  # numbers of global batches, after a divergence
    num_rewinds: int = 0

    @classmethod
    def restore(cls, engine: Engine, choice: Choice) -> Progress:
        """Load the chosen checkpoint into the engine, or start at step 0 when there is none.

        Raises: CheckpointError when the engine and the checkpoint disagree about the step.
        """
        if choice.directory is None:
            return cls()
        state = engine.load(choice.directory.parent, choice.directory.name).get("vitds", {})
        if state.get("step") != step_of(choice.directory):
            raise CheckpointError(
                "holds no state of a vitds run", where=str(choice.directory), fix="use --pretrained for weights"
            )
        if isinstance(state.get("bad_samples"), list):
            state["bad_samples"] = dict.fromkeys(state["bad_samples"], 1)
        return cls(**state)

    def advance(self, global_batch: int) -> None:
        """Count one global step, and what was left out before it."""
        number = self.samples_seen // global_batch
        while number in self.left_out:
            number += 1
        self.step += 1
        self.samples_seen = (number + 1) * global_batch

    @property
    def place_in_data(self) -> dict[str, Any]:
        """What a loader needs to go on from here."""
        return {"samples_seen": self.samples_seen, "shards_done": self.shards_done, "left_out": self.left_out}

    def note_best(self, figures: dict[str, float]) -> bool:
        """Remember a validation result, by top-1 or mean average precision; True when it is the best so far.

        Where the run keeps an average of its weights, the average's result counts.
        """
        name = "map" if "map" in figures else "top1"
        best, value = getattr(self, f"best_{name}"), figures.get(f"ema_{name}", figures[name])
        if math.isnan(value) or (best is not None and value <= best):
            return False
        setattr(self, f"best_{name}", value)
        self.best_step = self.step
        return True

    @property
    def best(self) -> Best:
        """The best validation result and its step."""
        return self.best_top1, self.best_map, self.best_step

    @best.setter
    def best(self, best: Best) -> None:
        self.best_top1, self.best_map, self.best_step = best

    def share_bad_samples(self, loader: RankLoader) -> None:
        """Tell all ranks which samples any of them had to replace; collective.

        Raises: DataError, on all ranks, when they are more than the allowed share together.
        """
        new = [bad for bad in loader.bad_samples if bad.name not in self.bad_samples]
        try:
            loader.know([bad for of_rank in collectives.gather(new) for bad in of_rank])
        except DataError as error:
            error.on_one_rank = False
            raise
        self.bad_samples = dict(sorted(loader.known_bad.items()))

    def note_shards(self, loader: RankLoader) -> None:
        """Add the shards of a stream that were finished since the last call; collective."""
        self.shards_done = merge_done(self.shards_done, chain.from_iterable(collectives.gather(loader.take_finished())))


def checkpoint_info(plan: Plan, engine: Engine, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself in its manifest: the model, what it was fed, and the resolved configuration."""
    run, head = plan.run, engine.module.get_submodule("head")
    pre_logits = getattr(head, "pre_logits", None)
    return {
        "model": plan.spec.name,
        "image_size": list(plan.image_size),
        "num_classes": plan.num_classes,
        "pre_logits": pre_logits.out_features if pre_logits is not None else None,
        "classes": plan.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "step": step,
        "world_size": plan.world.world_size,
        "zero_stage": plan.zero_stage,
        "dtype": plan.dtype,
        "num_train": plan.num_train,
        "train_index_crc32": _train_index_crc32(plan),
        "jpeg_decoder": jpeg_decoder_name(),
        "config": plan.resolved(),
    }


def choose_checkpoint(plan: Plan, store: CheckpointStore) -> Choice:
    """The checkpoint that this command goes on from; collective.

    Raises: CheckpointError when one is on record and cannot be used, UsageError when the run is finished or must not be
    resumed.
    """
    _train_index_crc32(plan)  # fetched now where it is far: no save is to wait for a server
    resume = plan.run.resume
    had_checkpoints = collectives.broadcast((plan.run_dir / COMMITTED_NAME).exists())
    if resume == "never":
        if had_checkpoints or collectives.broadcast(store.has_commit_on_record()):
            what = "--resume never, and this run has checkpoints"
            raise UsageError(what, where=str(plan.run_dir), fix=_two_ways_out(plan))
        return Choice(None)
    choice = own = store.newest_whole()
    if resume == "auto" and own.directory is None and had_checkpoints:
        raise CheckpointError(
            "this run had checkpoints, and they are gone",
            where=str(store.directory),
            fix="put them back, or --resume PATH where they are now; nothing was changed. To start anew, choose another"
            " --name, or delete the run's directory",
        )
    if resume != "auto":
        asked = _asked_for(Path(resume), plan.world)
        if own.directory is None:
            choice = asked
        elif asked.directory is not None and asked.directory.resolve() != own.directory.resolve():
            _refuse_to_go_back(own.directory, asked.directory)
            own.notes.append(f"goes on from the run's own checkpoints, which came after {resume}")
    if plan.run.extend_to is not None and choice.directory is None:
        what = "--extend-to goes on with a run, and there is no checkpoint to go on from"
        raise UsageError(what, where=str(plan.run_dir), fix=f"--num-steps {plan.num_steps} starts one of that length")
    if choice.directory is not None:
        choice.notes += _check_fits(choice, plan)
        if choice.step >= plan.num_steps and not (choice is own and _lacks_its_end(plan)):
            anew = _two_ways_out(plan) if choice is own else f"--pretrained {choice.directory} starts from its weights"
            raise UsageError(
                f"this run is finished ({plan.num_steps} steps)",
                where=str(choice.directory),
                fix=f"--extend-to {2 * plan.num_steps} makes it longer\n{anew}",
            )
    return choice


def _lacks_its_end(plan: Plan) -> bool:
    """Whether a run with all its steps was killed before it could end: collective."""
    return collectives.broadcast(read_verdict(plan.run_dir / EXIT_NAME).get("exit_code") != EXIT_DONE)


def place_in_data(choice: Choice, global_batch: int) -> tuple[int, list[int], list[int]]:
    """Samples seen, shards done and batches left out at a checkpoint: the loader starts before the engine is there."""
    info = read_manifest(choice.directory).info if choice.directory is not None else {}
    seen = info.get("samples_seen", choice.step * global_batch)
    return seen, info.get("shards_done", [0]), info.get("left_out", [])


def _refuse_to_go_back(own: Path, asked: Path) -> None:
    """Raises: CheckpointError when an older checkpoint of this very run is asked for."""
    if asked.resolve().parent == own.resolve().parent:
        raise CheckpointError(
            f"the run has a newer checkpoint, {own.name}",
            where=str(asked),
            fix=f"--resume auto goes on from it; to branch off at {asked.name}, give a new --name",
        )


def _asked_for(path: Path, world: World) -> Choice:
    """The checkpoint that --resume PATH names: a global_stepN, or the newest whole one of a run or its checkpoints.

    Raises: CheckpointError when it is missing or damaged.
    """
    if path.name.startswith("global_step"):
        found = CheckpointStore(path.parent, world).verify(path)
        if found:
            raise CheckpointError("the checkpoint is damaged", where=str(path), fix="\n".join(found[:4]))
        return Choice(path)
    choice = CheckpointStore(path / "checkpoints" if (path / "checkpoints").is_dir() else path, world).newest_whole()
    if choice.directory is None:
        raise CheckpointError("no checkpoint here", where=str(path))
    return choice


def _check_fits(choice: Choice, plan: Plan) -> list[str]:
    """What differs between the checkpoint's configuration and this one without changing the run; notes an extension.

    Raises: CheckpointError when the checkpoint belongs to another run, or holds numbers of another precision.
    """
    directory = choice.directory
    assert directory is not None
    info = read_manifest(directory).info
    saved, now = info.get("config"), json.loads(json.dumps(plan.resolved()))
    if saved is None:
        raise CheckpointError("holds weights, not a run", where=str(directory), fix=f"--pretrained {directory}")
    defaults = json.loads(json.dumps(dataclasses.asdict(RunConfig())))  # keys that came after the checkpoint
    defaults["data"]["shuffle_window"] = 0  # before there were windows, all was shuffled
    saved["vitds"] = defaults | saved["vitds"] | {"data": defaults["data"] | saved["vitds"]["data"]}
    length = saved["vitds"]["num_steps"]
    if plan.run.extend_to is not None and plan.num_steps != length:
        if plan.num_steps < length:
            what = f"--extend-to {plan.num_steps} would shorten a run of {length} steps"
            raise UsageError(
                what, where=str(directory), fix=f"--extend-to {length + 1} or more; --stop-at-step ends it"
            )
        choice.extended_from = length
    everything = list(_differences(saved, now))
    free = _LENGTH if choice.extended_from is not None else frozenset()
    differences = [line for key, line in everything if not _is_free(key) and key not in free]
    facts = {"classes": plan.classes, "num_train": plan.num_train, "train_index_crc32": _train_index_crc32(plan)}
    for key, value in facts.items():
        if info.get(key, value) != value:  # an older checkpoint may lack a key
            hint = " (other samples, or directories in another order)" if key == "train_index_crc32" else ""
            differences.append(f"the data differ from those of the checkpoint: {key}{hint}")
    anew = f"--pretrained {directory} --name NEW starts a new run from its weights"
    if differences:
        longer = plan.num_steps if plan.num_steps > length else "N"
        ways = [
            "restore these to go on with the run",
            f"--extend-to {longer} changes its length alone, the schedule computed anew from here",
            anew,
        ]
        raise CheckpointError(
            "the command differs from the run that it would resume",
            where=str(directory),
            fix="\n".join(differences[:8] + ways),
        )
    if info["dtype"] != plan.dtype:
        raise CheckpointError(
            f"was saved with dtype {info['dtype']}, this run has {plan.dtype}",
            where=str(directory),
            fix=f"start it as it was saved; or {anew}",
        )
    changed = [line for key, line in everything if key not in _OF_THE_COMMAND]
    if (before := info["world_size"]) != plan.world.world_size:
        changed.append(f"ranks: {before} in the checkpoint, {plan.world.world_size} now")
    if (before := info.get("jpeg_decoder", jpeg_decoder_name())) != jpeg_decoder_name():  # older checkpoints lack it
        changed.append(
            f"JPEG decoder: {before} in the checkpoint, {jpeg_decoder_name()} now: damaged JPEGs may fare otherwise"
        )
    return [f"changed since the checkpoint  {line}" for line in changed]


def _train_index_crc32(plan: Plan) -> int:
    """Over the training indexes of all directories, one after the other; of a stream, over the names of its shards."""
    if is_stream(plan.data_path):
        return zlib.crc32("\n".join(map(shard_name, shard_urls(plan.data_path))).encode())
    crc32, cache = 0, named_cache(plan.run.data.cache_dir, plan.run.data.cache_gib)
    for directory in split_paths(plan.data_path):
        path = location(directory) / "train" / INDEX_NAME
        crc32 = _crc32_from(path, cache, crc32) if isinstance(path, Url) else zlib.crc32(path.read_bytes(), crc32)
    return crc32


@functools.lru_cache(maxsize=64)
def _crc32_from(url: Url, cache: Cache, start: int) -> int:
    with open(cache.open(url, is_checked=True), "rb") as file:
        return zlib.crc32(file.read(), start)


def _differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif saved != now:
        yield key, f"{key}: {_short(saved)} in the checkpoint, {_short(now)} now"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or f"{key}.".startswith(tuple(f"{section}." for section in _FREE_SECTIONS))


def _two_ways_out(plan: Plan) -> str:
    newest = committed_checkpoints(plan.run_dir / "checkpoints")
    start = f" --pretrained {newest[0]}" if newest else ""
    return f"train under another name: --name NEW{start}\nor move {plan.run_dir} away"
