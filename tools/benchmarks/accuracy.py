"""Train by vitds and by a plain PyTorch loop on the same samples, and compare accuracies: does the engine learn less?

Each round is a seed. Both loops start from the same weights and see the same samples in the same order, unchanged,
under the same AdamW, warmup, cosine and clipping, in fp32; once through launch/train.py at ZeRO stage 1, once through
benchmarks/plain_training.py, which shares the model and the order of the samples, and nothing else. Their losses must
agree in the first steps, where rounding has not yet grown. The accuracies may differ by the spread of the seeds: the
difference of the two means is held against their standard deviation (of both, pooled).

An accelerator, as `--accelerators token_drop=0.5`, is judged at equal time: it trains for as many more steps as it is
faster, by the images a second of two short runs before.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.progress import Progress

from benchmarks.plain_training import Recipe, read_split
from benchmarks.rounds import Cost, Figure, check_losses, cost_of, median_figure
from vitds.arguments import positive
from vitds.errors import UsageError, VitdsError

_ROOT = Path(__file__).resolve().parent.parent.parent
_OURS, _PLAIN = "vitds, ZeRO-1", "plain loop"
_LOG_EVERY = 5
_NUM_CHECKED = 4  # lines whose losses are compared
_NUM_TIMED = 12  # lines of the short runs that say how much faster an accelerator is
_TOLERANCE = 1e-3  # relative, between those losses

Loop = Callable[[Recipe], dict[str, Any]]  # trains, and says how


class Run(NamedTuple):
    """What one run came to. Units: `top1` in percent."""

    top1: float
    steps: int
    cost: Cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--data", metavar="DIR", help="a data set directory, its images all of one size (the digits)")
    parser.add_argument(
        "--model",
        default="custom:width=64,depth=4,heads=4,mlp=128,patch=4",
        help="which is trained (custom:width=64,depth=4,heads=4,mlp=128,patch=4)",
    )
    parser.add_argument("--samples", type=positive, default=25_600, metavar="N", help="that a run sees (25600)")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images of a step (64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (0.002)")
    parser.add_argument(
        "--accelerators", nargs="+", default=[], metavar="ENTRY=VALUE", help="of vitds, each in runs of its own"
    )


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines.

    Raises: VitdsError when a run fails, or when the two do not compute the same at the beginning.
    """
    steps = args.samples // args.batch
    if steps < _LOG_EVERY * _NUM_CHECKED:
        raise UsageError(
            f"{args.samples} samples are {steps} steps of {args.batch}",
            fix=f"--samples {_LOG_EVERY * _NUM_CHECKED * args.batch} or more",
        )
    with tempfile.TemporaryDirectory(prefix="vitds-accuracy-") as directory:
        scratch = Path(directory)
        data = Path(args.data) if args.data else _digits(scratch)
        recipe = _recipe(args, data, steps)
        loops: dict[str, tuple[Recipe, Loop]] = {_OURS: (recipe, partial(_by_vitds, scratch)), _PLAIN: (recipe, _plain)}
        for entry in args.accelerators:
            run = partial(_by_vitds, scratch, entry=entry)
            loops[entry] = (_in_the_same_time(recipe, loops[_OURS][1], run), run)
        runs = _train_all(loops, args.rounds, progress)
    return _figures(runs, progress)


def _recipe(args: argparse.Namespace, data: Path, steps: int) -> Recipe:
    return Recipe(
        data=str(data.resolve()),
        model=args.model,
        image_size=_image_size(data),
        seed=0,
        steps=steps,
        batch=args.batch,
        lr=args.lr,
        warmup=max(1, steps // 10),
        weight_decay=0.05,
        clip=1.0,
        log_every=_LOG_EVERY,
    )


def _in_the_same_time(recipe: Recipe, plain: Loop, accelerated: Loop) -> Recipe:
    """The recipe with as many steps as an accelerator takes in the time of the plain one's."""
    short = replace(recipe, steps=_LOG_EVERY * _NUM_TIMED)
    before, after = (statistics.median(run(short)["images_per_s"][1:]) for run in (plain, accelerated))
    steps = max(_LOG_EVERY * _NUM_CHECKED, round(recipe.steps * after / before))
    return replace(recipe, steps=steps, warmup=max(1, steps // 10))


def _train_all(loops: dict[str, tuple[Recipe, Loop]], num_seeds: int, progress: Progress) -> dict[str, list[Run]]:
    """The runs of each loop, by seed.

    Raises: VitdsError when a run fails, or when the two loops do not compute the same at the beginning.
    """
    runs: dict[str, list[Run]] = {name: [] for name in loops}
    task = progress.add_task("runs", total=num_seeds * len(loops))
    for seed in range(1, num_seeds + 1):
        losses = {}
        for name, (recipe, loop) in loops.items():
            answer: dict[str, Any] = {}
            cost = cost_of(lambda: answer.update(loop(replace(recipe, seed=seed))))  # noqa: B023 - called here
            runs[name].append(Run(100 * answer["top1"], recipe.steps, cost))
            losses[name] = [answer["losses"][str(_LOG_EVERY * (i + 1))] for i in range(_NUM_CHECKED)]
            progress.advance(task)
        check_losses({name: losses[name] for name in (_OURS, _PLAIN)}, _TOLERANCE)
    return runs


def _digits(scratch: Path) -> Path:
    _output_of([sys.executable, "tools/shard_imagenet.py", "digits", scratch / "digits"])
    return scratch / "digits"


def _image_size(data: Path) -> int:
    """Raises: UsageError when the images are not square, or the directory is none of shards."""
    try:
        images, _ = read_split(data, "val")
    except (OSError, KeyError) as error:
        fix = "make one of files with tools/shard_imagenet.py, with a validation split"
        raise UsageError(f"no data set directory: {error}", where=f"--data {data}", fix=fix) from None
    sizes = {Image.open(io.BytesIO(image)).size for image in images}
    (width, height), *others = sizes
    if others or width != height:
        raise UsageError("the images are not all squares of one size", where=f"--data {data}")
    return height


def _by_vitds(scratch: Path, recipe: Recipe, entry: str | None = None) -> dict[str, Any]:
    """One run of launch/train.py: its losses by step, its speeds and its last accuracy."""
    config = {
        "train_batch_size": recipe.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": recipe.lr, "weight_decay": recipe.weight_decay}},
        "scheduler": {"type": "cosine", "params": {"warmup_num_steps": recipe.warmup}},
        "gradient_clipping": recipe.clip,
        "zero_optimization": {"stage": 1},
        "vitds": {
            "model": recipe.model,
            "image_size": recipe.image_size,
            "num_steps": recipe.steps,
            "eval_batch_size": 500,
            "log_every": recipe.log_every,
            "weight_decay_on": "all",
            "seed": recipe.seed,
            "workers": 1,
            "data": {"train_crop": "none", "flip": 0.0, "eval_crop": "squash"},
        },
    }
    path = scratch / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "launch/train.py", "--deepspeed_config", path, "--data", recipe.data]
    with tempfile.TemporaryDirectory(dir=scratch) as runs:
        _output_of([*command, "--output-dir", runs, "--name", "run", *(("--set", entry) if entry else ())])
        lines = [json.loads(line) for line in Path(runs, "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    return {
        "losses": {str(line["step"]): line["loss"] for line in trained},
        "images_per_s": [line["images_per_s"] for line in trained],
        "top1": [line["top1"] for line in lines if line["split"] == "val"][-1],
    }


def _plain(recipe: Recipe) -> dict[str, Any]:
    """One run of the other loop."""
    command = [sys.executable, "tools/benchmarks/plain_training.py", json.dumps(asdict(recipe))]
    return json.loads(_output_of(command).splitlines()[-1])


def _output_of(command: list[object]) -> str:
    """Raises: UsageError when the command was wrong, VitdsError when it failed."""
    done = subprocess.run([str(part) for part in command], cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        kind = UsageError if done.returncode == UsageError.exit_code else VitdsError
        raise kind(f"{command[1]} ended with exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _figures(runs: dict[str, list[Run]], progress: Progress) -> list[Figure]:
    figures = []
    for name, of_loop in runs.items():
        figures += [Figure(f"{name}, seed {seed}", run.top1, "% top-1") for seed, run in enumerate(of_loop, start=1)]
    for name, of_loop in runs.items():
        tops = [run.top1 for run in of_loop]
        figures.append(Figure(f"{name}, mean", statistics.mean(tops), "% top-1", min(tops), max(tops)))
        if len(tops) > 1:
            figures.append(Figure(f"{name}, standard deviation", statistics.stdev(tops), "points"))
    for name in runs:
        if name != _OURS:
            first, second = (_OURS, name) if name == _PLAIN else (name, _OURS)
            figures.append(_difference(first, second, runs, progress))
    for name, of_loop in runs.items():
        figures.append(Figure(f"{name}, a run", of_loop[0].steps, "steps"))
        figures.append(median_figure(f"{name}, a run", [run.cost.cpu_s for run in of_loop], "CPU s"))
        figures.append(median_figure(f"{name}, a run", [run.cost.wall_s for run in of_loop], "s"))
    return figures


def _difference(first: str, second: str, runs: dict[str, list[Run]], progress: Progress) -> Figure:
    """Of the means, with the extremes of the seeds' differences, held against the spread of the seeds."""
    tops = [[run.top1 for run in runs[name]] for name in (first, second)]
    by_seed = [one - other for one, other in zip(*tops, strict=True)]
    title, mean = f"{first} minus {second}", statistics.mean(by_seed)
    if len(by_seed) == 1:
        progress.console.print("one seed has no spread to hold a difference against: --rounds 5")
        return Figure(title, mean, "points")
    spread = math.sqrt(statistics.mean(statistics.variance(values) for values in tops))
    verdict = "within" if abs(mean) <= spread else "not within"
    progress.console.print(f"{title}: {mean:+.2f} points, {verdict} the spread of the seeds, {spread:.2f} points")
    return Figure(title, mean, "points", min(by_seed), max(by_seed), bound=spread)
