#!/usr/bin/env python3
"""Measure vitds against its peers on this machine, and write every figure as JSON.

    python tools/benchmark.py train --model ViT-L_16 --batch 128 --steps 10
    python tools/benchmark.py data --images /data/imagenet/val --json figures.json

COMMAND is train: steps of training; layers: a model's layers one by one; data: decoding and augmentation, and the
loader; shard: the writing of shards; checkpoint: how long a save holds up training; optimizer: what an update takes
with layer-wise decay, an average of the weights and contiguous memory; or accuracy: whether vitds learns what a plain
loop learns from the same samples.
`COMMAND --help` lists its options. Variants take turns, what is compared is CPU time (of saves, of updates and on a
GPU, wall time), and the table has the median of all rounds.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, positive  # before what takes seconds: Ctrl-C has no traceback from here on

# isort: split
from benchmarks import accuracy, checkpoint, data, layers, optimizer, rounds, shard, train

from vitds.durable import replace_text
from vitds.errors import UsageError, did_you_mean, exit_with

COMMANDS = {
    "train": train,
    "layers": layers,
    "data": data,
    "shard": shard,
    "checkpoint": checkpoint,
    "optimizer": optimizer,
    "accuracy": accuracy,
}  # each has its docstring, `add_arguments(parser)` and `measure(args, progress) -> figures`


def main() -> None:
    """Read the command line, measure, print the table."""
    name, argv = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] else ("--help", [])
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in COMMANDS:
        raise UsageError(f'no command "{name}"', fix=did_you_mean(name, COMMANDS) or " or ".join(COMMANDS))
    parser = ToolParser(COMMANDS[name].__doc__)
    parser.prog += f" {name}"
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="how often each variant runs (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure, and what it holds for, here")
    COMMANDS[name].add_arguments(parser)
    args = parser.parse(argv)
    if args.json and not os.access(args.json.parent, os.W_OK):  # said before hours are measured
        raise UsageError("cannot be written to", where=str(args.json.parent), fix="another --json FILE")
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        figures = COMMANDS[name].measure(args, progress)
    environment = rounds.environment(["python", "tools/benchmark.py", *map(shlex.quote, sys.argv[1:])])
    console.print(_table(figures))
    print(", ".join(f"{package} {number}" for package, number in environment["versions"].items()))
    print(environment["machine"])
    if args.json:
        document = {"environment": environment, "figures": [figure.as_json() for figure in figures]}
        replace_text(args.json, json.dumps(document, indent=1) + "\n")


def _table(figures: list[rounds.Figure]) -> Table:
    table = Table("what", "median", "", "lowest - highest", "bound", "goal", box=box.SIMPLE)
    for figure in figures:
        spread = "" if figure.lowest is None else f"{figure.lowest:.3g} - {figure.highest:.3g}"
        held = (f"{value:g}" if value is not None else "" for value in (figure.bound, figure.goal))
        table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, spread, *held)
    return table


if __name__ == "__main__":
    exit_with(main)
