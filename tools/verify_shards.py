#!/usr/bin/env python3
"""Prove a data set whole: all shards and all of their bytes are what the index says, and nothing else is there.

    python tools/verify_shards.py /data/imagenet-shards
    python tools/verify_shards.py /data/imagenet-shards --decode --workers 16

Every finding names its shard and, where there is one, its key; with any, the exit code is 3.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, positive
from vitds.data.verify import Verified, verify_dataset
from vitds.errors import EXIT_DATA, EXIT_DONE, UsageError, exit_with
from vitds.progress import ConsoleWatcher
from vitds.transport import Url


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(__doc__)
    parser.add_argument("data", metavar="DATA", help="a data set directory")
    parser.add_argument("--decode", action="store_true", help="decode every image, too")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (all cores)")
    parser.add_argument("--show", type=positive, default=100, metavar="N", help="findings to print (100)")
    return parser.parse()


def main() -> int:
    """Check everything, and say what was found."""
    args = parse()
    if "://" in args.data:
        what = "an address: only directories are verified"
        raise UsageError(what, where=Url(args.data).shown, fix="copy it to a disk, or run this where it lies")
    console = Console(soft_wrap=True, markup=False, highlight=False)
    started_s = time.monotonic()
    with ConsoleWatcher(console) as watcher:
        found = verify_dataset(Path(args.data), decode_images=args.decode, workers=args.workers, watcher=watcher)
    _report(console, found, args.show, args.decode, time.monotonic() - started_s)
    return EXIT_DATA if found.findings else EXIT_DONE


def _report(console: Console, found: Verified, num_shown: int, decoded: bool, duration_s: float) -> None:
    for line in found.findings[:num_shown]:
        console.print(line)
    if len(found.findings) > num_shown:
        console.print(f"... and {len(found.findings) - num_shown:,} more (--show {len(found.findings)})")
    for line in found.notes:
        console.print(f"note: {line}")
    for split, num_images in found.num_images.items():
        shards = "1 shard" if found.num_shards[split] == 1 else f"{found.num_shards[split]:,} shards"
        console.print(f"{split}: {num_images:,} images in {shards}")
    num = len(found.findings)
    verdict = f"{num:,} finding{'s' * (num > 1)}" if num else "whole"
    console.print(f"{verdict}; every byte{' and every pixel' * decoded} was read, in {duration_s:.1f} s")


if __name__ == "__main__":
    exit_with(main)
