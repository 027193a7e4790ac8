"""Out of memory in the first two steps: all ranks begin again with a smaller micro-batch and the same global batch.

Ranks that wait in a collective for the one that is out of memory cannot be called back, and what a GPU held would leave
its memory in pieces. So each process is replaced by a fresh one in place (execv), which its launcher does not notice.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch

from vitds.ds_config import Batch, keep_global_batch
from vitds.errors import ConfigError, OutOfMemory
from vitds.faults import fault_of
from vitds.preflight import Plan
from vitds.stop_signals import REQUEST_VARIABLE, listener
from vitds.watchdog import Watchdog
from vitds.world import START_VARIABLE

_COMPUTES = {"forward", "backward", "update"}


@contextmanager
def smaller_if_out_of_memory(plan: Plan, watch: Watchdog) -> Iterator[None]:
    """With `auto_micro_batch`, an error of lacking memory in this process's first two steps does not come out of here.

    The first update makes the optimizer's moments, so the second step is the first that needs all. Any other error
    does, and this one where no smaller micro-batch shares the global batch, or other ranks cannot be told.
    """
    watch.on_begin_again = lambda: begin_again(smaller(plan))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        fault = fault_of(error, plan.world.rank)
        phases = _COMPUTES | {"data"} if isinstance(error, torch.OutOfMemoryError) else _COMPUTES  # a GPU mixes batches
        is_early = watch.steps_begun <= 2 and watch.phase in phases
        if not (plan.run.auto_micro_batch and is_early and isinstance(fault, OutOfMemory) and watch.can_begin_again):
            raise
        try:
            batch = smaller(plan)
        except ConfigError:
            raise error from None
        who = f"rank {plan.world.rank}: " if plan.world.world_size > 1 else ""
        text = (
            f"{who}out of memory in {watch.phase} with a micro-batch of {plan.batch.micro_batch}: all begin again with"
            f" {batch.micro_batch}, accumulated {batch.accumulation_steps} times ({fault.what})"
        )
        print(text, file=sys.stderr, flush=True)
        watch.begin_again()


def smaller(plan: Plan) -> Batch:
    """The largest micro-batch of at most half the plan's that shares its global batch, even where images are paired.

    Raises: ConfigError when there is none.
    """
    half = dataclasses.replace(plan.batch, micro_batch=plan.batch.micro_batch // 2)
    return keep_global_batch(half, plan.world.world_size, unit=2 if plan.run.data.mixes_pairs else 1)


def begin_again(batch: Batch) -> NoReturn:
    """Replace this process by the same command with other batch sizes; that closes its files and connections."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with suppress(OSError):  # that of the listing itself is gone
                os.set_inheritable(descriptor, False)
    os.environ[REQUEST_VARIABLE] = str(listener().request)  # to stop, which the signal said to this process alone
    os.environ[START_VARIABLE] = str(int(os.environ.get(START_VARIABLE, 0)) + 1)
    sizes = {
        "--micro-batch-size": batch.micro_batch,
        "--gradient-accumulation-steps": batch.accumulation_steps,
    }
    words = [str(word) for pair in sizes.items() for word in pair]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *words])
