"""Measure how long a save holds up training: when training waits for it, and when it is written in the background.

One rank, one model with AdamW in fp32, saves to --scratch. The state of a background save is copied to host memory
before training goes on; its file writing, hashes and commit run while the next round trains a step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks.rounds import Figure, median_figure
from vitds.checkpoint import CheckpointStore
from vitds.engine import Engine, start_ranks
from vitds.snapshot import Snapshot
from vitds.weights.create import create_model
from vitds.world import World

_BOUND = 5.0  # the stall is at most a fifth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="ViT-B_16", help="whose state is saved (ViT-B_16)")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4), help="of the engine (1)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to save; must have room (the system's)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    device = start_ranks(World())
    model = create_model(args.model, num_classes=1000)
    optimizer = torch.optim.AdamW(model.parameters())
    zero = {"stage": args.zero_stage}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine = Engine(model, optimizer, [], None, config, device)
    images = torch.zeros(1, 3, 224, 224, device=device)

    def train_a_step() -> None:
        engine.backward(engine(images).square().mean())
        engine.step()

    train_a_step()  # makes the moments
    waited_s, stalled_s, behind_s, num_bytes = [], [], [], 0
    task = progress.add_task("saving", total=args.rounds + 1)
    with tempfile.TemporaryDirectory(prefix="vitds-saves-", dir=args.scratch) as scratch:
        store = CheckpointStore(Path(scratch), World())

        def commit(snapshot: Snapshot, step: int) -> None:
            store.save(snapshot.write, step, {"step": step}, snapshot.num_bytes)
            snapshot.release()
            store.prune(step, 1)

        for number in range(args.rounds + 1):  # the first one touches the memory, and is not counted
            times = {}
            for is_background in (number % 2 == 0, number % 2 == 1):
                train_a_step()
                step = 2 * number + is_background + 1
                start = time.perf_counter()
                snapshot = engine.snapshot({})
                num_bytes = snapshot.num_bytes
                if is_background:
                    assert snapshot.copy_to_host(num_ranks=1), "no memory for a copy"
                    times["stalled"] = time.perf_counter() - start
                commit(snapshot, step)
                times["background" if is_background else "waited"] = time.perf_counter() - start
            if number:
                waited_s.append(times["waited"])
                stalled_s.append(times["stalled"])
                behind_s.append(times["background"] - times["stalled"])
            progress.advance(task)
    ratios = [waited / stalled for waited, stalled in zip(waited_s, stalled_s, strict=True)]
    return [
        Figure("state to save", num_bytes / 2**30, "GiB"),
        median_figure("training waits, save in the foreground", waited_s, "s"),
        median_figure("training waits, save in the background", stalled_s, "s"),
        median_figure("written behind it", behind_s, "s"),
        median_figure("foreground over background", ratios, "times", _BOUND),
    ]
