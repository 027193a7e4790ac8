#!/usr/bin/env python3
"""Evaluate any weights on any split: a run, a checkpoint of any ZeRO stage and world size, or an .npz.

python launch/evaluate.py --weights runs/quickstart --data runs/quickstart/shards
deepspeed -q --num_gpus 2 launch/evaluate.py --weights ViT-L_16.npz --data data/imagenet --image-size 384
"""

import argparse
import sys

from vitds.errors import UsageError, exit_with
from vitds.run_config import normalise_flags
from vitds.world import world_from_env


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; a mistake is a UsageError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", required=True, help="run, checkpoints directory, global_stepN, or .npz")
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--split", default="val", choices=["val", "train"])
    parser.add_argument("--image-size", type=int, help="pixels; default: the weights' own")
    parser.add_argument("--batch-size", type=int, help="images of one rank's batch; default: the run's, else 64")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the run's, else fp32")
    parser.add_argument(
        "--zero-stage", type=int, default=0, choices=[0, 1, 2, 3], help="3 shards the weights over the ranks"
    )
    parser.add_argument("--workers", type=int, default=1, help="data processes of one rank")
    parser.add_argument("--output", help="directory for summary.json and predictions.parquet; default: beside the run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    def refuse(message: str) -> None:
        raise UsageError(message, fix="see --help")

    parser.error = refuse
    return parser.parse_args(argv)


def main() -> int:
    """Parse, call vitds, print."""
    arguments = vars(parse(normalise_flags(sys.argv[1:])))
    del arguments["local_rank"]
    from vitds.evaluate import evaluate_weights

    figures = evaluate_weights(**arguments)
    if world_from_env().is_main:
        for name in ("top1", "top5", "loss", "macro_f1", "calibration_error"):
            print(f"{name:18} {figures[name]:.4f}")
        print(f"{figures['num_samples']} samples; per-class figures and predictions in {figures['output']}")
    return 0


if __name__ == "__main__":
    exit_with(main)
