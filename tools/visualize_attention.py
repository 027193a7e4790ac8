"""Draw what a model attends to: the image, the attention rollout over it, every head of the last block, the top five.

    python tools/visualize_attention.py cat.jpg dog.jpg --weights runs/NAME --output attention.png
    python tools/visualize_attention.py --data DIR --split val --index 0 7 --weights ViT-B_16.npz --output attention.png

Weights are a run, a checkpoint or an .npz. Class names come from the checkpoint, else from --data. Images are
resized and cropped as the run evaluates them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, positive
from vitds.data.reader import ShardReader
from vitds.errors import DataError, UsageError, exit_with
from vitds.manifest import read_manifest
from vitds.model.registry import grid_size
from vitds.run_config import DataConfig
from vitds.weights_header import read_header, resolve_checkpoint


def main() -> None:
    """Load the model, draw a panel for each image, write one PNG."""
    args = _parse()
    header = read_header(args.weights)
    if args.image_size:
        grid_size(header.spec, (args.image_size, args.image_size))
    facts: dict[str, Any] = {} if args.weights.is_file() else read_manifest(resolve_checkpoint(args.weights)).info
    reader = ShardReader(args.data, args.split) if args.data else None

    # torch only now: a wrong argument, wrong weights or wrong data are answered at once.
    import torch

    from vitds.attention_map import attention_rollout, draw_attention, last_layer_attention, stack_panels
    from vitds.data.augment import eval_transform
    from vitds.data.decode import BadImage, decode
    from vitds.weights.create import create_model

    classes = facts.get("classes") or (reader.classes if reader else [])
    transform = DataConfig(**facts.get("config", {}).get("vitds", {}).get("data", {}))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (transform.mean, transform.std))

    def name_of(label: int) -> str:
        return classes[label] if label < len(classes) else f"class {label}"

    def encoded_images() -> Iterator[tuple[str, bytes]]:
        for path in args.images:
            try:
                yield path.name, path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
        for index in args.index:
            if not 0 <= index < len(reader):
                raise UsageError(
                    f"--index {index} is not in 0 ... {len(reader) - 1}", where=str(args.data / args.split)
                )
            sample = reader.read(index)
            yield f"{args.split} {index}: {name_of(sample.label)}", sample.data

    model = create_model("auto", weights=args.weights, image_size=args.image_size).eval()
    height, width = model.image_size
    subtitle = f"{model.spec.name} · {height} x {width} px"
    panels = []
    for title, encoded in encoded_images():
        try:
            pixels = torch.from_numpy(decode(encoded))  # (3, H, W)
        except BadImage as error:
            raise DataError(str(error), where=title) from None
        images = ((eval_transform(pixels, transform, model.image_size) / 255 - mean) / std)[None]
        with torch.no_grad():
            top = model(images).softmax(dim=-1)[0].topk(min(5, model.num_classes))
        rollout = attention_rollout(model, images)[0].numpy()
        heads = last_layer_attention(model, images)[0].numpy()
        predictions = [(name_of(label), p) for label, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        panels.append(draw_attention(pixels.permute(1, 2, 0).numpy(), rollout, heads, predictions, title, subtitle))
        print(f"{title}: {predictions[0][0]} ({100 * predictions[0][1]:.1f} %)")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        stack_panels(panels).save(args.output)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be written: {error}", where=str(args.output)) from None
    print(f"written: {args.output}")


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="*", help="image files")
    parser.add_argument("--weights", metavar="PATH", type=Path, required=True, help="a run, a checkpoint or an .npz")
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("attention.png"))
    parser.add_argument("--data", metavar="DIR", type=Path, help="take images from this data set")
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument("--index", metavar="K", type=int, nargs="+", help="samples of --data (default, if no IMAGE: 0)")
    parser.add_argument(
        "--image-size", metavar="S", type=positive, help="in pixels; else what the weights were trained at"
    )
    args = parser.parse()
    if not args.images and not args.data:
        parser.error("name an IMAGE, or --data DIR")
    if args.index and not args.data:
        parser.error("--index needs --data DIR")
    if args.index is None:
        args.index = [] if args.images else [0]
    return args


if __name__ == "__main__":
    exit_with(main)
