#!/usr/bin/env python3
"""Plan a training run before a GPU is rented: what fits its memory, how fast it would be, and what it would cost.

    python tools/plan.py --model ViT-H_14 --image-size 518 --gpu-memory 80 --gpus 8
    python tools/plan.py --model ViT-L_16 --gpu-memory 80 --gpus 8 --price-per-hour 2.5 --write large.json
    python tools/plan.py --model ViT-L_16 --simulate

A row is a ZeRO stage with one kind of activation checkpointing, with or without the optimizer in host memory, at the
largest micro-batch that fits; the recommended row is the fastest. --write makes it a configuration for launch/train.py
(AdamW at 1e-3 without warmup: the recipe is yours to choose). --simulate predicts the step from 1 to 4096 GPUs instead.
Memory is arithmetic that the tests hold to counted bytes; times are predicted from stated constants, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, image_size, positive, positive_number
from vitds.durable import replace_text
from vitds.errors import ConfigError, OutOfMemory, UsageError, exit_with
from vitds.memory_plan import GIB, USABLE, Training
from vitds.model.registry import get_spec, grid_size, num_parameters
from vitds.planner import BUCKET, Option, configuration, largest, options, recommended
from vitds.step_time import Machine, wire_bytes


def main() -> None:
    """Read the command line, plan, print the table."""
    args = _parse()
    model = _model(args)
    machine = Machine(
        matrix_rate=args.tflops * 1e12, memory_rate=args.memory_bandwidth * 1e12, gpus_per_node=args.gpus_per_node
    )
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    parameters = num_parameters(model.spec, model.image_size, model.num_classes)
    (height, width), precision = model.image_size, model.dtype
    console.print(f"{model.spec.name}  {height}x{width} px  {parameters:,} parameters  {precision}, fp32 accumulation")
    if args.simulate:
        console.print(_scaling(model, args, machine))
        _explain(console, machine)
        return
    found = options(model, args.train_batch_size, USABLE * args.gpu_memory * GIB, machine)
    best = recommended(found)
    console.print(
        f"{args.gpus} GPU{'s' * (args.gpus > 1)} of {args.gpu_memory:g} GiB, {USABLE:.0%} of it planned"
        f"  global batch {args.train_batch_size}  {args.epochs:g} epochs of {args.num_images:,} images"
    )
    console.print(_table(found, best, args))
    _explain(console, machine)
    if best is None:
        least = min(found, key=lambda option: option.memory.peak)
        raise OutOfMemory(
            f"{model.spec.name} at {height}x{width} px fits no GPU of {args.gpu_memory:g} GiB in any of these ways",
            fix=f"the least is {least.memory.peak / GIB:.1f} GiB: more GPUs at stage 3, a smaller image, or {precision}"
            f" on a GPU with {least.memory.peak / GIB / USABLE:.0f} GiB",
            on_one_rank=False,
        )
    console.print(f"recommended: {_described(best)}")
    if args.write:
        try:
            replace_text(args.write, json.dumps(configuration(best, args.epochs), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror}", where=str(args.write)) from None
        console.print(f"wrote {args.write}: deepspeed -q launch/train.py --deepspeed_config {args.write} --data DIR")


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--model", metavar="NAME", required=True, help="as launch/train.py knows it")
    parser.add_argument("--image-size", metavar="S|HxW", type=image_size, default=(224, 224), help="pixels (224)")
    parser.add_argument("--num-classes", metavar="N", type=positive, default=1000, help="outputs of the head (1000)")
    parser.add_argument("--gpu-memory", metavar="GIB", type=positive_number, default=80.0, help="of one GPU (80)")
    parser.add_argument("--gpus", metavar="N", type=positive, default=1, help="ranks (1)")
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, default=8, help="of a machine (8)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="precision (bf16)")
    parser.add_argument("--train-batch-size", metavar="N", type=positive, default=1024, help="global batch (1024)")
    parser.add_argument("--epochs", metavar="N", type=positive_number, default=300.0, help="length of the run (300)")
    parser.add_argument(
        "--num-images", metavar="N", type=positive, default=1_281_167, help="of an epoch (ImageNet-1k's 1281167)"
    )
    parser.add_argument("--dropout", action="store_true", help="the run has dropout, whose masks are kept")
    parser.add_argument("--ema", action="store_true", help="the run keeps an average of the weights")
    parser.add_argument("--price-per-hour", metavar="MONEY", type=positive_number, help="of one GPU")
    parser.add_argument(
        "--tflops", metavar="N", type=positive_number, default=790.0, help="matrix rate of a GPU (an H200's, 790)"
    )
    parser.add_argument(
        "--memory-bandwidth", metavar="TB/S", type=positive_number, default=4.3, help="of a GPU (an H200's, 4.3)"
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the recommended row as a configuration")
    parser.add_argument("--simulate", action="store_true", help="predict the step for 1 to 4096 GPUs instead")
    parser.add_argument("--zero-stage", metavar="N", type=int, choices=range(4), help="of --simulate (1)")
    args = parser.parse()
    if args.write and args.simulate:
        raise UsageError("--simulate recommends nothing to write", where="--write", fix="leave out --simulate")
    if args.zero_stage is not None and not args.simulate:
        raise UsageError("is of --simulate; the table has every stage", where="--zero-stage")
    if args.write and os.path.lexists(args.write):
        raise UsageError("exists", where=str(args.write), fix="choose another --write, or move it away")
    return args


def _model(args: argparse.Namespace) -> Training:
    """What the command line says of the model and the run.

    Raises: ConfigError for a model or image size that does not exist, or a global batch that the GPUs cannot share.
    """
    spec = get_spec(args.model)
    grid_size(spec, args.image_size)
    if args.train_batch_size % args.gpus:
        below = args.train_batch_size // args.gpus * args.gpus
        raise ConfigError(
            f"{args.gpus} GPUs cannot share a global batch of {args.train_batch_size}",
            where="--train-batch-size",
            fix=f"nearest: {' or '.join(str(size) for size in (below, below + args.gpus) if size)}",
        )
    return Training(
        spec,
        args.image_size,
        args.num_classes,
        dtype=args.dtype,
        accumulation_dtype="fp16" if args.dtype == "fp16" else "fp32",
        world_size=args.gpus,
        optimizer_states=2 + args.ema,
        dropout=float(args.dropout),
    )


def _table(found: list[Option], best: Option | None, args: argparse.Namespace) -> Table:
    columns = ["", "ZeRO", "recompute", "optimizer", "micro-batch", "states", "saved", "peak GiB", "host GiB"]
    columns += ["images/s", "GPU-hours"] + ["price"] * (args.price_per_hour is not None)
    table = Table(
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=None if all(option.fits for option in found) else "-: does not fit",
    )
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in columns[:4] else "right")
    for option in found:
        run, memory = option.run, option.memory
        cells = ["->" if option is best else "", str(run.zero_stage), str(run.activation_checkpointing)]
        cells += ["CPU" if run.offloads_optimizer else "GPU", f"{run.micro_batch} x {run.accumulation_steps}"]
        cells += [f"{part / GIB:.1f}" for part in (memory.states, memory.activations, memory.peak, memory.host)]
        if option.fits:
            hours = _gpu_hours(option, args)
            cells += [f"{option.time.images_per_s:,.0f}", f"{hours:,.0f}"]
            cells += [f"{hours * args.price_per_hour:,.0f}"] if args.price_per_hour else []
        else:
            cells += ["-", "-"]
        table.add_row(*cells)
    return table


def _gpu_hours(option: Option, args: argparse.Namespace) -> float:
    seconds = args.epochs * args.num_images / option.time.images_per_s
    return seconds / 3600 * option.run.world_size


def _described(option: Option) -> str:
    run = option.run
    where = ", optimizer in host memory" if run.offloads_optimizer else ""
    return (
        f"ZeRO stage {run.zero_stage}, activation checkpointing {run.activation_checkpointing}{where},"
        f" micro-batch {run.micro_batch} x {run.accumulation_steps} accumulated:"
        f" {option.memory.peak / GIB:.1f} GiB, {option.time.images_per_s:,.0f} images/s"
    )


def _scaling(model: Training, args: argparse.Namespace, machine: Machine) -> Table:
    """Two ways to grow: --gpus' share of the global batch on each GPU (weak), or that batch on all (strong)."""
    table = Table(box=box.SIMPLE)
    for column in (
        "GPUs",
        "scaling",
        "a GPU",
        "compute ms",
        "wires ms",
        "update ms",
        "images/s",
        "of ideal",
        "GiB sent",
    ):
        table.add_column(column, justify="left" if column == "scaling" else "right")
    run = replace(model, zero_stage=1 if args.zero_stage is None else args.zero_stage, reduce_bucket=BUCKET)
    for name, share_of in (
        ("weak", lambda gpus: args.train_batch_size // args.gpus),
        ("strong", lambda gpus: 0 if args.train_batch_size % gpus else args.train_batch_size // gpus),
    ):
        ideal = None  # images/s of one GPU, or of the fewest that hold the model
        for gpus in (2**power for power in range(13)):
            share = share_of(gpus)
            if not share:
                continue
            option = largest(replace(run, world_size=gpus), share, USABLE * args.gpu_memory * GIB, machine)
            if not option.fits:
                continue
            time, sizes = option.time, f"{option.run.micro_batch} x {option.run.accumulation_steps}"
            ideal = ideal or time.images_per_s / gpus
            parts = (f"{1e3 * part:.1f}" for part in (time.compute_s, time.communication_s, time.update_s))
            rate, sent = time.images_per_s, wire_bytes(option.run)
            table.add_row(
                str(gpus), name, sizes, *parts, f"{rate:,.0f}", f"{rate / gpus / ideal:.0%}", f"{sent / GIB:.2f}"
            )
    return table


def _explain(console: Console, machine: Machine) -> None:
    console.print(f"times are predicted from stated constants, not measured: {machine.described()}")


if __name__ == "__main__":
    exit_with(main)
