"""Turn weights of any kind into a DeepSpeed checkpoint directory: latest, global_step0/, manifest.

    python tools/npz_to_ds.py ViT-B_16.npz weights/ViT-B_16
    python tools/npz_to_ds.py ViT-B_16.npz weights/ViT-B_16-384 --num-classes 10 --image-size 384
    python tools/npz_to_ds.py deit3_base.pth weights/deit3

WEIGHTS is Google's .npz, a .safetensors, .pth, .pt or .bin file, a timm or Hugging Face directory, or a run. A run
starts from the result at any ZeRO stage and world size with --pretrained OUT_DIR; plain DeepSpeed loads it with
load_module_only at stages 0 to 2. Architecture, head and resolution of the weights are kept unless told otherwise, and
so are class names and preprocessing, where they state them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, add_weights_options, positive
from vitds.errors import UsageError, exit_with
from vitds.model.registry import grid_size
from vitds.weights_header import WeightsHeader, read_header, stated_preprocessing


def main() -> None:
    """Read, fit, write, and say what was found."""
    args = _parse()
    if args.out_dir.exists() and not (args.out_dir.is_dir() and not os.listdir(args.out_dir)):
        raise UsageError("exists and is not empty", where=str(args.out_dir), fix="name a new directory")
    header, stated = read_header(args.weights, args.model), stated_preprocessing(args.settings)
    if args.image_size:
        grid_size(header.spec, args.image_size)

    # torch only now: a wrong argument or a wrong file is answered at once.
    from vitds.checkpoint import save_weights
    from vitds.weights.load import fit, load_weights

    weights = fit(load_weights(args.weights, args.model, ema=args.ema), args.image_size, args.num_classes)
    fitted = weights.header
    # Google's files state no preprocessing, and there is one for all of them.
    data = (fitted.data or ({"mean": 0.5, "std": 0.5} if fitted.format == "npz" else {})) | stated
    info = {
        "model": fitted.spec.name,
        "image_size": list(fitted.image_size),
        "num_classes": fitted.num_classes,
        "pre_logits": fitted.pre_logits,
        "step": 0,
        "world_size": 1,
        "zero_stage": 0,
        "dtype": "fp32",
        "classes": fitted.classes,
        "data": data,
        "loss": fitted.loss,
    }
    save_weights(args.out_dir, weights.state_dict, info)

    head = "kept" if fitted.num_classes == header.num_classes else f"new, zero (the file has {header.num_classes})"
    resized = "" if fitted.image_size == header.image_size else f" (positions resized from {_size(header)})"
    print(f"model       {fitted.spec.name}")
    print(f"image size  {_size(fitted)} px{resized}")
    print(f"classes     {fitted.num_classes}, head {head}")
    print(f"pre_logits  {fitted.pre_logits or 'none'}")
    print(f"parameters  {sum(tensor.numel() for tensor in weights.state_dict.values()):,}")
    for note in header.notes:
        print(f"note        {note}")
    print(f"written     {args.out_dir}")
    print(
        f"next        deepspeed launch/train.py --deepspeed_config CONFIG.json --data DIR --pretrained {args.out_dir}"
    )


def _size(header: WeightsHeader) -> str:
    height, width = header.image_size
    return str(height) if height == width else f"{height} x {width}"


def _parse() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="a file or directory of any kind named above")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new or empty directory")
    parser.add_argument("--num-classes", metavar="N", type=positive, help="another number than theirs: a zero head")
    add_weights_options(parser)
    return parser.parse()


if __name__ == "__main__":
    exit_with(main)
