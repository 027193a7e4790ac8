#!/usr/bin/env python3
"""Show what the model sees: the first images of a training step on one sheet, each beside its original.

    python tools/show_batch.py --deepspeed_config ds_configs/quickstart.json --data data/digits --out sheet.png
    python tools/show_batch.py --deepspeed_config FILE --data DIR --set data.recipe=deit3 --step 500 --out sheet.png

Takes the flags of launch/train.py, and draws the very images that this command would train on, cropped, augmented and
mixed, with key and class names. Nothing is trained, and no GPU is needed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, positive
from vitds.errors import UsageError, exit_with
from vitds.preflight import plan_run


def main() -> None:
    """Check the command as training would, then draw."""
    parser = ToolParser(__doc__)
    parser.add_argument("--out", metavar="FILE.png", type=Path, required=True, help="the sheet to write")
    parser.add_argument("--step", metavar="N", type=positive, default=1, help="which step, as logged (default: 1)")
    parser.add_argument("--images", metavar="N", type=positive, default=24, help="how many of its images (default: 24)")
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=positive,
        default=1,
        help="plan the batch for so many; changes no image (default: 1)",
    )
    args, flags = parser.parse_known_args()
    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out {args.out}: the sheet is a PNG", fix=f"--out {args.out.with_suffix('.png')}")
    if not args.out.parent.is_dir():
        raise UsageError("no such directory", where=str(args.out.parent))
    plan = plan_run(flags, os.environ | {"WORLD_SIZE": str(args.ranks), "RANK": "0"})
    if args.step > plan.num_steps:
        raise UsageError(f"--step {args.step}: the run has {plan.num_steps} steps")
    from vitds.step_view import sheet_of_step  # torch is imported here, when the plan stands

    sheet = sheet_of_step(plan, args.step, args.images)
    try:
        sheet.save(args.out)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(args.out)) from None
    print(f"written: {args.out}")


if __name__ == "__main__":
    exit_with(main)
