"""Small data sets for tests: pixels that can be told apart, written through the product's own writer."""

from pathlib import Path

import numpy as np

from vitds.data.reader import ShardReader
from vitds.data.sources import PixelSource
from vitds.data.writer import WriteOptions, write_dataset


def pixel_source(num_images: int, num_classes: int = 5, side: int = 12, seed: int = 0) -> PixelSource:
    """Random RGB images; labels go round the classes."""
    images = np.random.default_rng(seed).integers(0, 256, (num_images, side, side + 3, 3), dtype=np.uint8)
    classes = [f"class-{label}" for label in range(num_classes)]
    keys = [f"image-{row}" for row in range(num_images)]
    labels = np.arange(num_images) % num_classes
    return PixelSource(name="pixels", classes=classes, keys=keys, labels=labels, images=images)


def multi_label_source(num_images: int, num_classes: int = 5, seed: int = 0) -> PixelSource:
    """Random images, each of none to three of the classes."""
    source = pixel_source(num_images, num_classes, seed=seed)
    draw = np.random.default_rng(seed + 100)
    source.labels = [
        tuple(sorted(draw.choice(num_classes, row % 4, replace=False).tolist())) for row in range(num_images)
    ]
    return source


def write_multi_label(out: Path, num_train: int = 53, num_val: int = 29, **options) -> Path:
    """As `write_pixels`, with any number of classes an image."""
    sources = {"train": multi_label_source(num_train, seed=1), "val": multi_label_source(num_val, seed=2)}
    write_dataset(out, sources, WriteOptions("pixels", **{"samples_per_shard": 8} | options))
    return out


def write_pixels(out: Path, num_train: int = 53, num_val: int = 29, **options) -> Path:
    """A data set of random images in shards of 8."""
    sources = {"train": pixel_source(num_train, seed=1), "val": pixel_source(num_val, seed=2)}
    write_dataset(out, sources, WriteOptions("pixels", **{"samples_per_shard": 8} | options))
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def damage(dataset: Path, split: str, sample_id: int) -> str:
    """Flip a bit of a sample on disk and return its key."""
    reader = ShardReader(dataset, split)
    path = dataset / split / reader.index.shards[reader.index.shard[sample_id]]
    content = bytearray(path.read_bytes())
    content[reader.index.offset[sample_id] + 600] ^= 1
    path.write_bytes(content)
    return reader.key(sample_id)


class _Encoded(PixelSource):
    encoded: list[bytes]

    def read(self, row: int) -> bytes:
        return self.encoded[row]


def with_images(source: PixelSource, encoded: list[bytes]) -> PixelSource:
    """A source whose images are these bytes."""
    changed = _Encoded(**vars(source))
    changed.encoded = encoded
    return changed
