"""Which ways to train a model fit a machine, how fast each would be, and the configuration file of one. No torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from vitds.memory_plan import Checkpointing, MemoryPlan, Training, block_parameters, plan_memory
from vitds.step_time import Machine, StepTime, step_time

CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 is a GB in 16 bits, more than ViT-L has parameters


@dataclass(frozen=True)
class Option:
    """One way to train: the largest micro-batch that fits, its memory, its time; a micro-batch of 1 where none fits."""

    run: Training
    memory: MemoryPlan
    time: StepTime
    fits: bool


def options(model: Training, global_batch: int, memory_bytes: float, machine: Machine) -> list[Option]:
    """Every ZeRO stage x activation checkpointing x offload for `model`'s sizes, precision and ranks.

    The micro-batch is the largest divisor of a rank's share of the global batch whose peak fits `memory_bytes`. Stage 0
    is fp32's alone: DeepSpeed's 16-bit updates are wrong there.
    """
    stages = (0, 1, 2, 3) if model.dtype == "fp32" else (1, 2, 3)
    found = []
    for stage, mode, offloads in itertools.product(stages, CHECKPOINTING, (False, True)):
        if offloads and stage == 0:
            continue
        run = replace(
            model,
            zero_stage=stage,
            activation_checkpointing=mode,
            offloads_optimizer=offloads,
            reduce_bucket=BUCKET,
            prefetch_bucket=min(BUCKET, 2 * block_parameters(model.spec)),
            max_live_parameters=2 * block_parameters(model.spec) + BUCKET,
        )
        found.append(largest(run, global_batch // model.world_size, memory_bytes, machine))
    return found


def recommended(found: list[Option]) -> Option | None:
    """The fastest that fits; of those within 1 % the lowest ZeRO stage, then what recomputes least. None fits: None."""
    fitting = [option for option in found if option.fits]
    fastest = max((option.time.images_per_s for option in fitting), default=0.0)
    near = (option for option in fitting if option.time.images_per_s >= 0.99 * fastest)

    def order(option: Option) -> tuple[bool, int, int]:
        run = option.run
        return run.offloads_optimizer, run.zero_stage, CHECKPOINTING.index(run.activation_checkpointing)

    return min(near, key=order, default=None)


def configuration(option: Option, epochs: float) -> dict[str, Any]:
    """The experiment as launch/train.py reads it, in the manner of ds_configs/."""
    run = option.run
    zero: dict[str, Any] = {"stage": run.zero_stage, "reduce_bucket_size": run.reduce_bucket}
    if run.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": run.prefetch_bucket,
            "stage3_max_live_parameters": run.max_live_parameters,
            "stage3_max_reuse_distance": run.max_live_parameters,
        }
    elif run.zero_stage:
        zero["allgather_bucket_size"] = BUCKET
    if run.offloads_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    height, width = run.image_size
    precision: dict[str, Any] = {} if run.dtype == "fp32" else {run.dtype: {"enabled": True}}
    return {
        "train_batch_size": option.time.global_batch,
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "scheduler": {"type": "cosine", "params": {"warmup_num_steps": 0}},
        "gradient_clipping": 1.0,
        **precision,
        "zero_optimization": zero,
        "vitds": {
            "model": run.spec.name,
            "image_size": height if height == width else [height, width],
            "activation_checkpointing": run.activation_checkpointing,
            "epochs": epochs,
            "weight_decay_on": "matrices",
        },
    }


def largest(run: Training, share: int, memory_bytes: float, machine: Machine) -> Option:
    """The same run at the largest micro-batch that divides a rank's `share` of the global batch and fits; else at 1."""
    for micro_batch in (size for size in range(share, 0, -1) if share % size == 0):
        sized = replace(run, micro_batch=micro_batch, accumulation_steps=share // micro_batch)
        memory = plan_memory(sized)
        if memory.peak <= memory_bytes or micro_batch == 1:
            break
    return Option(sized, memory, step_time(sized, machine), fits=memory.peak <= memory_bytes)
