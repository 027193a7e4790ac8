"""The run: build, restore, and the loop, in the order of time."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import vitds
from vitds import collectives
from vitds.checkpoint import CheckpointStore
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.reader import ShardReader
from vitds.engine import Engine, start_ranks
from vitds.errors import EXIT_DONE, CheckpointError, Diverged, OutOfMemory, RankLost
from vitds.evaluate import predict
from vitds.log import RunLog
from vitds.loss import cross_entropy
from vitds.meter import Meter
from vitds.optim import build_optimizer, parameter_groups, select_trainable
from vitds.predictions import Predictions
from vitds.preflight import Plan
from vitds.resume import Progress, RunLock, choose_checkpoint
from vitds.schedule import lr_factor
from vitds.stop import StopRequest
from vitds.weights.create import create_model

# So many steps in a row without an update are no longer a spike.
_MAX_SKIPPED_IN_A_ROW = 50


def train(plan: Plan) -> int:
    """Train what `plan` says and return the exit code (0 done, 75 or 130 stopped with a checkpoint saved)."""
    with _faults_named(plan), RunLock(plan.run_dir, plan.world):
        return _run(plan)


def _run(plan: Plan) -> int:
    run, batch = plan.run, plan.batch
    device = start_ranks(plan.world)
    torch.manual_seed(run.seed)
    store = CheckpointStore(plan.run_dir / "checkpoints", plan.world)
    choice = choose_checkpoint(plan, store)
    engine = _build_engine(plan, device, load_pretrained=choice.directory is None)
    progress = Progress.restore(engine, choice)
    train_data = ShardReader(plan.run.data.path, "train")
    batches = iter(_train_loader(plan, train_data, progress.samples_seen, engine))
    meter, stop = Meter(), StopRequest()

    with RunLog(
        plan.run_dir, is_main=plan.world.is_main, num_steps=run.num_steps, start_step=progress.step, track=tuple(run.track)
    ) as log:
        _introduce(plan, choice.passed_over, progress, log)
        while progress.step < run.num_steps:
            lr, loss_sum = engine.lr, torch.zeros((), dtype=torch.float64, device=device)
            engine.train()
            for _ in range(batch.accumulation_steps):
                with meter.waiting_for_data():
                    micro_batch = next(batches)
                _seed_dropout(run.seed, progress.step, micro_batch.index)
                loss = cross_entropy(engine(micro_batch.images), micro_batch.targets, run.label_smoothing)
                engine.backward(loss)
                applied = engine.step()
                loss_sum += loss.detach()
            progress.advance(batch.global_batch, applied)
            meter.count(batch.global_batch)
            step, last = progress.step, progress.step == run.num_steps

            if step % run.log_every == 0:
                loss_mean = collectives.mean_over_ranks(loss_sum / batch.accumulation_steps)
                log.record(_train_line(plan, progress, engine, meter, loss_mean, lr))
                _stop_if_diverged(loss_mean, applied, progress)
            log.advance(step)

            stopping = stop.agreed() or step == run.stop_at_step
            is_best = False
            if plan.num_val and (last or _due(step, run.eval_every)):
                with meter.paused():
                    predictions = _evaluate(plan, engine)
                    is_best = progress.note_top1(predictions.top1)
                    log.record(_val_line(plan, progress, predictions))
            if last or stopping or is_best or _due(step, run.save_every):
                with meter.paused():
                    progress.save(engine, store, plan, log)
            if stopping and not last and not progress.last_save_failed:
                code = stop.exit_code
                log.say(f"stopped at step {step} with a checkpoint saved; the same command goes on from here (exit {code})")
                return code
        return _conclude(plan, progress, log)


def _build_engine(plan: Plan, device: torch.device, load_pretrained: bool) -> Engine:
    run = plan.run
    model = create_model(
        plan.spec.name,
        image_size=run.image_size,
        num_classes=run.num_classes,
        weights=run.pretrained if load_pretrained else None,
        dropout=run.dropout,
        drop_path=run.drop_path,
    )
    model.set_activation_checkpointing(plan.activation_checkpointing, offload_to_cpu=plan.checkpoint_on_cpu)
    select_trainable(model, run.train)
    params = dict(plan.optimizer.params) if plan.optimizer else dict(plan.ds["optimizer"].get("params", {}))
    groups = parameter_groups(model, params.get("weight_decay", 0.0), run.weight_decay_on)
    optimizer = build_optimizer(plan.optimizer.type, params, groups) if plan.optimizer else None
    schedule = plan.schedule
    factor = lr_factor(schedule.type, schedule.warmup_steps, schedule.total_steps) if schedule else None
    return Engine(model, optimizer, groups, factor, plan.ds, device)


def _train_loader(plan: Plan, dataset: ShardReader, samples_seen: int, engine: Engine) -> TrainLoader:
    run = plan.run
    return TrainLoader(
        dataset,
        run.data,
        run.image_size,
        run.num_classes,
        plan.batch,
        plan.world,
        seed=run.seed,
        samples_seen=samples_seen,
        num_steps_end=run.num_steps,
        workers=run.workers,
        device=engine.device,
        dtype=engine.dtype,
        max_bad_samples=run.max_bad_samples,
    )


def _evaluate(plan: Plan, engine: Engine) -> Predictions:
    run = plan.run
    loader = EvalLoader(
        ShardReader(run.data.path, "val"),
        run.data,
        run.image_size,
        run.eval_batch_size,
        plan.world,
        workers=run.workers,
        device=engine.device,
        dtype=engine.dtype,
    )
    engine.train(False)
    return predict(engine, loader)


def _seed_dropout(seed: int, step: int, micro_index: int) -> None:
    """Dropout and drop-path are a function of (seed, step, micro-batch), so a resumed run draws what an unbroken one draws."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + micro_index)


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def _train_line(
    plan: Plan, progress: Progress, engine: Engine, meter: Meter, loss: float, lr: float
) -> dict[str, Any]:
    reading = meter.read()
    left = (plan.run.num_steps - progress.step) * plan.batch.global_batch
    return {
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "epoch": progress.samples_seen // plan.num_train,
        "split": "train",
        "loss": loss,
        "lr": lr,
        "grad_norm": engine.grad_norm,
        "loss_scale": engine.loss_scale,
        "skipped_steps": engine.skipped_steps,
        **reading,
        "eta_s": left / max(reading["images_per_s"], 1e-9),
        "mem_gib": _peak_memory_gib(engine.device),
    }


def _val_line(plan: Plan, progress: Progress, predictions: Predictions) -> dict[str, Any]:
    return {
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "epoch": progress.samples_seen // plan.num_train,
        "split": "val",
        "loss": predictions.loss,
        "top1": predictions.top1,
        "top5": predictions.top5,
    }


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _stop_if_diverged(loss: float, applied: bool, progress: Progress) -> None:
    """Raises: Diverged when weights were updated with a loss that is not finite, or nothing has been applied for long."""
    finite = loss == loss and abs(loss) != float("inf")
    if (applied and not finite) or progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
        what = "the loss is not finite" if not finite else f"{progress.skipped_in_a_row} steps in a row were skipped"
        raise Diverged(
            f"{what} at step {progress.step}",
            fix="lower the learning rate, lengthen the warmup, or clip gradients; the last checkpoint is from before",
        )


def _introduce(plan: Plan, passed_over: list[str], progress: Progress, log: RunLog) -> None:
    """Write what the run is to its directory, and say where it starts."""
    if not plan.world.is_main:
        return
    versions = {name: __import__(name).__version__ for name in ("torch", "torchvision", "deepspeed", "numpy", "pyarrow")}
    environment = {"python": platform.python_version(), "vitds": vitds.__version__, **versions, "host": platform.node()}
    environment["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    environment["world_size"] = str(plan.world.world_size)
    (plan.run_dir / "config.resolved.json").write_text(json.dumps(plan.resolved() | {"sources": plan.sources}, indent=1) + "\n")
    (plan.run_dir / "classes.json").write_text(json.dumps(plan.classes, indent=0) + "\n")
    (plan.run_dir / "env.json").write_text(json.dumps(environment, indent=1) + "\n")
    with open(plan.run_dir / "command.txt", "a") as commands:
        commands.write(shlex.join([sys.executable, *sys.argv]) + "\n")
    device = environment["device"]
    for warning in plan.warnings:
        log.say(f"warning  {warning}")
    for damaged in passed_over:
        log.say(f"passed over a damaged checkpoint  {damaged}")
    log.say(
        f"{plan.spec.name}  {run_shape(plan)}  {plan.dtype}  ZeRO {plan.zero_stage}  {plan.world.world_size} ranks on {device}"
    )
    start = "starting at step 0" if progress.step == 0 else f"resumed at step {progress.step}"
    log.say(f"{start} of {plan.run.num_steps}, {progress.samples_seen} samples seen, in {plan.run_dir}")


def run_shape(plan: Plan) -> str:
    """Image size, classes and batch in one line."""
    height, width = plan.run.image_size
    batch = plan.batch
    return (
        f"{height}x{width} px  {plan.run.num_classes} classes  global batch {batch.global_batch} = "
        f"{batch.micro_batch} x {batch.accumulation_steps} x {batch.world_size}"
    )


def _conclude(plan: Plan, progress: Progress, log: RunLog) -> int:
    """Raises: CheckpointError when the last checkpoint could not be saved."""
    if progress.last_save_failed:
        raise CheckpointError("the last checkpoint could not be saved; see above", where=str(plan.run_dir))
    if not plan.num_val:
        log.say("the data has no validation split, so nothing was evaluated")
    best = f"  best top-1 {progress.best_top1:.2%} at step {progress.best_step}" if progress.best_top1 is not None else ""
    log.say(f"done: {progress.step} steps{best}  {plan.run_dir}")
    return EXIT_DONE


@contextmanager
def _faults_named(plan: Plan) -> Iterator[None]:
    """Give the faults that a user can act on their names and exit codes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            str(error).split(". ")[0],
            fix="lower --micro-batch-size (the global batch stays), or add --activation-checkpointing full",
        ) from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("closed by peer", "Connection reset", "Broken pipe", "NCCL", "Timed out waiting")):
            raise RankLost(
                f"rank {plan.world.rank} lost contact with another rank: {str(error).splitlines()[0]}",
                fix="the same command goes on from the last checkpoint",
            ) from error
        raise
