"""Measure the writing of shards beside what others need for the same images, in CPU time, one process each.

Every writer gets the same image files, from a warm page cache, and writes all of them in an order shuffled over the
whole, 1000 to a shard. Ours also lists and shuffles them, reads each image's size, keeps checksums, waits for the disk
and writes its index; its duplicate search is off. Without --images the images are synthetic, of 110 kB each.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from rich.progress import Progress

from benchmarks.rounds import Figure, interleaved, rate, speedup
from vitds.arguments import positive
from vitds.data.sources import open_source
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import UsageError

_NUM_CLASSES = 100
_PER_SHARD = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEG photos, in folders of any depth")
    parser.add_argument(
        "--num-images", type=positive, default=4000, metavar="N", help="photos are repeated up to this (4000)"
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write; must have room (the system's)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    with tempfile.TemporaryDirectory(prefix="vitds-shards-", dir=args.scratch) as scratch:
        root = Path(scratch)
        tree, tar_of_tars = _input(root, args.images, args.num_images)
        files = sorted(tree.glob("*/*"))
        random.Random(0).shuffle(files)
        label_of = {name: label for label, name in enumerate(sorted(path.name for path in tree.iterdir()))}
        samples = [(str(path), path.stem, label_of[path.parent.name]) for path in files]
        (root / "list").write_text("".join(f"{path.relative_to(tree)}\n" for path in files))
        out = root / "out"
        variants: dict[str, Callable[[], object]] = {
            "vitds from class folders": lambda: _ours(tree, out),
            "vitds from a tar of tars": lambda: _ours(tar_of_tars, out),
            "webdataset ShardWriter": lambda: _webdataset(samples, out, encoder=True),
            "webdataset ShardWriter encoder=False": lambda: _webdataset(samples, out, encoder=False),
            "Python tarfile": lambda: _tarfile(samples, out),
            "tar cf": lambda: _run(out, "tar", "cf", str(out / "all.tar"), "-C", str(tree), "-T", str(root / "list")),
            "dd bs=1M": lambda: _run(out, "dd", f"if={tar_of_tars}", f"of={out / 'all'}", "bs=1M", "status=none"),
            "reading alone": lambda: _read(samples),
        }
        task = progress.add_task("writing shards", total=(args.rounds + 1) * len(variants))

        def after() -> None:
            shutil.rmtree(out, ignore_errors=True)
            progress.advance(task)

        costs = interleaved(variants, args.rounds, after)
    figures = [rate(costs, name, args.num_images, "images/s") for name in variants]
    for name in list(variants)[:2]:
        for other in list(variants)[2:4]:
            figures.append(speedup(costs, name, other, bound=2.5, goal=3.0))
    return figures


def _input(root: Path, images: Path | None, num_images: int) -> tuple[Path, Path]:
    """A tree of class folders, and the same images as ImageNet's training archive has them: a tar of class tars."""
    if images is None:
        rng = np.random.default_rng(0)
        photos = [_synthetic(rng) for _ in range(50)]
    else:
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if not paths:
            raise UsageError("holds no JPEG", where=f"--images {images}")
        photos = [path.read_bytes() for path in paths[:num_images]]
    tree, tar_of_tars = root / "tree", root / "ILSVRC2012_img_train.tar"
    for number in range(num_images):
        path = tree / f"n{number % _NUM_CLASSES:08d}" / f"n{number % _NUM_CLASSES:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[number % len(photos)])
    with tarfile.open(tar_of_tars, "w", format=tarfile.GNU_FORMAT) as outer:
        for folder in sorted(tree.iterdir()):
            inner = root / f"{folder.name}.tar"
            with tarfile.open(inner, "w", format=tarfile.GNU_FORMAT) as tar:
                for path in sorted(folder.iterdir()):
                    tar.add(path, path.name)
            outer.add(inner, inner.name)
            inner.unlink()
    return tree, tar_of_tars


def _synthetic(rng: np.random.Generator) -> bytes:
    small = Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((500, 400), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _ours(source: Path, out: Path) -> None:
    sources = open_source(str(source), None, source.parent)
    write_dataset(out, sources, WriteOptions("bench", samples_per_shard=_PER_SHARD, find_duplicates=False))


def _read(samples: list[tuple[str, str, int]]) -> None:
    for path, _, _ in samples:
        with open(path, "rb") as file:
            file.read()


def _webdataset(samples: list[tuple[str, str, int]], out: Path, encoder: bool) -> None:
    out.mkdir()
    with webdataset.ShardWriter(f"{out}/bench-%06d.tar", maxcount=_PER_SHARD, encoder=encoder, verbose=0) as sink:
        for path, key, label in samples:
            with open(path, "rb") as file:
                image = file.read()
            sink.write({"__key__": key, "jpg": image, "cls": label if encoder else b"%d" % label})


def _tarfile(samples: list[tuple[str, str, int]], out: Path) -> None:
    out.mkdir()
    for first in range(0, len(samples), _PER_SHARD):
        with tarfile.open(out / f"bench-{first}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for path, key, label in samples[first : first + _PER_SHARD]:
                with open(path, "rb") as file:
                    image = file.read()
                for name, content in ((f"{key}.jpg", image), (f"{key}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _run(out: Path, *command: str) -> None:
    out.mkdir()
    subprocess.run(command, check=True)
