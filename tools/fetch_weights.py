#!/usr/bin/env python3
"""Fetch one of Google's published ViT files, resuming what broke off, and check its size, its bytes and its layout.

    python tools/fetch_weights.py ViT-B_16
    python tools/fetch_weights.py imagenet21k+imagenet2012/ViT-B_16-224 weights
    python tools/fetch_weights.py --list

NAME alone is the file of imagenet21k, which fine-tuning starts from; COLLECTION/NAME is any other. The file keeps
Google's name. Nothing that is in OUT_DIR is overwritten; NAME.npz.part is what came so far.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser
from vitds.download import fetch
from vitds.errors import UsageError, exit_with
from vitds.published_weights import BUCKET, PUBLISHED, find_weights, namesakes


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a name of --list, or Google's own path of the file")
    parser.add_argument("out_dir", metavar="OUT_DIR", nargs="?", type=Path, default=Path(), help="where to (here)")
    parser.add_argument("--from", metavar="URL", dest="base", default=BUCKET, help=f"a mirror of {BUCKET}")
    parser.add_argument("--list", action="store_true", help="show every file that is known, and fetch nothing")
    return parser.parse()


def main() -> None:
    """List, or find, fetch and say what to do next."""
    args = parse()
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if args.list:
        return _show_list(console)
    if args.name is None:
        raise UsageError("NAME is missing", fix="all of them: --list")
    if not args.base.startswith(("https://", "http://")):
        raise UsageError(f'"{args.base}" is no http or https address', where="--from")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        raise UsageError("is no directory", where=str(args.out_dir))
    weights = find_weights(args.name)
    if args.name != weights.name and (others := namesakes(weights)):
        console.print(f"meaning {weights.name}; there are also {', '.join(one.name for one in others)}")
    console.print(f"from {weights.url(args.base)}")
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(weights.file_name, total=None)
        path = fetch(
            weights,
            args.out_dir,
            args.base,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            on_note=console.print,
        )
    console.print(
        f"{path}: {weights.model}, {weights.image_size} px, {weights.num_classes} classes, "
        f"{weights.num_parameters:,} parameters, every byte checked"
    )
    if weights.num_classes == 1000:
        console.print(f"next: python launch/evaluate.py --weights {path} --data data/imagenet")
    else:
        console.print(
            f"next: deepspeed -q launch/train.py --deepspeed_config ds_configs/RECIPE.json --data DIR "
            f"--pretrained {path} (MODEL_ZOO.md names the recipe)"
        )


def _show_list(console: Console) -> None:
    """Every known file, and what is in it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    for header in ("parameters", "MiB", "px", "classes", "top-1"):
        table.add_column(header, justify="right", no_wrap=True)
    for weights in PUBLISHED.values():
        table.add_row(
            weights.name,
            f"{weights.num_parameters:,}",
            f"{weights.size_range[0] / 2**20:.0f}",
            str(weights.image_size),
            str(weights.num_classes),
            "" if weights.top1 is None else f"{weights.top1:.2f}",
        )
    console.print(table)
    console.print("MiB: 4 bytes a parameter. Top-1: percent of ImageNet, Google's. More: MODEL_ZOO.md")


if __name__ == "__main__":
    exit_with(main)
