"""Numbers that go wrong: steps that were skipped for them, what saw them first, and when the run is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitds import collectives
from vitds.checkpoint import CheckpointStore
from vitds.data.loader import MicroBatch, RankLoader
from vitds.engine import Engine
from vitds.errors import Diverged
from vitds.feed import micro_batches_at
from vitds.log import RunLog
from vitds.preflight import Plan
from vitds.resume import Progress
from vitds.stream_facts import is_stream
from vitds.watchdog import Watchdog

# So many steps in a row without an update are no longer a spike; float16 skips while it looks for its loss scale.
_MAX_SKIPPED_IN_A_ROW, _MAX_WITH_LOSS_SCALE = 10, 50
_MAX_KEYS = 1024  # of one step, in metrics.jsonl
_MAX_SHOWN_KEYS = 4  # in the line for people
_CALMER = "lower the learning rate, lengthen the warmup, or clip gradients; checkpoints saved before are whole"


# The loss of a micro-batch by some forward in a step (0 is the first), with the dropout that it has there.
LossOf = Callable[[Callable[[Tensor], Tensor], MicroBatch, int], Tensor]


class LostTrack(Diverged):
    """Steps that were trained or skipped end the run, unless it may go back to before them."""

    samples_seen: int | None = None  # at the last of them, where others came before that was known


@dataclass(frozen=True)
class _Step:
    """A step whose outcome is not known yet."""

    number: int
    samples_seen: int  # at its end
    micro_batches: list[tuple[Tensor, Tensor]]  # sample ids and loss of this rank's


class NumberWatch:
    """Sees each micro-batch of a step, and says of a step that was skipped what was not finite in it."""

    def __init__(
        self, plan: Plan, engine: Engine, loader: RankLoader, log: RunLog, loss_of: LossOf, watch: Watchdog
    ) -> None:
        self._plan, self._engine, self._loader, self._log = plan, engine, loader, log
        self._loss_of, self._watch = loss_of, watch
        self._seen: list[tuple[Tensor, Tensor]] = []  # sample ids and loss of this step's micro-batches
        self._steps: list[_Step] = []

    def note(self, micro_batch: MicroBatch, loss: Tensor) -> None:
        """Remember what a micro-batch was; nothing waits for the device."""
        self._seen.append((micro_batch.ids, loss.detach()))

    def end_step(self, progress: Progress, outcomes: list[bool]) -> None:
        """End the step that `progress` counted last, and log which of `outcomes` was skipped; collective then.

        The outcomes are of the oldest steps that had none yet: whether each changed the weights. What float16 skips on
        its way to a loss scale, with finite losses, is counted and no more.
        Raises: LostTrack when too many in a row were skipped, or the loss scale of fp16 cannot fall any more.
        """
        self._steps.append(_Step(progress.step, progress.samples_seen, self._seen))
        self._seen = []
        for applied in outcomes:
            step = self._steps.pop(0)
            progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
            if not applied:
                self._end_skipped(step, progress.skipped_in_a_row)

    def _end_skipped(self, step: _Step, in_a_row: int) -> None:
        shares = collectives.gather([bool(torch.isfinite(loss)) for _, loss in step.micro_batches])
        if not self._engine.scales_loss or not all(map(all, shares)) or self._engine.overflowed_at_floor:
            self._report(step, shares)
        default = _MAX_WITH_LOSS_SCALE if self._engine.scales_loss else _MAX_SKIPPED_IN_A_ROW
        if self._engine.overflowed_at_floor:
            what = f"the loss scale is at its floor, and the gradients of step {step.number} still overflow"
            error = LostTrack(what, fix="lower the learning rate, lengthen the warmup, or train in bf16")
        elif in_a_row >= (self._plan.run.max_skipped_in_a_row or default):
            what = f"{in_a_row} steps in a row were skipped for numbers that are not finite"
            error = LostTrack(f"{what}, up to step {step.number}", fix=_CALMER)
        else:
            return
        error.samples_seen = step.samples_seen
        raise error

    @staticmethod
    def check_loss(loss: float, grad_norm: float | None, step: int) -> None:
        """Raises: LostTrack when the loss, or the gradient that weights were updated with, is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm or 0.0)):
            norm = "" if grad_norm is None else f", the gradient norm {grad_norm}"
            raise LostTrack(f"the loss is {loss}{norm} at step {step}", fix=_CALMER)

    def check_weights(self, step: int) -> None:
        """Before a save; collective.

        Raises: LostTrack when a weight is not finite on any rank.
        """
        if not all(collectives.gather(self._engine.has_finite_weights())):
            raise LostTrack(f"weights are not finite after step {step}; they are not saved", fix=_CALMER)

    def _report(self, step: _Step, shares: list[list[bool]]) -> None:
        """Log the samples at fault (if only gradients are, all of the step) and what was first not to be finite."""
        is_loss = not all(map(all, shares))
        names = [
            name
            for (ids, _), is_finite in zip(step.micro_batches, shares[collectives.rank()], strict=True)
            if not (is_loss and is_finite)
            for name in self._loader.names(ids)
        ]
        keys = [name for of_rank in collectives.gather(names[:_MAX_KEYS]) for name in of_rank][:_MAX_KEYS]
        num_keys, first = sum(collectives.gather(len(names))), self._diagnose(step)
        ranks = [rank for rank, share in enumerate(shares) if not all(share)]
        what = f"the loss of rank {', '.join(map(str, ranks))}" if is_loss else "a gradient"
        origin = f"  first {first}" if first else ""
        shown = ", ".join(" ".join(key) for key in keys[:_MAX_SHOWN_KEYS])
        more = f" and {num_keys - _MAX_SHOWN_KEYS} more" if num_keys > _MAX_SHOWN_KEYS else ""
        self._log.event(
            {
                "step": step.number,
                "event": "skipped",
                "cause": "loss" if is_loss else "gradient",
                "ranks": ranks,
                "first": first and asdict(first),
                "num_keys": num_keys,
                "keys": keys,
            },
            f"skipped step {step.number}: {what} is not finite{origin}\n  samples {shown}{more}",
        )

    def _diagnose(self, step: _Step) -> Finding | None:
        """Where the first number of a step was not finite, over all ranks; None where that was not found.

        The step's micro-batches are made again and run by all ranks together, without a trace in the engine; on the
        weights of now, which later steps may have changed before its outcome was asked for.
        """
        position = step.samples_seen // self._plan.batch.global_batch - 1
        micro_batches = micro_batches_at(self._plan, self._engine.device, position)
        if micro_batches is None:
            return None
        found = first_non_finite(
            self._engine,
            self._watch.ticking(micro_batches),
            lambda micro_batch: self._loss_of(self._engine.module, micro_batch, step.number - 1),
        )
        return min(filter(None, collectives.gather(found)), default=None)


def go_back(
    plan: Plan, engine: Engine, store: CheckpointStore, progress: Progress, log: RunLog, error: LostTrack
) -> Progress:
    """Load the last checkpoint again, in this process, and leave out the batches at fault; collective.

    Those are the batches of the steps that were skipped last, and of the update before them, which may have spoilt the
    weights. A run that is killed before its next save goes the same way again. Of a run without a checkpoint, of a
    stream, which has no order, and after `max_rewinds`, the error stands.

    Source: Chowdhery et al., "PaLM" (2022), section 5.1, who went back 100 steps and skipped 200 to 500 batches.
    Raises: LostTrack.
    """
    if plan.run.on_divergence == "stop" or is_stream(plan.data_path):
        raise error
    if progress.num_rewinds >= plan.run.max_rewinds:
        raise LostTrack(f"{error.what}, after {progress.num_rewinds} rewinds", fix=error.fix) from None
    choice = store.newest_whole()
    if choice.directory is None:
        raise error
    restored = Progress.restore(engine, choice)
    positions = (restored.samples_seen, error.samples_seen or progress.samples_seen)
    first, end = (samples // plan.batch.global_batch for samples in positions)
    seen = [number for number in range(first, end) if number not in progress.left_out]
    at_fault = seen[-(progress.skipped_in_a_row + 1) :]
    restored.left_out = sorted({*progress.left_out, *at_fault})
    restored.num_rewinds = progress.num_rewinds + 1
    log.go_back(restored.step)
    log.event(
        {
            "step": restored.step + 1,  # the first that a resume from this checkpoint would make again
            "event": "rewind",
            "from_step": progress.step,
            "left_out": restored.left_out,  # since the run began: a second rewind cuts this line off
            "num_rewinds": restored.num_rewinds,
        },
        f"{error.what}\nback to step {restored.step}; left out from here on: the global batches "
        f"{', '.join(map(str, at_fault))} of the stream (rewind {restored.num_rewinds} of {plan.run.max_rewinds})",
    )
    return restored


@dataclass(frozen=True, order=True)
class Finding:
    """The first module whose output, in forward, or its gradient, in backward, was not finite on a rank."""

    micro_batch: int  # which of the rank's micro-batches of the step
    is_backward: bool
    rank: int
    module: str

    def __str__(self) -> str:
        way = "backward" if self.is_backward else "forward"
        return f"in {self.module}, {way}, rank {self.rank}, micro-batch {self.micro_batch}"


def first_non_finite(
    engine: Engine, micro_batches: Iterable[MicroBatch], loss_of: Callable[[MicroBatch], Tensor]
) -> Finding | None:
    """Run micro-batches forward and backward, and find the first number that is not finite on this rank; collective.

    Gradients are computed aside, those of activations and, where every rank holds them whole, of parameters: neither
    the engine's gradients nor its counters move. Compiled blocks run as they are written, to be looked into.
    """
    rank = collectives.rank()
    found: list[Finding] = []
    parameters = list(engine.module.named_parameters()) if engine.zero_stage < 2 else []

    def check(tensor: Any, module: str, number: int, is_backward: bool = False) -> None:
        if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            found.append(Finding(number, is_backward, rank, module))

    def on_output(_: Any, __: Any, output: Any, *, module: str, number: int) -> None:
        check(output, module, number)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(check, module=module, number=number, is_backward=True))

    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        for number, micro_batch in enumerate(micro_batches):
            check(micro_batch.images, "the images", number)
            check(micro_batch.targets, "the targets", number)
            micro_batch.images.requires_grad_()
            with ExitStack() as hooks:
                for name, module in engine.module.named_modules():
                    hook = partial(on_output, module=name or "the model", number=number)
                    hooks.callback(module.register_forward_hook(hook).remove)
                loss = loss_of(micro_batch)
            check(loss, "the loss", number)
            named = {name: p for name, p in parameters if p.requires_grad}
            made = torch.autograd.grad(engine.scaled(loss), [micro_batch.images, *named.values()], allow_unused=True)
            for name, gradient in zip(named, made[1:], strict=True):
                check(gradient, name, number, is_backward=True)
    return found[0] if found else None
