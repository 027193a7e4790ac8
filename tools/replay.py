#!/usr/bin/env python3
"""Make a training step again: exactly the images that it saw, with ids, keys and targets.

    python tools/replay.py runs/vit-l16 --step 1200
    python tools/replay.py runs/vit-l16 --step 1200 --pixels --out step1200

Writes samples.csv (a row an image), sheet.png (the first images as the model saw them, beside their originals) and,
with --pixels, images.npy (the model's input). Where training logged the step, the hash of its pixels is compared with
the logged one: the data, or the packages that decode them, have changed when the two differ (exit code 3).
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, positive
from vitds.errors import EXIT_DATA, EXIT_DONE, exit_with


def main() -> int:
    """Plan the run as it was, make the step, compare."""
    parser = ToolParser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run, as runs/NAME")
    parser.add_argument("--step", metavar="N", type=positive, required=True, help="which step, as logged")
    parser.add_argument("--data", metavar="DIR", help="where the data lie now, if not where they were")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: RUN/replay/step-N)")
    parser.add_argument("--images", metavar="N", type=positive, default=24, help="images on the sheet (default: 24)")
    parser.add_argument("--pixels", action="store_true", help="write images.npy too")
    args = parser.parse()
    from vitds.replay import plan_of, replay  # torch is imported here, when the command line is right

    plan, out = plan_of(args.run, args.data), args.out or args.run / "replay" / f"step-{args.step}"
    console = Console(soft_wrap=True, markup=False, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"step {args.step}", total=plan.batch.global_batch)
        advance = lambda num_images: progress.advance(task, num_images)  # noqa: E731
        done = replay(plan, args.run, args.step, out, args.images, args.pixels, advance)
    console.print(f"{done.num_images} images of step {args.step}: {out}")
    if done.logged_hash is None:
        console.print(f"pixel hash {done.pixel_hash}; training logged none here (log_every {plan.run.log_every})")
    elif done.logged_hash == done.pixel_hash:
        console.print(f"pixel hash {done.pixel_hash}, as training logged it")
    else:
        console.print(
            f"pixel hash {done.pixel_hash}, but training logged {done.logged_hash}: these are not the pixels it saw\n"
            f"  the data, the command, or the versions in {args.run / 'env.json'} differ from those of today"
        )
        return EXIT_DATA
    return EXIT_DONE


if __name__ == "__main__":
    exit_with(main)
