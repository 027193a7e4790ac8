#!/usr/bin/env python3
"""Predict classes of images, or take their features, with any weights.

    python tools/predict.py runs/NAME cat.jpg dog.jpg photos/ --topk 5
    python tools/predict.py ViT-B_16.npz data/imagenet/val --output val.parquet
    python tools/predict.py runs/NAME photos/ --features --output features.parquet

Weights are a run, a checkpoint or weights of any format. Images are files, folders of any depth, and tars (WebDataset's
KEY.jpg with KEY.cls beside it); a folder's tars are read too, so the directory of a split is fine. Each image is a row
with its path, or TAR:KEY; images are prepared as the weights' evaluation prepares them. What cannot be used is named,
the rest goes on, and the exit code is 3 at the end.

Columns: path, label (KEY.cls of a tar), predicted, predicted_name, probability; with --topk the lists topk_classes,
topk_names and topk_probabilities; with --features the list features. In csv a list is so many columns: topk_names_1,
... A probability is a softmax, and of weights trained with --loss bce a sigmoid.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, add_weights_options, positive
from vitds.errors import EXIT_DONE, DataError, UsageError, WeightError, exit_with
from vitds.model.registry import grid_size
from vitds.prediction_file import FORMATS, PredictionFile, Rows
from vitds.weights_header import WeightsHeader, read_header, stated_preprocessing


def main() -> int:
    """Check what can be checked without torch, then predict."""
    args = _parse()
    header = read_header(args.weights, args.model)
    stated_preprocessing(args.settings)
    grid_size(header.spec, args.image_size or header.image_size)
    if not header.num_classes and not args.features:
        raise WeightError("has no head, so it predicts no class", where=str(args.weights), fix="--features")
    for path in args.images:
        if not path.exists():
            raise DataError("no such file or directory", where=str(path))
    try:
        return _predict(args, header)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _predict(args: argparse.Namespace, header: WeightsHeader) -> int:
    from vitds.data.images import find_images
    from vitds.faults import faults_named
    from vitds.inference import choose_device, class_names, load, most_likely, run_over
    from vitds.loss import probabilities
    from vitds.model.precision import DTYPES

    num_images = num_bad = num_labelled = num_right = 0

    def note_bad(error: DataError) -> None:
        nonlocal num_bad
        num_bad += 1
        print(error, file=sys.stderr)

    with faults_named(rank=0):
        device = choose_device(args.device)
        loaded = load(args.weights, args.image_size, args.model, stated_preprocessing(args.settings), args.ema)
        num_classes = loaded.model.num_classes
        if args.classes and len(args.classes) > num_classes:
            raise UsageError(f"{len(args.classes)} names, and the model has {num_classes} classes", where="--classes")
        names = class_names(num_classes, args.classes or loaded.classes)
        dtype = DTYPES[args.dtype or header.dtype]
        outputs = run_over(loaded, find_images(args.images), args.batch_size, args.workers, device, dtype, note_bad)
        is_alone_on_stderr = args.output is not None or not sys.stdout.isatty()
        with (
            PredictionFile(args.output, args.format, names, bool(args.topk)) as file,
            _progress(is_alone_on_stderr) as bar,
        ):
            task = bar.add_task("predicting", total=None)
            for output in outputs:
                labels = [image.label for image in output.images]
                rows = Rows([image.name for image in output.images], labels)
                if output.logits is not None:
                    rows.classes = most_likely(output.logits, args.topk or 1).numpy()
                    rows.probabilities = probabilities(header.loss, output.logits).numpy()
                    num_labelled += len(labels) - labels.count(None)
                    num_right += sum(map(operator.eq, labels, rows.classes[:, 0].tolist()))
                if args.features:
                    rows.features = output.features.numpy()
                file.write(rows)
                num_images += len(labels)
                bar.update(task, completed=num_images)
    said = f"{num_images} images"
    if num_labelled:
        said += f", top-1 {num_right / num_labelled:.4f}: {num_right} of {num_labelled} labels"
    print(said, *[f"written: {args.output}"] * bool(args.output and num_images), sep="\n", file=sys.stderr)
    if num_bad:
        raise DataError(f"{num_bad} of {num_images + num_bad} could not be used; they are named above")
    return EXIT_DONE


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} a second" if task.speed else "")


def _progress(is_shown: bool) -> Progress:
    """How many images, how fast, on stderr when that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,} images"),
        _Rate(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # rows go there
        disable=not (is_shown and console.is_terminal),
    )


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a run, a checkpoint, or weights of any format")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="an image, a folder or a tar")
    parser.add_argument("--topk", metavar="N", type=positive, help="also the N most likely classes")
    parser.add_argument("--features", action="store_true", help="also the features that the head sees")
    parser.add_argument("--format", choices=FORMATS, help="else what --output ends in, or csv")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a new file; else stdout")
    parser.add_argument("--classes", metavar="FILE", type=_class_list, help="names by label, a JSON list")
    add_weights_options(parser)
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, default=64, help="images of one forward (default: 64)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="else the run's, or fp32")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; else the GPU when there is one")
    parser.add_argument("--workers", metavar="N", type=positive, default=_cores(), help="threads that decode images")
    args = parser.parse()
    suffix = args.output.suffix.removeprefix(".") if args.output else ""
    if suffix in FORMATS and args.format not in (None, suffix):
        raise UsageError(
            f"--format {args.format} in a file *.{suffix}", where=str(args.output), fix="leave --format out"
        )
    if args.format is None and args.output and suffix not in FORMATS:
        raise UsageError("its name says no format", where=str(args.output), fix=f"--format {', '.join(FORMATS)}")
    args.format = args.format or suffix or "csv"
    if args.format == "parquet" and args.output is None:
        raise UsageError("Parquet is not written to stdout", fix="--output FILE.parquet")
    if args.output and os.path.lexists(args.output):
        raise UsageError("exists", where=str(args.output), fix="choose another --output, or move it away")
    return args


def _class_list(path: str) -> list[str]:
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise argparse.ArgumentTypeError(f"{path} is no JSON list of names")
    return names


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


if __name__ == "__main__":
    exit_with(main)
