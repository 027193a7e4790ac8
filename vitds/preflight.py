"""From a command line to a plan: everything that can be decided, and every mistake that can be named, before torch.

The checks go in the order flags, JSON, model, data, each wholly before the next, so that the first message is about the
cheapest thing to mend. What comes out is explicit: the train loop finds no None, no "auto" and no default in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitds import ds_config
from vitds.class_weights import class_weights
from vitds.dataset_facts import (
    DatasetFacts,
    check_head,
    check_mixture,
    check_splits,
    read_dataset_facts,
    split_paths,
    validated_on,
)
from vitds.document import Document, read_document
from vitds.ds_config import Batch, OptimizerPlan, SchedulePlan
from vitds.duration import steps_for_epochs
from vitds.errors import CheckpointError, ConfigError, UsageError
from vitds.flags import apply_edits, parse_command_line
from vitds.gpu_memory import smallest_gpu_memory_bytes
from vitds.manifest import read_manifest
from vitds.memory_plan import USABLE, Training, choose_checkpointing
from vitds.model.registry import ModelSpec, get_spec, grid_size, num_parameters
from vitds.recipes import apply_recipe
from vitds.run_config import DataConfig, RunConfig, entries, run_config
from vitds.stream_facts import WEAKER_GUARANTEE, is_stream, read_stream_facts, shard_name
from vitds.transport import Url, location
from vitds.weights_header import WeightsHeader, read_header
from vitds.world import World, world_from_env

_DEFAULT_MODEL = "ViT-B_16"
_DEFAULT_IMAGE_SIZE = 224
_MAX_WORKERS = 8
_REMOTE_SHUFFLE_WINDOW = 16  # shards


@dataclass(frozen=True)
class Plan:
    """A run, fully resolved. Where `run` still holds None it means "none" (pretrained, stop_at_step, eval_every)."""

    run: RunConfig
    ds: dict[str, Any]  # what deepspeed.initialize is given
    optimizer: OptimizerPlan | None  # None: DeepSpeed builds its own from ds["optimizer"]
    schedule: SchedulePlan | None  # None: DeepSpeed builds its own from ds["scheduler"]
    batch: Batch
    world: World
    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    num_steps: int
    workers: int
    data_path: str
    activation_checkpointing: Literal["none", "selective", "full"] | int  # K: every K-th block
    memory: Training  # the run as the memory plan sees it
    checkpoint_on_cpu: bool
    dtype: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    classes: list[str]
    num_train: int  # samples of one epoch
    num_val: int  # 0: there is no validation split
    run_dir: Path
    warnings: list[str]
    sources: dict[str, str]  # dotted key -> "flag --x", "file.json:7", "recipe NAME", "default", "data", "weights", ...
    document: dict[str, Any]  # the file with the flags applied, as sections

    def resolved(self) -> dict[str, Any]:
        """The whole run as one configuration file that gives this run again on the same number of ranks (JSON-able)."""
        ours = ("optimizer", "scheduler", "activation_checkpointing")
        sections = {key: section for key, section in self.document.items() if key in ours}
        return self.ds | sections | {"vitds": dataclasses.asdict(self.run) | {"extend_to": None}}  # its num_steps now


def plan_run(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Plan:
    """Check a command line and everything that it names, and say what will be run.

    Raises: UsageError, ConfigError, WeightError, DataError or CheckpointError, in the order of the checks.
    """
    command = parse_command_line(argv)
    if command.config_file is None:
        raise UsageError(
            "--deepspeed_config is missing",
            fix="the recipes are in ds_configs/: --deepspeed_config ds_configs/quickstart.json",
        )
    document = read_document(command.config_file)
    ds_config.fill_defaults(document)
    apply_edits(document, command.edits)
    recipe_warnings = apply_recipe(document)
    world = world_from_env(environ)

    run = run_config(document)
    if run.data.path is None:
        raise UsageError("--data is missing", fix="--data DIR; python tools/shard_imagenet.py SOURCE DIR writes one")
    ds_config.check_keys(document)
    ds_config.check_combinations(document)
    _check_lengths(document, run)
    batch = _solve_batch(document, run, world)
    _check_mixup(document, run, batch)
    _check_order(document, run, batch)
    optimizer = ds_config.optimizer_plan(document)

    spec, image_size, header = _choose_model(document, run)
    facts = _dataset_facts(document, run)
    if run.data.val_path is not None:
        facts = validated_on(facts, read_dataset_facts(run.data.val_path, "val"))
    _check_one_label(document, run, facts)
    num_classes = run.num_classes or len(facts.classes)
    check_head(facts, num_classes)
    _check_loss(document, run, facts)
    warnings = recipe_warnings + ds_config.without_effect(document) + check_splits(facts) + check_mixture(facts)
    warnings += ds_config.about_precision(document) + _about_weights(run, header)
    if is_stream(run.data.path):
        warnings.append(WEAKER_GUARANTEE)
    elif run.data.samples_per_epoch:
        warnings.append("data.samples_per_epoch has no effect: the data have an index, which knows")
    if run.class_weights == "auto" and run.data.sampling == "balanced":
        warnings.append("balanced sampling shows each class equally often already, and class_weights auto weighs again")

    num_steps = _num_steps(document, run, facts.num_train, batch)
    _check_profile(document, run, num_steps)
    workers = _workers(world) if run.workers is None else run.workers
    warnings += ds_config.resolve_schedule(document, num_steps)
    schedule = ds_config.schedule_plan(document, num_steps)
    ds = ds_config.deepspeed_dict(
        document,
        batch,
        optimizer_type=optimizer.type if optimizer else None,
        own_schedule=schedule is not None,
        num_parameters=num_parameters(spec, image_size, num_classes, run.pre_logits),
    )
    _check_fp8(document, run, spec)
    memory = _memory(document, run, ds, batch, optimizer, spec, image_size, num_classes)
    checkpoint_on_cpu = bool(document.get("activation_checkpointing.cpu_checkpointing"))
    if run.compile and memory.activation_checkpointing == "selective" and checkpoint_on_cpu:
        raise ConfigError(
            "selective recomputation is part of the compiled blocks, where nothing can be moved to the CPU",
            where=document.where("vitds.compile"),
            fix="--compile false, or --activation-checkpointing full",
        )
    resolved = dataclasses.replace(
        run,
        model=spec.name,
        image_size=image_size,
        num_classes=num_classes,
        num_steps=num_steps,
        epochs=None,  # said in steps now
        name=run.name or _run_name(spec, facts.path),
        workers=workers,
        class_weights=class_weights(run.class_weights, facts, num_classes, document.where("vitds.class_weights")),
        activation_checkpointing=memory.activation_checkpointing,
        data=dataclasses.replace(
            run.data,
            shuffle_window=_shuffle_window(run),
            recipe=None,  # said in its values now
        ),
    )
    run_dir = Path(resolved.output_dir) / str(resolved.name)
    _check_run_dir(run_dir)
    _check_trackers(document, run)
    if run.resume not in ("auto", "never"):
        _check_resume_path(Path(run.resume))

    return Plan(
        run=resolved,
        ds=ds,
        optimizer=optimizer,
        schedule=schedule,
        batch=batch,
        world=world,
        spec=spec,
        image_size=image_size,
        num_classes=num_classes,
        num_steps=num_steps,
        workers=workers,
        data_path=run.data.path,
        activation_checkpointing=memory.activation_checkpointing,
        memory=memory,
        checkpoint_on_cpu=checkpoint_on_cpu,
        dtype=ds_config.dtype(document),
        zero_stage=ds_config.zero_stage(document),
        classes=facts.classes,
        num_train=facts.num_train,
        num_val=facts.num_val,
        run_dir=run_dir,
        warnings=warnings,
        sources=_sources(document, run, header),
        document=document.values,
    )


def _solve_batch(document: Document, run: RunConfig, world: World) -> Batch:
    """The batch sizes; where a run goes on with another number of ranks, its global batch stays what it was.

    Raises: ConfigError when the numbers do not multiply out, or these ranks cannot share the global batch.
    """
    saved, asked = _batch_on_record(document, run), document.get("train_batch_size")
    is_moved = (
        saved is not None
        and saved.world_size != world.world_size
        and asked in (None, "auto", saved.global_batch)
        and not ds_config.BATCH_KEYS.keys() & document.flags.keys()
    )
    try:
        batch = ds_config.solve_batch(document, world.world_size)
    except ConfigError:
        if not is_moved:
            raise
        batch = None
    if saved is None or not is_moved or (batch is not None and batch.global_batch == saved.global_batch):
        assert batch is not None
        return batch
    return ds_config.keep_global_batch(saved, world.world_size, unit=2 if run.data.mixes_pairs else 1)


def _batch_on_record(document: Document, run: RunConfig) -> Batch | None:
    """The batch sizes in the newest checkpoint that this command would go on from."""
    if run.resume == "never" or not (Path(run.output_dir).is_dir() or run.resume != "auto"):
        return None
    name = run.name or _run_name(_choose_model(document, run)[0], str(run.data.path))
    own = Path(run.output_dir) / name / "checkpoints"
    folders = [own] if run.resume == "auto" else [own, Path(run.resume) / "checkpoints", Path(run.resume)]
    for folder in folders:
        with contextlib.suppress(OSError, CheckpointError, KeyError, TypeError, ValueError):
            is_tag = folder.name.startswith("global_step")
            info = read_manifest(folder if is_tag else folder / Path((folder / "latest").read_text().strip()).name).info
            total, micro, accumulation = (int(info["config"][key]) for key in ds_config.BATCH_KEYS)
            return Batch(total, micro, accumulation, int(info["world_size"]))
    return None


def _dataset_facts(document: Document, run: RunConfig) -> DatasetFacts:
    """What the data say of themselves.

    Raises: ConfigError for a key that a stream cannot serve, and as those do who look.
    """
    data, multi_label = run.data, run.loss == "bce"
    assert data.path is not None
    if not is_stream(data.path):
        return read_dataset_facts(data.path)
    for key in ("sampling", "repeats", "weights", "shuffle_window"):
        if getattr(data, key) != getattr(DataConfig(), key):
            raise ConfigError(
                f'"data.{key}" needs an index, which a stream of tar shards has not',
                where=document.where(f"vitds.data.{key}"),
                fix="give the directory that tools/shard_imagenet.py wrote",
            )
    return read_stream_facts(data.path, run.num_classes, data.samples_per_epoch, multi_label, data.allow_pipe)


def _check_lengths(document: Document, run: RunConfig) -> None:
    """Refuse lengths that contradict each other, as far as that needs no data."""
    if run.num_steps and run.epochs:
        raise ConfigError(
            '"vitds.num_steps" and "vitds.epochs" are both given',
            where=document.where("vitds.epochs"),
            fix="keep one of them",
        )
    if not (run.num_steps or run.epochs or run.extend_to) and _scheduled_steps(document) is None:
        raise ConfigError(
            "the length of the run is not given", where=str(document.file), fix="add --num-steps N or --epochs N"
        )
    if run.extend_to or run.num_steps:
        _check_stop(document, run, run.extend_to or run.num_steps or 0)


def _check_stop(document: Document, run: RunConfig, num_steps: int) -> None:
    if run.stop_at_step is not None and run.stop_at_step > num_steps:
        where = document.where("vitds.stop_at_step")
        raise ConfigError(
            f"stop_at_step {run.stop_at_step} is after the last of {num_steps} steps",
            where=where,
            fix=f"at most {num_steps}",
        )


def _check_profile(document: Document, run: RunConfig, num_steps: int) -> None:
    """Raises: ConfigError when the profiled steps begin after the last one."""
    if run.profile is not None and int(run.profile.split(":")[0]) > num_steps:
        where = document.where("vitds.profile")
        raise ConfigError(f"the profile starts after the last of {num_steps} steps", where=where, fix="--profile 1:5")


def _scheduled_steps(document: Document) -> int | None:
    total = document.get("scheduler.params.total_num_steps")
    return total if isinstance(total, int) else None


def _num_steps(document: Document, run: RunConfig, num_train: int, batch: Batch) -> int:
    """Global steps of the run: given, or from its epochs, or from the scheduler's total_num_steps."""
    if given := run.extend_to or run.num_steps:
        return given
    steps = steps_for_epochs(run.epochs, num_train, batch.global_batch) if run.epochs else _scheduled_steps(document)
    if not steps:
        raise ConfigError(
            "the run has 0 steps", where=document.where("scheduler.params.total_num_steps"), fix="add --num-steps N"
        )
    _check_stop(document, run, steps)
    return steps


def _check_fp8(document: Document, run: RunConfig, spec: ModelSpec) -> None:
    """Raises: ConfigError when the blocks' linear layers cannot multiply in 8 bits."""
    if not run.fp8:
        return
    where, off = document.where("vitds.fp8"), "--set fp8=false"
    if (dtype := ds_config.dtype(document)) != "bf16":
        raise ConfigError(
            f"fp8 is for runs in bf16, and this one is in {dtype}",
            where=where,
            fix=f'"bf16": {{"enabled": true}}, or {off}',
        )
    if spec.width % 16 or spec.mlp % 16:
        raise ConfigError(
            f"products in 8 bits take multiples of 16, and {spec.name} has width {spec.width} and mlp {spec.mlp}",
            where=where,
            fix=off,
        )


def _check_mixup(document: Document, run: RunConfig, batch: Batch) -> None:
    """Raises: ConfigError when mixup or cutmix leave one image alone, or give targets that the loss cannot take."""
    for name, alpha in (("mixup", run.data.mixup_alpha), ("cutmix", run.data.cutmix_alpha)):
        if alpha and batch.micro_batch % 2:
            raise ConfigError(
                f"{name} takes images in pairs, and the micro-batch is odd ({batch.micro_batch})",
                where=document.where(f"vitds.data.{name}_alpha"),
                fix=f"choose an even micro-batch, or data.{name}_alpha 0",
            )
    if run.data.mixed_targets == "ones" and run.loss == "softmax":
        raise ConfigError(
            "mixed targets of ones are two classes at once, and softmax takes shares of one",
            where=document.where("vitds.loss"),
            fix="--loss bce, or --set data.mixed_targets=shares",
        )


def _check_loss(document: Document, run: RunConfig, facts: DatasetFacts) -> None:
    """Raises: ConfigError when images have any number of classes, and the loss knows of one."""
    if facts.multi_label and run.loss == "softmax":
        raise ConfigError(
            f"images of {facts.path} have any number of classes, and softmax takes one of each",
            where=document.where("vitds.loss"),
            fix="--loss bce",
        )


def _check_order(document: Document, run: RunConfig, batch: Batch) -> None:
    """Raises: ConfigError when the samples cannot be drawn as the data section says."""
    data, directories = run.data, split_paths(str(run.data.path))
    if "" in directories:
        raise ConfigError(
            "a directory without a name among those of the mixture",
            where=document.where("vitds.data.path"),
            fix="write DIR,DIR without a comma before, after or beside another",
        )
    if batch.global_batch % data.repeats:
        divisors = [str(number) for number in range(1, 65) if batch.global_batch % number == 0]
        raise ConfigError(
            f"the global batch of {batch.global_batch} cannot hold each image {data.repeats} times",
            where=document.where("vitds.data.repeats"),
            fix=f"data.repeats {' '.join(divisors)}, or a global batch that {data.repeats} divides",
        )
    if data.sampling == "balanced" and data.shuffle_window:
        raise ConfigError(
            "balanced sampling draws from all shards at once, and shuffle_window from a few",
            where=document.where("vitds.data.shuffle_window"),
            fix="data.shuffle_window 0, or natural sampling",
        )
    where = document.where("vitds.data.weights")
    if data.weights and len(data.weights) != len(directories):
        given = f"{len(data.weights)} weights for {len(directories)}"
        raise ConfigError(
            f"{given} director{'y' if len(directories) == 1 else 'ies'}: {', '.join(directories)}",
            where=where,
            fix="a weight for each directory of --data DIR,DIR, in their order",
        )
    for directory, weight in zip(directories, data.weights, strict=False):
        if weight / math.fsum(data.weights) < 1 / 10_000:
            share = f"{weight / math.fsum(data.weights):.2g}"
            raise ConfigError(
                f"{directory} has a share of {share}, and the least is 1/10000",
                where=where,
                fix="give it more, or leave the directory out",
            )


def _check_one_label(document: Document, run: RunConfig, facts: DatasetFacts) -> None:
    """Raises: ConfigError when classes are to be balanced and a sample may have several."""
    if run.data.sampling == "balanced" and facts.multi_label:
        raise ConfigError(
            "balanced sampling goes by the class of a sample, and samples of this data have any number of them",
            where=document.where("vitds.data.sampling"),
            fix="natural sampling; --class-weights auto weighs rare classes in the loss",
        )


def _shuffle_window(run: RunConfig) -> int | None:
    """Shards that are shuffled together: given, else all (0) of local data, a few of remote data, none of a stream."""
    if run.data.shuffle_window is not None or is_stream(str(run.data.path)):
        return run.data.shuffle_window
    is_remote = any(isinstance(location(directory), Url) for directory in split_paths(str(run.data.path)))
    return _REMOTE_SHUFFLE_WINDOW if is_remote and run.data.sampling == "natural" else 0


def _choose_model(document: Document, run: RunConfig) -> tuple[ModelSpec, tuple[int, int], WeightsHeader | None]:
    """Architecture and image size: given, else the weights', else the defaults.

    Raises: ConfigError for a name, image size or number of blocks that does not exist; WeightError for the weights.
    """
    try:
        header = read_header(run.pretrained, run.model) if run.pretrained else None
        spec = header.spec if header else get_spec(run.model or _DEFAULT_MODEL)
        default = header.image_size if header else _DEFAULT_IMAGE_SIZE
        image_size = _height_and_width(run.image_size or default)
        grid_size(spec, image_size)
    except ConfigError as error:
        key = "vitds.image_size" if "image size" in error.what else "vitds.model"
        raise ConfigError(error.what, where=error.where or document.where(key), fix=error.fix) from None
    if spec.in_channels != 3:
        raise ConfigError(
            f"images have 3 channels, and the model takes {spec.in_channels}", where=document.where("vitds.model")
        )
    num_last = int(run.train.removeprefix("last-")) if run.train.startswith("last-") else 0
    if num_last > spec.depth:
        where = document.where("vitds.train")
        raise ConfigError(
            f'"{run.train}", but {spec.name} has {spec.depth} blocks', where=where, fix=f"last-1 to last-{spec.depth}"
        )
    return spec, image_size, header


def _about_weights(run: RunConfig, header: WeightsHeader | None) -> list[str]:
    """What the user should know of the weights: notes of their own, and images that they know otherwise prepared."""
    if header is None:
        return []
    warnings = [f"{run.pretrained}: {note}" for note in header.notes]
    differing = {
        key: header.data[key]
        for key in ("mean", "std", "interpolation")
        if header.data and key in header.data and _of_channels(header.data[key]) != _of_channels(getattr(run.data, key))
    }
    if differing:
        theirs = ", ".join(f"{key} {_text(value)}" for key, value in differing.items())
        here = ", ".join(f"{key} {_text(getattr(run.data, key))}" for key in differing)
        flags = " ".join(f"--set 'data.{key}={_text(value)}'" for key, value in differing.items())
        warnings.append(f"{run.pretrained} was evaluated with {theirs}, this run has {here}: {flags}")
    return warnings


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _of_channels(value: Any) -> Any:
    """A mean or deviation, one number or one per channel, as three numbers."""
    if isinstance(value, list | tuple):
        return tuple(value) * (3 if len(value) == 1 else 1)
    return (value,) * 3


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _memory(
    document: Document,
    run: RunConfig,
    ds: dict[str, Any],
    batch: Batch,
    optimizer: OptimizerPlan | None,
    spec: ModelSpec,
    image_size: tuple[int, int],
    num_classes: int,
) -> Training:
    """The run as the memory plan sees it, with activation checkpointing resolved.

    That is the flag or vitds' own key; else on when DeepSpeed's section is there. "auto" recomputes the least that fits
    the GPU, and nothing without a GPU.
    """
    mode = run.activation_checkpointing
    if mode is None:
        mode = "full" if document.get("activation_checkpointing") is not None else "none"
    zero, precision = ds["zero_optimization"], ds_config.dtype(document)
    moments = 2 if optimizer is None or optimizer.type != "SGD" else int(optimizer.params["momentum"] > 0)
    accumulated = ds.get("data_types", {}).get("grad_accum_dtype") or precision
    gpu_bytes = smallest_gpu_memory_bytes() if mode == "auto" else None
    memory = Training(
        spec,
        image_size,
        num_classes,
        pre_logits=run.pre_logits,
        dtype=precision,
        accumulation_dtype=accumulated if accumulated in ("fp32", "bf16", "fp16") else "fp32",
        zero_stage=ds_config.zero_stage(document),
        world_size=batch.world_size,
        micro_batch=batch.micro_batch,
        accumulation_steps=batch.accumulation_steps,
        activation_checkpointing="none" if mode == "auto" else mode,
        offloads_optimizer=ds_config.offloads_optimizer(document),
        optimizer_states=moments + (run.ema_decay > 0),
        train=run.train,
        dropout=run.dropout,
        reduce_bucket=int(zero.get("reduce_bucket_size", Training.reduce_bucket)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", Training.prefetch_bucket)),
        # DeepSpeed keeps too what comes again within the reuse distance, which counts on the way there and back.
        max_live_parameters=max(
            int(zero.get("stage3_max_live_parameters", Training.max_live_parameters)),
            int(zero.get("stage3_max_reuse_distance", Training.max_live_parameters)) // 2,
        ),
        overlap_comm=bool(zero.get("overlap_comm")),
        on_gpu=gpu_bytes is not None or Path("/dev/nvidiactl").exists(),
    )
    if mode != "auto" or gpu_bytes is None:
        return memory
    return dataclasses.replace(memory, activation_checkpointing=choose_checkpointing(memory, USABLE * gpu_bytes))


def _run_name(spec: ModelSpec, data_path: str) -> str:
    """Model and data set, as a directory name."""
    if is_stream(data_path):
        data = shard_name(data_path).split("{")[0].strip("-_")
    else:
        places = [location(directory) for directory in split_paths(data_path)]
        data = "+".join(place.name if isinstance(place, Url) else place.resolve().name for place in places)
    return re.sub(r"[^\w.+-]+", "-", f"{spec.name}-{data}")


def _workers(world: World) -> int:
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // world.local_world_size)


def _check_trackers(document: Document, run: RunConfig) -> None:
    """Raises: ConfigError when a tracker's package is not installed."""
    for name in run.track:
        if importlib.util.find_spec(name) is None:
            where = document.where("vitds.track")
            raise ConfigError(f"{name} is not installed", where=where, fix="pip install -e '.[track]'")


def _check_run_dir(run_dir: Path) -> None:
    """Raises: CheckpointError when the run directory could not be written."""
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is read-only" if existing.is_dir() else "is no directory"
        raise CheckpointError(
            f"the run directory cannot be written: {existing} {what}", where=str(run_dir), fix="--output-dir DIR"
        )


def _check_resume_path(path: Path) -> None:
    """Raises: CheckpointError when there is nothing to resume from, with what is there instead."""
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not path.is_dir():
        raise CheckpointError(
            "nothing to resume from: no such directory", where=f"--resume {path}", fix=_what_is_in(path.parent)
        )
    is_checkpoint = any((checkpoints / name).exists() for name in ("MANIFEST.json", "latest")) or any(
        checkpoints.glob("global_step*")
    )
    if not is_checkpoint:
        raise CheckpointError("holds no checkpoint", where=f"--resume {path}", fix=_what_is_in(path))


def _what_is_in(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} does not exist either"
    names = sorted(entry.name for entry in directory.iterdir())
    return f"{directory} holds: {', '.join(names[:12])}" if names else f"{directory} is empty"


def _sources(document: Document, run: RunConfig, header: WeightsHeader | None) -> dict[str, str]:
    """Where every value of the run comes from, by dotted key."""
    keys = [f"vitds.{key}" for key in entries()] + list(_flat_keys(document.values))
    sources = {key: document.source(key) for key in keys}
    if run.image_size is None and header:
        sources["vitds.image_size"] = "weights"
    if run.model is None and header:
        sources["vitds.model"] = "weights"
    if run.num_classes is None:
        sources["vitds.num_classes"] = "data"
    for key in (
        *ds_config.BATCH_KEYS,
        "vitds.num_steps",
        "vitds.epochs",
        "vitds.name",
        "vitds.data.shuffle_window",
        "scheduler.params.total_num_steps",
    ):
        if sources.get(key, "default") == "default" or document.get(key) == "auto":
            sources[key] = "derived"
    return sources


def _flat_keys(section: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all leaves outside the vitds section."""
    found: list[str] = []
    for name, value in section.items():
        if isinstance(value, dict) and value:
            found += _flat_keys(value, f"{prefix}{name}.") if prefix + name != "vitds" else []
        else:
            found.append(prefix + name)
    return found
