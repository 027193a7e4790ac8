"""Measure decoding and augmentation on one core, and the loader, beside what others do on the same photos.

Every variant makes the same random boxes and flips, at 224 pixels, bicubic. Peers end in normalised float32, as their
users run them; vitds ends in uint8, for it normalises on the device, and so do both whole loaders, which share one
decoder. Without --images the photos are synthetic, whose ratios are not those of photos.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io
import webdataset
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from benchmarks.rounds import Costs, Figure, interleaved, rate, speedup
from vitds.arguments import positive
from vitds.data.augment import draws
from vitds.data.crop import NUM_DRAWS, eval_crop, random_box, train_crop
from vitds.data.decode import open_image
from vitds.data.loader import TrainLoader
from vitds.data.order import NaturalOrder
from vitds.data.reader import ShardReader
from vitds.data.sources.base import Source
from vitds.data.writer import WriteOptions, write_dataset
from vitds.ds_config import Batch
from vitds.errors import UsageError
from vitds.run_config import DataConfig
from vitds.world import World

_SIDE, _SIZE = 224, (224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FAST = DataConfig(interpolation="bicubic", crop_scale=(0.08, 1.0), eval_crop="center", mean=_MEAN, std=_STD)
_EXACT = DataConfig(
    interpolation="bicubic", crop_scale=(0.08, 1.0), eval_crop="center", mean=_MEAN, std=_STD, resampling="exact"
)
_PILLOW, _TORCH_IO = "Pillow + torchvision v1", "torchvision.io + v2"
_NUM_SHARDS = 8
_WORKERS = 2
_EPOCHS = 4  # of one run of a whole loader
_PSNR_CAP_DB = 78.1  # of images that are equal: a mean squared error of 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEG photos, in folders of any depth")
    parser.add_argument("--limit", type=positive, default=500, metavar="N", help="photos to take, in order (500)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    torch.set_num_threads(1)
    photos = _photos(args.images, args.limit)
    first = np.zeros(len(photos), int)
    numbers = draws(0, first, np.arange(len(photos)), first, NUM_DRAWS)

    def run(title: str, variants: dict[str, Callable[[], object]]) -> Costs:
        task = progress.add_task(title, total=(args.rounds + 1) * len(variants))
        return interleaved(variants, args.rounds, lambda: progress.advance(task))

    train = run("training crops", _train_variants(photos, numbers))
    evaluation = run("evaluation", _eval_variants(photos))
    with tempfile.TemporaryDirectory(prefix="vitds-benchmark-") as directory:
        batch_size = _write_shards(photos, Path(directory))
        loaders = run("loaders", _loader_variants(Path(directory), batch_size))
    num_loaded = _EPOCHS * _NUM_SHARDS * batch_size
    return [
        *(rate(train, name, len(photos), "images/s") for name in train),
        speedup(train, "vitds fast", _PILLOW, bound=2.3, goal=2.65),
        speedup(train, "vitds fast", _TORCH_IO, bound=1.35, goal=1.55),
        speedup(train, "vitds exact", _PILLOW, bound=1.25, goal=1.42),
        *(rate(evaluation, name, len(photos), "images/s") for name in evaluation),
        speedup(evaluation, "vitds evaluation", "Pillow evaluation", bound=1.8),
        *(rate(loaders, name, num_loaded, "images/s") for name in loaders),
        speedup(loaders, "vitds loader", "webdataset", bound=1.1, goal=1.24),
        *_deviation(photos, numbers),
    ]


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


def _train_variants(photos: list[bytes], numbers: np.ndarray) -> dict[str, Callable[[], object]]:
    encoded = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos]

    def ours(data: DataConfig) -> Callable[[bytes, np.ndarray], Tensor]:
        return lambda photo, row: train_crop(open_image(photo), row, data, _SIZE)

    def pillow(photo: bytes, row: np.ndarray) -> Tensor:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        box = random_box(image.height, image.width, _FAST.crop_scale, _FAST.crop_ratio, row)
        image = v1.resized_crop(image, *box, list(_SIZE), v1.InterpolationMode.BICUBIC)
        return v1.normalize(v1.to_tensor(v1.hflip(image) if row[-1] < _FAST.flip else image), _MEAN, _STD)

    def torch_io(data: Tensor, row: np.ndarray) -> Tensor:
        image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
        box = random_box(*image.shape[1:], _FAST.crop_scale, _FAST.crop_ratio, row)
        image = v2.resized_crop(image, *box, list(_SIZE), v2.InterpolationMode.BICUBIC, antialias=True)
        image = v2.horizontal_flip(image) if row[-1] < _FAST.flip else image
        return v2.normalize(v2.to_dtype(image, torch.float32, scale=True), _MEAN, _STD)

    return {
        "vitds fast": _over(ours(_FAST), photos, numbers),
        "vitds exact": _over(ours(_EXACT), photos, numbers),
        _PILLOW: _over(pillow, photos, numbers),
        _TORCH_IO: _over(torch_io, encoded, numbers),
    }


def _over(function: Callable[..., Tensor], *columns: Iterable[Any]) -> Callable[[], None]:
    """Call a function for every row, and keep nothing: memory that is never reused would cost more than some do."""

    def run() -> None:
        for row in zip(*columns, strict=True):
            function(*row)

    return run


def _eval_variants(photos: list[bytes]) -> dict[str, Callable[[], object]]:
    def pillow(photo: bytes) -> Tensor:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        image = v1.resize(image, int(_SIDE / _FAST.crop_fraction), v1.InterpolationMode.BICUBIC)
        return v1.normalize(v1.to_tensor(v1.center_crop(image, list(_SIZE))), _MEAN, _STD)

    return {
        "vitds evaluation": _over(lambda photo: eval_crop(open_image(photo), _FAST, _SIZE), photos),
        "Pillow evaluation": _over(pillow, photos),
    }


@dataclass(kw_only=True)
class _Photos(Source):
    photos: list[bytes]

    def read(self, row: int) -> bytes:
        return self.photos[row]

    def sizes(self) -> np.ndarray:
        return np.array([len(photo) for photo in self.photos])


def _write_shards(photos: list[bytes], directory: Path) -> int:
    """Write equal shards, so that webdataset's workers have equal shares, and give their size."""
    size = max(1, len(photos) // _NUM_SHARDS)
    rows = [row % len(photos) for row in range(size * _NUM_SHARDS)]
    source = _Photos(
        name="photos",
        classes=["photo", "none"],
        keys=[str(row) for row in range(len(rows))],
        labels=np.zeros(len(rows), int),
        photos=[photos[row] for row in rows],
    )
    write_dataset(directory / "data", {"train": source}, WriteOptions("photos", samples_per_shard=size))
    return size


def _loader_variants(directory: Path, batch_size: int) -> dict[str, Callable[[], object]]:
    def ours() -> None:
        dataset = ShardReader(directory / "data", "train")
        loader = TrainLoader(
            dataset,
            NaturalOrder(0, len(dataset)),
            _FAST,
            _SIZE,
            num_classes=2,
            batch=Batch(batch_size, batch_size, 1, 1),
            world=World(0, 0, 1),
            seed=0,
            samples_seen=0,
            num_steps_end=_EPOCHS * _NUM_SHARDS,
            workers=_WORKERS,
            device="meta",  # computes nothing, as a GPU costs no CPU time
            dtype=torch.float32,
        )
        assert sum(len(batch.images) for batch in loader) == _EPOCHS * len(dataset)

    def decoded(photo: bytes) -> Tensor:
        return train_crop(open_image(photo), rng.random(NUM_DRAWS), _FAST, _SIZE)

    def peer() -> None:
        shards = sorted(str(path) for path in (directory / "data/train").glob("*.tar"))
        pipeline = webdataset.WebDataset(shards * _EPOCHS, shardshuffle=len(shards) * _EPOCHS).shuffle(500)
        pipeline = pipeline.to_tuple("jpg", "cls").map_tuple(decoded, int).batched(batch_size)
        loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=_WORKERS)
        assert sum(len(images) for images, _ in loader) == _EPOCHS * _NUM_SHARDS * batch_size

    rng = np.random.default_rng(0)
    return {"vitds loader": ours, "webdataset": peer}


def _deviation(photos: list[bytes], numbers: np.ndarray) -> list[Figure]:
    """How far the fast resize is from the exact one, in levels of 255."""
    psnr_db, worst = [], 0
    for photo, row in zip(photos, numbers, strict=True):
        fast, exact = (train_crop(open_image(photo), row, data, _SIZE).int() for data in (_FAST, _EXACT))
        difference = (fast - exact).abs()
        worst = max(worst, int(difference.max()))
        mean_square = float((difference.double() ** 2).mean())
        psnr_db.append(min(_PSNR_CAP_DB, 10 * np.log10(255**2 / max(mean_square, 1e-9))))
    return [
        Figure("PSNR of fast to exact, mean", float(np.mean(psnr_db)), "dB"),
        Figure("PSNR of fast to exact, 5th percentile", float(np.percentile(psnr_db, 5)), "dB"),
        Figure("largest difference of fast to exact", worst, "of 255"),
    ]
