#!/usr/bin/env python3
"""Draw what a model attends to, a PNG for each image: the image, attention rollout over it, the top five classes, and
the heads of one layer.

    python tools/visualize_attention.py --weights runs/NAME --image cat.jpg dog.jpg --out maps
    python tools/visualize_attention.py --weights ViT-B_16.npz --image cat.jpg --image-size 384x512 --layer 6 --out maps
    python tools/visualize_attention.py --weights runs/NAME --data DIR --split val --index 0 7 --out pictures

Weights are a run, a checkpoint or weights of any format. A picture is named after its image, with a number where that
name is taken: nothing is overwritten. Images are prepared as the weights' evaluation prepares them. Class names are
the weights' own, else those of --data.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, add_weights_options
from vitds.data.decode import BadImage, decode
from vitds.data.image_files import shown
from vitds.data.mixture import open_split
from vitds.data.reader import ShardReader
from vitds.durable import new_file
from vitds.errors import DataError, UsageError, exit_with
from vitds.model.registry import grid_size
from vitds.weights_header import WeightsHeader, read_header, stated_preprocessing


class Picture(NamedTuple):
    """An image to draw: its encoded bytes, the name of its PNG, its title, and where it lies."""

    encoded: bytes
    name: str
    title: str
    where: str


def main() -> None:
    """Check what can be checked without torch, then draw."""
    args = _parse()
    header = read_header(args.weights, args.model)
    stated_preprocessing(args.settings)
    grid_size(header.spec, args.image_size or header.image_size)
    depth = header.spec.depth
    if args.layer is not None and not 1 <= abs(args.layer) <= depth:
        fix = f"1 ... {depth} from the first, or -1 ... -{depth} from the last"
        raise UsageError(f"--layer {args.layer}: the model has {depth} layers", fix=fix)
    reader = open_split(args.data, args.split) if args.data else None
    for picture in _pictures(args, reader):  # a bad image is named before anything is drawn
        _pixels(picture)
    if args.out.exists() and not args.out.is_dir():
        raise UsageError("is no directory", where=f"--out {args.out}")
    _draw(args, header, reader)


def _draw(args: argparse.Namespace, header: WeightsHeader, reader: ShardReader | None) -> None:
    from vitds.attention_map import attention_maps, draw_attention
    from vitds.data.crop import eval_box
    from vitds.faults import faults_named
    from vitds.inference import choose_device, class_names, load, most_likely
    from vitds.loss import probabilities

    with faults_named(rank=0):
        device = choose_device(args.device)
        settings = stated_preprocessing(args.settings)
        model, transform, classes = load(args.weights, args.image_size, args.model, settings, args.ema)
        model.to(device)
        names = class_names(model.num_classes, classes or (reader.classes if reader else None))
        height, width = model.image_size
        for picture in _pictures(args, reader):
            pixels = _pixels(picture)  # (3, H, W)
            maps = attention_maps(model, transform(picture.encoded)[None].to(device), args.layer)
            predictions: list[tuple[str, float]] = []
            if model.num_classes:
                chances = probabilities(header.loss, maps.output)[0].tolist()
                predictions = [(names[label], chances[label]) for label in most_likely(maps.output, 5)[0].tolist()]
            top, left, box_h, box_w = eval_box(*pixels.shape[1:], transform.data, model.image_size)
            page = draw_attention(
                pixels[:, top : top + box_h, left : left + box_w].transpose(1, 2, 0),
                maps.rollout[0].numpy(),
                maps.heads[0].numpy(),
                predictions,
                title=picture.title,
                subtitle=f"{model.spec.name} · {height} x {width} px",
                heads_title=_heads_title(header, args.layer),
            )
            file = _save(page, args.out, picture.name)
            said = f": {predictions[0][0]} ({100 * predictions[0][1]:.1f} %)" if predictions else ""
            print(f"{picture.title}{said}\nwritten: {file}", flush=True)


def _pictures(args: argparse.Namespace, reader: ShardReader | None) -> Iterator[Picture]:
    for path in args.image:
        try:
            yield Picture(path.read_bytes(), shown(path.stem), shown(path.name), shown(path))
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=shown(path)) from None
    if reader is None:
        return
    for index in args.index:
        if not 0 <= index < len(reader):
            raise UsageError(f"--index {index} is not in 0 ... {len(reader) - 1}", where=str(reader.directory))
        sample = reader.read(index)
        labels = sample.label if isinstance(sample.label, tuple) else (sample.label,)
        title = f"{args.split} {index} · label {', '.join(reader.classes[label] for label in labels) or 'none'}"
        yield Picture(sample.data, f"{args.split}-{index}", title, " ".join(reader.where(index)))


def _pixels(picture: Picture) -> np.ndarray:
    try:
        return decode(picture.encoded)
    except BadImage as error:
        raise DataError(str(error), where=picture.where) from None


def _heads_title(header: WeightsHeader, layer: int | None) -> str:
    pooling, depth = header.spec.pooling, header.spec.depth
    if pooling == "map" and layer is None:
        return "attention pool, head by head: what its query attends to"
    number = depth if layer is None else layer if layer > 0 else depth + 1 + layer
    whose = "the class token attends to" if pooling == "token" else "the patches attend to, on average"
    return f"layer {number} of {depth}, head by head: what {whose}"


def _save(page: Image.Image, directory: Path, name: str) -> Path:
    """Write directory/name.png, or name-2.png and so on where that exists; whole or not at all."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    for file in (directory / f"{free}.png" for free in names):
        if os.path.lexists(file):
            continue
        try:
            with new_file(file) as stream:
                page.save(stream, "PNG")
            return file
        except OSError as error:
            if not os.path.lexists(file):  # else somebody took the name meanwhile
                raise UsageError(f"cannot be written: {error.strerror or error}", where=str(file)) from None
    raise AssertionError("names do not end")


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--weights", metavar="PATH", type=Path, required=True, help="a run, a checkpoint, or weights of any format"
    )
    parser.add_argument("--image", metavar="FILE", type=Path, nargs="+", default=[], help="image files")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory for the pictures")
    parser.add_argument(
        "--layer", metavar="K", type=int, help="whose heads: 1 is the first, -1 the last; else where attention ends"
    )
    parser.add_argument("--data", metavar="DIR", help="take images from this data set")
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument(
        "--index", metavar="K", type=int, nargs="+", help="samples of --data (default, if no --image: 0)"
    )
    add_weights_options(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; else the GPU when there is one")
    args = parser.parse()
    if not args.image and not args.data:
        parser.error("name images: --image FILE, or --data DIR")
    if args.index and not args.data:
        parser.error("--index needs --data DIR")
    if args.index is None:
        args.index = [] if args.image else [0]
    return args


if __name__ == "__main__":
    exit_with(main)
