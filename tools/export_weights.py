"""Write weights in the format of another tool: safetensors, timm, Hugging Face, Google's npz, ONNX, torch.export.

    python tools/export_weights.py runs/NAME exported/timm --format timm
    python tools/export_weights.py runs/NAME/checkpoints/global_step800 model.onnx --format onnx
    python tools/export_weights.py ViT-B_16.npz exported/hf --format hf --image-size 384

SOURCE is a run, its checkpoints/, one global_stepN/ (any ZeRO stage and world size), what npz_to_ds.py wrote, or a
weights file or directory that vitds reads. No GPU, no ranks. timm and hf write a directory, the others a file; class
names and preprocessing travel along. What a target cannot compute exactly is refused.

Memory of ViT-B_16 at 384 px: 39 to 66 MiB; onnx 813 and torch-export 777 MiB, nearly all of it torch itself.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, add_weights_options
from vitds.errors import UsageError, did_you_mean, exit_with
from vitds.model.registry import grid_size
from vitds.weights_header import read_header, stated_preprocessing

FORMATS = ("safetensors", "timm", "hf", "npz", "onnx", "torch-export")


def main() -> None:
    """Open, check, write, and say how it is loaded."""
    args = _parse()

    from vitds.weights.export.refusal import refuse_what_is_lost
    from vitds.weights.export.target import TARGETS, check_place, export_weights, notes_for, resized, total_bytes

    check_place(args.out, args.format)
    header = read_header(args.source, args.model)
    header = replace(header, data=(header.data or {}) | stated_preprocessing(args.settings) or None)
    size = args.image_size or header.image_size
    grid_size(header.spec, size)
    refuse_what_is_lost(replace(header, image_size=size), args.format)

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from vitds.weights.open import open_weights

    console = Console(stderr=True)
    with console.status(f"checking {args.source}"):
        opened = open_weights(args.source, args.model, ema=args.ema)
        weights = resized(replace(opened, header=replace(opened.header, data=header.data)), size)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"writing {args.out.name}", total=total_bytes(weights))
        export_weights(weights, args.out, args.format, lambda count: progress.advance(task, count))

    print(f"weights     {weights.header}")
    for note in [*header.notes, *notes_for(args.format, weights.header, header)]:
        print(f"note        {note}")
    print(f"written     {args.out}")
    for line in TARGETS[args.format].loading:
        if "ForImageClassification" in line and not header.num_classes:
            continue  # transformers has that class for models with a head only
        print(f"load        {line.format(out=args.out)}")


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new file or directory")
    parser.add_argument("--format", required=True, help=" | ".join(FORMATS))
    add_weights_options(parser)
    args = parser.parse()
    if args.format not in FORMATS:
        raise UsageError(f'--format "{args.format}" is none', fix=did_you_mean(args.format, FORMATS))
    return args


if __name__ == "__main__":
    exit_with(main)
