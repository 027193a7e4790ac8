"""Measure decoding and augmentation on one core, and the loader, beside what others do on the same photos.

Every variant gets the same random boxes. Without --images the photos are synthetic: their ratios are not those of
photos.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from benchmarks.rounds import Figure, interleaved, rate, speedup
from vitds.arguments import positive
from vitds.data.augment import draws
from vitds.data.crop import NUM_DRAWS, random_box, train_crop
from vitds.data.decode import open_image
from vitds.errors import UsageError
from vitds.run_config import DataConfig

_SIZE = (224, 224)
_DATA = DataConfig(interpolation="bicubic", crop_scale=(0.08, 1.0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEG photos, in folders of any depth")
    parser.add_argument("--limit", type=positive, default=500, metavar="N", help="photos to take, in order (500)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    torch.set_num_threads(1)
    photos = _photos(args.images, args.limit)
    numbers = draws(0, np.zeros(len(photos), int), np.arange(len(photos)), np.zeros(len(photos), int), NUM_DRAWS)
    variants: dict[str, Callable[[], None]] = {
        "vitds fast": lambda: _ours(photos, numbers),
        "PIL + torchvision v1": lambda: _pillow(photos, numbers),
    }
    task = progress.add_task("train transform", total=(args.rounds + 1) * len(variants))
    costs = interleaved(variants, args.rounds, lambda: progress.advance(task))
    figures = [rate(costs, name, len(photos), "images/s") for name in variants]
    return [*figures, speedup(costs, "vitds fast", "PIL + torchvision v1", bound=2.3, goal=2.65)]


def _photos(directory: Path | None, limit: int) -> list[bytes]:
    if directory is None:
        rng = np.random.default_rng(0)
        return [_synthetic(rng) for _ in range(min(limit, 100))]
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UsageError("holds no JPEG", where=f"--images {directory}")
    return [path.read_bytes() for path in paths[:limit]]


def _synthetic(rng: np.random.Generator) -> bytes:
    small = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((500, 400), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _ours(photos: list[bytes], numbers: np.ndarray) -> None:
    for photo, row in zip(photos, numbers, strict=True):
        train_crop(open_image(photo), row, _DATA, _SIZE)


def _pillow(photos: list[bytes], numbers: np.ndarray) -> None:
    from torchvision.transforms import functional as F

    for photo, row in zip(photos, numbers, strict=True):
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        box = random_box(image.height, image.width, _DATA.crop_scale, _DATA.crop_ratio, row)
        image = F.resized_crop(image, *box, list(_SIZE), F.InterpolationMode.BICUBIC)
        image = F.hflip(image) if row[-1] < _DATA.flip else image
        F.normalize(F.to_tensor(image), (0.5,) * 3, (0.5,) * 3)
