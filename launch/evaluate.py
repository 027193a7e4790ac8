#!/usr/bin/env python3
"""Evaluate any weights on any split: a run, a checkpoint of any ZeRO stage and world size, or a file of weights.

python launch/evaluate.py --weights runs/quickstart --data runs/quickstart/shards
deepspeed -q --num_gpus 2 launch/evaluate.py --weights ViT-L_16.npz --data data/imagenet --image-size 384
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, add_weights_options, positive
from vitds.errors import exit_with
from vitds.world import world_from_env


def parse() -> dict[str, Any]:
    """The flags, by the names that `evaluate_weights` gives them."""
    parser = ToolParser(__doc__)
    parser.add_argument("--weights", required=True, help="run, checkpoint, or file of weights")
    add_weights_options(parser)
    parser.add_argument("--data", required=True, help="dataset directory or URL; several, with commas, are a mixture")
    parser.add_argument("--cache-dir", metavar="DIR", help="where shards from URLs are kept; else the user's cache")
    parser.add_argument("--split", default="val", choices=["val", "train"])
    parser.add_argument("--batch-size", type=positive, help="images of one rank's batch; else the run's, or 64")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="else the run's, or fp32")
    parser.add_argument(
        "--zero-stage", type=int, default=0, choices=[0, 1, 2, 3], help="3 shards the weights over ranks"
    )
    parser.add_argument("--workers", type=int, default=1, help="data processes of one rank")
    parser.add_argument(
        "--output",
        help="directory for summary.json and predictions.parquet; else evaluation/ in the run, or ./evaluation-FILE",
    )
    parser.add_argument("--local-rank", type=int, help="ignored; launchers pass it")
    arguments = vars(parser.parse())
    del arguments["local_rank"]
    return arguments


def main() -> int:
    """Parse, call vitds, print."""
    arguments = parse()
    from vitds.evaluate import evaluate_weights  # torch and deepspeed are imported here
    from vitds.faults import faults_named

    world = world_from_env()
    with faults_named(world.rank):
        figures = evaluate_weights(**arguments)
    if world.is_main:
        for name in ("map", "top1", "top5", "loss", "macro_f1", "calibration_error"):
            if figures.get(name) is not None:
                print(f"{name:18} {figures[name]:.4f}")
        print(f"{figures['num_samples']} samples; per-class figures and predictions in {figures['output']}")
    return 0


if __name__ == "__main__":
    exit_with(main)
