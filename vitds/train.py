"""The run: build, restore, and the loop, in the order of time."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from vitds import collectives
from vitds.auto_micro_batch import smaller_if_out_of_memory
from vitds.checkpoint import CheckpointStore, Choice
from vitds.data.counter import Stream, random_bits
from vitds.data.decode import jpeg_decoder, jpeg_decoder_name
from vitds.data.loader import MicroBatch, RankLoader
from vitds.divergence import LossOf, LostTrack, NumberWatch, go_back
from vitds.ds_config import describe_precision
from vitds.engine import Engine, start_ranks
from vitds.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, OutOfMemory
from vitds.evaluate import predict
from vitds.faults import faults_named
from vitds.feed import describe_cache, eval_loader, train_loader
from vitds.flops import describe_mfu, forward_flops, mfu
from vitds.gpu_memory import smallest_gpu_memory_bytes
from vitds.log import RunLog
from vitds.loss import LOSSES
from vitds.memory_plan import GIB, advice, plan_memory
from vitds.meter import Meter
from vitds.model.attention_backend import choose_attention
from vitds.model.fp8 import check_fp8
from vitds.model.precision import DTYPES
from vitds.optim import build_optimizer, decay_by_layer, layer_of, parameter_groups, select_trainable
from vitds.preflight import Plan
from vitds.resume import Progress, choose_checkpoint, place_in_data
from vitds.run_directory import RunLock, describe_run, device_name
from vitds.saver import Saver
from vitds.schedule import lr_factor
from vitds.step_profile import StepProfiler
from vitds.stop import StopRequest
from vitds.verdict import BEFORE_TRAINING, verdict
from vitds.watchdog import Watchdog
from vitds.weights.create import create_model


def train(plan: Plan) -> int:
    """Train what `plan` says and return the exit code: 0 done, 75 or 130 stopped with a checkpoint saved.

    Raises: CheckpointError, DataError, Diverged, OutOfMemory, RankLost.
    """
    verdict.begin()
    with (
        faults_named(plan.world.rank),
        RunLock(plan.run_dir, plan.world) as lock,
    ):
        device = start_ranks(plan.world, plan.run.hang_timeout_s)
        stop = StopRequest()
        lock.check_shared()
        plan = _agreed(plan)
        with (
            Watchdog(plan.world, plan.run.hang_timeout_s) as watch,
            faults_named(plan.world.rank, lambda fault: _explain(fault, plan, watch)),
            smaller_if_out_of_memory(plan, watch),
        ):
            return _train(plan, device, watch, stop)


def _explain(fault: OutOfMemory, plan: Plan, watch: Watchdog) -> None:
    """Say where memory ran out, and what needs less there."""
    fault.where, size = watch.place, plan.run.eval_batch_size
    if watch.phase == "evaluate" and size > 1:
        fault.fix = f"--eval-batch-size {size // 2} needs less: a validation batch has {size} images a rank"
    else:
        fault.fix = advice(plan.memory, smallest_gpu_memory_bytes())


def _agreed(plan: Plan) -> Plan:
    """Where GPUs differ in memory, "auto" chose by each rank's own: all recompute what one must; collective."""
    modes = collectives.gather(plan.activation_checkpointing)
    if len(set(modes)) == 1:
        return plan
    most = {"activation_checkpointing": max(modes, key=("none", "selective", "full").index)}
    run, memory = dataclasses.replace(plan.run, **most), dataclasses.replace(plan.memory, **most)
    return dataclasses.replace(plan, run=run, memory=memory, **most)


def _train(plan: Plan, device: torch.device, watch: Watchdog, stop: StopRequest) -> int:
    torch.manual_seed(plan.run.seed)
    store = CheckpointStore(plan.run_dir / "checkpoints", plan.world, collectives.own_group())
    choice = choose_checkpoint(plan, store)
    verdict.belongs_to(plan.run_dir, plan.world.is_main)
    loader = train_loader(plan, device, *place_in_data(choice, plan.batch.global_batch))
    batches = iter(loader)  # its workers start before the model is there, and so hold no copy of it
    engine = _build_engine(plan, device, pretrained=plan.run.pretrained if choice.directory is None else None)
    progress = Progress.restore(engine, choice)
    with RunLog(plan.run_dir, plan.world.is_main, plan.num_steps, progress.step, plan.run.track) as log:
        _introduce(plan, choice, progress, log)
        if plan.run.profile is not None:
            profiler = StepProfiler(plan.run.profile, plan.run_dir, plan.world.rank, device, log.say, watch.enter)
            watch.on_enter = profiler.enter
        exit_code = None
        while exit_code is None:
            loader.on_bad_sample = lambda bad: log.say_from_any_rank(f"{bad.event}  {bad}")
            loader.on_lost_worker = lambda text: log.say_from_any_rank(f"rank {plan.world.rank}: {text}")
            loader.on_wait = watch.waits_for_data
            loader.known_bad.update(progress.bad_samples)
            try:
                with Saver(plan, engine, store, log, progress) as saver:
                    exit_code = _loop(plan, engine, loader, batches, saver, progress, log, watch, stop)
            except LostTrack as error:
                watch.enter("load")
                progress = go_back(plan, engine, store, progress, log, error)
                cast(Generator, batches).close()  # the processes of what would have come
                loader = train_loader(plan, device, **progress.place_in_data)
                batches = iter(loader)
        if progress.bad_samples:
            weights = progress.bad_samples.values()
            num_bad = f"about {sum(weights)}" if max(weights) > 1 else str(len(weights))
            log.say(f"{num_bad} of {plan.num_train} training samples are bad and were replaced")
        return exit_code


def _loop(
    plan: Plan,
    engine: Engine,
    loader: RankLoader,
    batches: Iterator[MicroBatch],
    saver: Saver,
    progress: Progress,
    log: RunLog,
    watch: Watchdog,
    stop: StopRequest,
) -> int:
    run, batch, meter = plan.run, plan.batch, Meter()
    loss_of = _loss_function(plan, engine)
    numbers = NumberWatch(plan, engine, loader, log, loss_of, watch)
    if run.stop_at_step is not None and progress.step >= run.stop_at_step:
        log.say(f"already at step {progress.step}, --stop-at-step is {run.stop_at_step}")
        return EXIT_STOPPED
    if stop.agreed_before_training():
        log.say(f"{BEFORE_TRAINING}; the same command starts again (exit {stop.exit_code})")
        return stop.exit_code

    is_save_due = False
    if progress.step == plan.num_steps:  # it was killed behind its last commit
        verdict.step = progress.step
        saver.tidy(progress)
    while progress.step < plan.num_steps:
        engine.train()
        lr, loss_sum, pixel_hash = engine.lr, torch.zeros((), dtype=torch.float64, device=engine.device), 0
        for _ in range(batch.accumulation_steps):
            watch.enter("data", progress.step + 1)
            with meter.waiting_for_data():
                micro_batch = next(batches)
            watch.enter("forward")
            loss = loss_of(engine, micro_batch, progress.step)
            watch.enter("backward")
            engine.backward(loss)
            watch.enter("update")
            engine.step()
            numbers.note(micro_batch, loss)
            loss_sum += loss.detach()
            pixel_hash += micro_batch.pixel_hash
        watch.enter("log")
        progress.advance(batch.global_batch)
        meter.count(batch.global_batch)
        verdict.step = step = progress.step
        is_last = step == plan.num_steps

        is_stopping = stop.agreed() or step == run.stop_at_step
        is_logged = _due(step, run.log_every)
        is_evaluated = plan.num_val > 0 and (is_last or _due(step, run.eval_every))
        is_save_due = is_save_due or is_last or is_stopping or _due(step, run.save_every)
        is_read = is_logged or is_evaluated or is_save_due  # else nothing waits for the device
        outcomes = engine.outcomes(wait=is_read)
        numbers.end_step(progress, outcomes)
        if is_read:
            progress.share_bad_samples(loader)
            mean_loss = collectives.mean_over_ranks(loss_sum / batch.accumulation_steps)
            if is_logged:
                log.record(_train_line(plan, engine, progress, meter, mean_loss, lr, pixel_hash))
            if outcomes[-1]:
                numbers.check_loss(mean_loss, engine.grad_norm, step)  # before lost weights are saved
        # A skipped step may be the first of many, and is not saved where another will be.
        is_saved = is_save_due and (outcomes[-1] or is_last or is_stopping)
        log.advance(step)

        with meter.paused():
            is_best = False
            if is_evaluated:
                watch.enter("evaluate")
                figures = _evaluate(plan, engine, watch)
                log.record(_val_line(plan, progress, figures))
                numbers.check_loss(figures["loss"], None, step)
                watch.enter("save")
                saver.settle(progress)
                is_best = progress.note_best(figures)
            if is_saved or is_best:
                watch.enter("save")
                numbers.check_weights(step)
                is_save_due = False
                progress.note_shards(loader)
                saver.save(progress)
        if is_stopping and not is_last:
            break
    watch.enter("save")
    saver.settle(progress)
    return _conclude(plan, progress, stop, log)


def _build_engine(plan: Plan, device: torch.device, pretrained: str | None) -> Engine:
    run = plan.run
    choose_attention(run.attention, plan.spec, plan.image_size, DTYPES[plan.dtype], device)
    model = create_model(
        plan.spec.name,
        image_size=plan.image_size,
        num_classes=plan.num_classes,
        weights=pretrained,
        pre_logits=run.pre_logits,
        dropout=run.dropout,
        drop_path=run.drop_path,
        drop_path_subset=run.drop_path_subset,
        token_drop=run.token_drop,
    )
    model.set_activation_checkpointing(plan.activation_checkpointing, offload_to_cpu=plan.checkpoint_on_cpu)
    if run.fp8:
        check_fp8(plan.spec, plan.image_size, device)
        model.use_fp8()
    if run.compile:
        model.compile_blocks("default" if run.compile is True else run.compile)
    select_trainable(model, run.train, plan.spec.depth)
    params = plan.optimizer.params if plan.optimizer else plan.ds["optimizer"].get("params", {})
    groups = parameter_groups(model, params.get("weight_decay", 0.0), run.weight_decay_on)
    groups = decay_by_layer(groups, model, plan.spec.depth, params.get("lr", 1e-3), run.layer_decay)
    optimizer = build_optimizer(plan.optimizer.type, params, groups) if plan.optimizer else None
    schedule = plan.schedule
    factor = lr_factor(schedule.type, schedule.warmup_steps, schedule.total_steps) if schedule else None
    engine = Engine(model, optimizer, groups, factor, plan.ds, device, run.ema_decay)
    if run.log_block_norms:
        engine.follow_block_norms(lambda name: layer_of(name, plan.spec.depth), plan.spec.depth + 2)
    return engine


def _evaluate(plan: Plan, engine: Engine, watch: Watchdog) -> dict[str, float]:
    """The figures of the weights, and those of their average, where the run keeps one, as ema_top1 and so on."""

    def figures() -> dict[str, float]:
        loader = eval_loader(plan, engine.device, engine.dtype)
        loader.on_wait = watch.waits_for_data
        return predict(engine, watch.ticking(loader), plan.run.loss).figures

    engine.train(False)
    found = figures()
    if plan.run.ema_decay:
        with engine.averaged():
            found |= {f"ema_{name}": value for name, value in figures().items()}
    return found


def _loss_function(plan: Plan, engine: Engine) -> LossOf:
    """The loss of a micro-batch in a step.

    Dropout, drop-path and token drop are a function of (seed, step, micro-batch): resumed runs draw what unbroken ones
    do.
    """
    run, loss = plan.run, LOSSES[plan.run.loss]
    class_weights = torch.tensor(run.class_weights, device=engine.device) if run.class_weights else None

    def loss_of(forward: Callable[[Tensor], Tensor], micro_batch: MicroBatch, step: int) -> Tensor:
        torch.manual_seed(int(random_bits(Stream.DROPOUT, run.seed, step, micro_batch.index)))
        return loss(forward(micro_batch.images), micro_batch.targets, run.label_smoothing, class_weights)

    return loss_of


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _train_line(
    plan: Plan, engine: Engine, progress: Progress, meter: Meter, loss: float, lr: float, pixel_hash: int
) -> dict[str, Any]:
    reading = meter.read()
    images_left = (plan.num_steps - progress.step) * plan.batch.global_batch
    return {
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "epoch": progress.samples_seen // plan.num_train,
        "split": "train",
        "loss": loss,
        "lr": lr,
        "grad_norm": engine.grad_norm,
        **engine.block_norms(),
        "loss_scale": engine.loss_scale,
        "skipped_steps": engine.skipped_steps,
        "pixel_hash": f"{collectives.sum_of_bits(pixel_hash, engine.device):016x}",
        **reading,
        "mfu": mfu(_forward_flops(plan), reading["images_per_s"], plan.world.world_size, device_name()),
        "eta_s": images_left / reading["images_per_s"],
        "mem_gib": _peak_memory_gib(engine.device),
    }


def _val_line(plan: Plan, progress: Progress, figures: dict[str, float]) -> dict[str, Any]:
    return {
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "epoch": progress.samples_seen // plan.num_train,
        "split": "val",
        **figures,
    }


def _forward_flops(plan: Plan) -> int:
    """Of an image in training."""
    run, size = plan.run, plan.image_size
    subset_drop_path = run.drop_path if run.drop_path_subset else 0.0
    return forward_flops(plan.spec, size, plan.num_classes, run.pre_logits, run.token_drop, subset_drop_path)


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _introduce(plan: Plan, choice: Choice, progress: Progress, log: RunLog) -> None:
    """Write what the run is to its directory, and say it; collective."""
    decoders = collectives.gather(jpeg_decoder_name())
    if not plan.world.is_main:
        return
    describe_run(plan)
    for warning in plan.warnings:
        log.say(f"warning  {warning}")
    for damaged in choice.passed_over:
        log.say(f"passed over a damaged checkpoint  {damaged}")
    for note in choice.notes:
        log.say(note)
    (height, width), batch = plan.image_size, plan.batch
    predicted = f"  {plan_memory(plan.memory).peak / GIB:.3g} GiB a GPU predicted" if plan.memory.on_gpu else ""
    precision = describe_precision(plan.ds, plan.dtype) + ", blocks' linear layers in fp8" * plan.run.fp8
    compiled = "\nblocks are compiled by torch.compile: the first step waits for it" if plan.run.compile else ""
    log.say(
        f"{plan.spec.name}  {height}x{width} px  {plan.num_classes} classes  {precision}"
        f"  ZeRO stage {plan.zero_stage}  on {device_name()}"
        f"\nglobal batch {batch.global_batch} = {batch.micro_batch} a micro-batch"
        f" x {batch.accumulation_steps} accumulated x {batch.world_size} rank{'s' * (batch.world_size > 1)}"
        f"{', halved where memory runs out in the first two steps' * plan.run.auto_micro_batch}"
        f"\nactivation checkpointing {plan.activation_checkpointing}{predicted}"
        f"{compiled}\ndecoder  {jpeg_decoder()}\n{describe_mfu(_forward_flops(plan), batch.world_size, device_name())}"
    )
    if len(set(decoders)) > 1:
        log.say(
            f"warning  the ranks decode JPEGs with {', '.join(sorted(set(decoders)))}: damaged ones may be replaced on"
            " some ranks and not on others; VITDS_JPEG=simplejpeg makes them alike"
        )
    num_epochs = plan.num_steps * batch.global_batch / plan.num_train
    log.say(f"{plan.num_train:,} training and {plan.num_val:,} validation images  {num_epochs:.3g} epochs")
    if cache := describe_cache(plan):
        log.say(cache)
    start = "starts at step 0" if progress.step == 0 else f"resumed at step {progress.step}"
    log.say(f"{start} of {plan.num_steps}, {progress.samples_seen} samples seen  {plan.run_dir}")
    if choice.extended_from is not None:
        where = {"step": progress.step, "samples_seen": progress.samples_seen, "split": "segment"}
        log.record(where | {"num_steps": plan.num_steps, "num_steps_before": choice.extended_from})


def _conclude(plan: Plan, progress: Progress, stop: StopRequest, log: RunLog) -> int:
    """Say how the run ended.

    Raises: CheckpointError when the last checkpoint could not be saved.
    """
    if progress.last_save_failed:
        raise CheckpointError("the last checkpoint could not be saved, see above", where=str(plan.run_dir))
    if progress.step < plan.num_steps:
        code = stop.exit_code
        log.say(f"stopped at step {progress.step}, checkpoint saved; the same command goes on from here (exit {code})")
        return code
    if not plan.num_val:
        log.say("the data has no validation split, so nothing was evaluated")
    name, value = ("top-1", progress.best_top1) if progress.best_map is None else ("mAP", progress.best_map)
    best = "" if value is None else f"  best {name} {value:.2%} at step {progress.best_step}"
    log.say(f"done: {progress.step} steps{best}  {plan.run_dir}")
    return EXIT_DONE
