"""Going on: which checkpoint, whether this command may continue it, and where the run stands."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vitds import collectives
from vitds.checkpoint import CheckpointStore, Choice, committed_checkpoints, step_of
from vitds.engine import Engine
from vitds.errors import CheckpointError, UsageError
from vitds.log import RunLog
from vitds.manifest import read_manifest
from vitds.preflight import Plan
from vitds.world import World

# What may differ between a checkpoint and the command that goes on from it: none of it changes which samples are seen,
# with which augmentation, or what is minimised.
_FREE_TO_CHANGE = frozenset(
    """vitds.name vitds.output_dir vitds.pretrained vitds.resume vitds.stop_at_step vitds.eval_every vitds.save_every
    vitds.log_every vitds.keep_last vitds.eval_batch_size vitds.workers vitds.track vitds.max_bad_samples vitds.epochs
    vitds.data.path vitds.activation_checkpointing vitds.data.eval_crop vitds.data.crop_fraction
    train_micro_batch_size_per_gpu gradient_accumulation_steps""".split()
)
_FREE_SECTIONS = ("zero_optimization.", "activation_checkpointing.", "steps_per_print", "wall_clock_breakdown", "comms_logger.")


class RunLock:
    """One process at a time works in a run directory; rank 0 makes it and holds the lock until the process ends."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir, self._world = run_dir, world

    def __enter__(self) -> None:
        if not self._world.is_main:
            return
        try:
            (self._run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._file = open(self._run_dir / ".lock", "w")
        except OSError as error:
            raise CheckpointError(f"the run directory cannot be written: {error.strerror}", where=str(self._run_dir)) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                "another process is training in this run directory", where=str(self._run_dir), fix="choose another --name"
            ) from None

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._world.is_main:
            self._file.close()


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0
    samples_seen: int = 0
    best_top1: float | None = None
    best_step: int | None = None
    skipped_in_a_row: int = 0
    last_save_failed: bool = False

    @classmethod
    def restore(cls, engine: Engine, choice: Choice) -> Progress:
        """Load the chosen checkpoint into the engine, or start at step 0 when there is none.

        Raises: CheckpointError when the engine and the checkpoint disagree about the step.
        """
        if choice.directory is None:
            return cls()
        state = engine.load(choice.directory.parent, choice.directory.name).get("vitds", {})
        if state.get("step") != step_of(choice.directory):
            raise CheckpointError("holds no state of a vitds run", where=str(choice.directory), fix="use --pretrained for weights")
        return cls(**state)

    def advance(self, global_batch: int, applied: bool) -> None:
        """Count one global step."""
        self.step += 1
        self.samples_seen += global_batch
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def note_top1(self, top1: float) -> bool:
        """Remember a validation result; True when it is the best so far."""
        if self.best_top1 is not None and top1 <= self.best_top1:
            return False
        self.best_top1, self.best_step = top1, self.step
        return True

    def save(self, engine: Engine, store: CheckpointStore, plan: Plan, log: RunLog) -> None:
        """Commit a checkpoint; a failed save is said and training goes on with the checkpoints it has."""
        state = {"vitds": dataclasses.asdict(self) | {"last_save_failed": False}}
        try:
            store.save(lambda directory, tag: engine.save(directory, tag, state), self.step, checkpoint_info(plan, self.step))
        except CheckpointError as error:
            self.last_save_failed = True
            log.say(str(error))
            return
        self.last_save_failed = False
        if self.best_step == self.step:
            store.mark_best(self.step)
        store.prune(plan.run.keep_last)


def checkpoint_info(plan: Plan, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself in its manifest: the model, what it was fed, and the resolved configuration."""
    run = plan.run
    return {
        "model": plan.spec.name,
        "image_size": list(run.image_size),
        "num_classes": run.num_classes,
        "pre_logits": None,
        "classes": plan.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "step": step,
        "world_size": plan.world.world_size,
        "zero_stage": plan.zero_stage,
        "dtype": plan.dtype,
        "num_train": plan.num_train,
        "config": plan.resolved(),
    }


def choose_checkpoint(plan: Plan, store: CheckpointStore) -> Choice:
    """The checkpoint that this command goes on from; collective.

    Raises: CheckpointError when one is on record and cannot be used, UsageError when the run is finished or must not be resumed.
    """
    resume, own = plan.run.resume, store.newest_whole() if plan.run.resume != "never" else Choice(None)
    if resume == "never" and collectives.broadcast(store.has_commit_on_record()):
        raise UsageError(
            "--resume never, and this run has checkpoints", where=str(plan.run_dir), fix=_two_ways_out(plan)
        )
    choice = own
    if resume not in ("auto", "never"):
        asked = _asked_for(Path(resume), plan.world)
        # Started before from PATH, this run goes on from its own newer checkpoints: the same command resumes.
        if own.directory is None or (asked.directory.parent != own.directory.parent and step_of(asked.directory) >= step_of(own.directory)):
            choice = asked
        elif asked.directory.parent.resolve() == own.directory.parent.resolve() and asked.directory != own.directory:
            raise CheckpointError(
                f"the run has a newer checkpoint, {own.directory.name}",
                where=str(asked.directory),
                fix=f"--resume auto goes on from it; to branch off at {asked.directory.name}, give a new --name",
            )
    if choice.directory is not None:
        _check_fits(choice.directory, plan)
        if choice is own and step_of(choice.directory) >= plan.run.num_steps:
            raise UsageError(
                f"this run is finished ({step_of(choice.directory)} steps)", where=str(plan.run_dir), fix=_two_ways_out(plan)
            )
    return choice


def _asked_for(path: Path, world: World) -> Choice:
    """The checkpoint that --resume PATH names: a global_stepN, a checkpoints directory, or a run."""
    if path.name.startswith("global_step"):
        found = CheckpointStore(path.parent, world).verify(path)
        if found:
            raise CheckpointError("the checkpoint is damaged", where=str(path), fix="\n".join(found[:4]))
        return Choice(path)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    choice = CheckpointStore(directory, world).newest_whole()
    if choice.directory is None:
        raise CheckpointError("no checkpoint here", where=str(path))
    return choice


def _check_fits(directory: Path, plan: Plan) -> None:
    """Raises: CheckpointError when the checkpoint belongs to another run, or was sharded in another way."""
    info = read_manifest(directory).info
    saved, now = info.get("config"), plan.resolved()
    if saved is None:
        raise CheckpointError("holds weights, not a run", where=str(directory), fix=f"--pretrained {directory}")
    differences = [line for key, line in _differences(saved, now) if not _is_free(key)]
    for key, current in (("classes", plan.classes), ("num_train", plan.num_train)):
        if info[key] != current:
            differences.append(f"{key} of the data differ from those of the checkpoint")
    if differences:
        raise CheckpointError(
            "the command differs from the run that it would resume",
            where=str(directory),
            fix="\n".join([*differences[:8], f"restore these, or start a new run with --pretrained {directory} --name NEW"]),
        )
    sharding = {"zero_stage": plan.zero_stage, "dtype": plan.dtype, "world_size": plan.world.world_size}
    for key, current in sharding.items():
        if info[key] != current and not (key == "world_size" and plan.zero_stage == 0):
            raise CheckpointError(
                f"was saved with {key} {info[key]}, this run has {current}",
                where=str(directory),
                fix=f"start it as it was saved, or begin a new run with --pretrained {directory} --name NEW",
            )


def _differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif saved != now:
        yield key, f"{key}: {saved!r} in the checkpoint, {now!r} now"


def _is_free(key: str) -> bool:
    return key in _FREE_TO_CHANGE or key.startswith(_FREE_SECTIONS)


def _two_ways_out(plan: Plan) -> str:
    newest = committed_checkpoints(plan.run_dir / "checkpoints")
    start = f" --pretrained {newest[0]}" if newest else ""
    return f"train under another name: --name NEW{start}\nor move {plan.run_dir} away"
