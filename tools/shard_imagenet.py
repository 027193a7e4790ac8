#!/usr/bin/env python3
"""Turn images into a data set that vitds trains from: tar shards, an index, a list of classes.

    python tools/shard_imagenet.py /data/imagenet /data/imagenet-shards
    python tools/shard_imagenet.py /downloads/ILSVRC2012_img_train.tar /data/imagenet-shards --val-fraction 0.01
    python tools/shard_imagenet.py cifar10 data/cifar10
    python tools/shard_imagenet.py --index-only /data/somebodys-shards

SOURCE is known by its content:
  class folders            DIR/CLASS/IMAGE.jpg, with train/ and val/ above them, or without
  ImageNet's archives      ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, or the directory they lie in: read in
                           place, never extracted; validation needs ILSVRC2012_devkit_t12.tar.gz beside it
  a table                  .csv, .tsv or .parquet with path, label and, if it likes, split; several labels as cat|dog
  Hugging Face parquet     a file or a directory of them; or at an address, downloaded first (https, s3, gs, and
                           "hf://datasets/OWNER/NAME/data/train-{00000..00013}-of-00014.parquet", with HF_TOKEN)
  WebDataset shards        a directory of .tar, one, or a pattern: "train-{000..127}.tar"
  CIFAR                    its archive or its folder
  a word                   cifar10 and cifar100 are downloaded, digits come with scikit-learn
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser, num_bytes, part_of, positive, share
from vitds.data.adopt import index_shards
from vitds.data.health import health_report
from vitds.data.image_files import shown
from vitds.data.sources import hold_out, open_source, read_classes
from vitds.data.writer import SPLITS, Summary, WriteOptions, merge_parts, write_dataset
from vitds.dataset_facts import read_dataset_facts
from vitds.errors import UsageError, exit_with
from vitds.progress import ConsoleWatcher


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(__doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="what to read: see above")
    parser.add_argument("out", metavar="OUT", type=Path, help="the data set to make, or to add a split to")
    parser.add_argument("--split", choices=SPLITS, help="take this split only; of class folders alone: what they are")
    parser.add_argument(
        "--val-fraction", type=share, metavar="F", help="hold out this share of each class as the validation split"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which images --val-fraction holds out (0)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names by label, where SOURCE has none")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (all cores)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="images in a shard (1000)")
    size.add_argument("--shard-bytes", type=num_bytes, metavar="SIZE", help="cut shards by size instead: 256M, 1G")
    parser.add_argument("--name", help="what shard files are called (OUT's name)")
    parser.add_argument("--verify", action="store_true", help="decode every image, not only its header")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used, and list them")
    parser.add_argument("--duplicates", choices=("find", "off"), default="find", help="look for equal images (find)")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="write a share, beside OUT")
    parser.add_argument(
        "--merge", action="store_true", help="put all parts together; they may come from other machines"
    )
    parser.add_argument(
        "--index-only",
        action="store_true",
        help="index the shards in OUT/train and OUT/val where they are",
    )
    parser.add_argument("--download-dir", type=Path, metavar="DIR", help="where downloads go, or are (beside OUT)")
    return parser.parse()


def main() -> None:
    """Open the source, write the data set, say what it holds."""
    args = parse()
    if args.index_only and args.source:
        raise UsageError(f'--index-only takes one directory, but got "{args.source}" and "{args.out}"')
    if args.index_only and (args.val_fraction or args.split):
        raise UsageError("--index-only leaves every sample in its split", fix="write the shards anew: SOURCE OUT")
    if not (args.source or args.merge or args.index_only):
        raise UsageError("SOURCE is missing", fix="tools/shard_imagenet.py SOURCE OUT")
    name = args.name
    if name is not None and (not name or "/" in name or name.startswith(".") or not _is_utf8(name)):
        raise UsageError(f'--name "{name}" is no beginning of a file name')
    out = Path(os.path.abspath(args.out))
    if not _is_utf8(str(out)):
        raise UsageError("its path is no UTF-8, as that of a data set must be", where=shown(out))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # SOURCE may have any bytes in its path
    console = Console(soft_wrap=True, markup=False, highlight=False)
    started_s = time.monotonic()
    classes = read_classes(args.classes) if args.classes else None
    options = WriteOptions(
        name=name or out.name,
        samples_per_shard=args.samples_per_shard,
        shard_bytes=args.shard_bytes,
        workers=args.workers,
        skip_bad=args.skip_bad,
        verify=args.verify,
        find_duplicates=args.duplicates == "find",
        part=args.part,
    )
    with ConsoleWatcher(console) as watcher:
        if args.merge:
            summary = merge_parts(out, args.workers, watcher)
        elif args.index_only:
            summary = index_shards(out, options, classes, watcher)
        else:
            sources = open_source(args.source, args.split, args.download_dir or out.parent, classes, watcher)
            if args.val_fraction:
                sources = hold_out(sources, args.val_fraction, args.seed)
            summary = write_dataset(out, sources, options, watcher)
    _report(console, args.out, summary, time.monotonic() - started_s)


def _is_utf8(text: str) -> bool:
    """False where the command line had bytes that are none, for which Python has characters that cannot be written."""
    return text == text.encode("utf-8", "replace").decode()


def _report(console: Console, out: Path, summary: Summary, duration_s: float) -> None:
    if summary.health:
        console.print(health_report(summary.health))
    for split, written in summary.splits.items():
        shards = "1 shard" if written.num_shards == 1 else f"{written.num_shards} shards"
        console.print(f"{split}: {written.num_images:,} images in {shards}, {written.size_bytes / 2**20:.1f} MiB")
        for line in written.bad:
            console.print(f"  left out: {line}")
    for line in summary.warnings:
        console.print(f"warning: {line}")
    num_images = sum(written.num_images for written in summary.splits.values())
    effort = f" in {duration_s:.1f} s ({num_images / duration_s:,.0f} images/s)"
    console.print(
        f"{summary.path}: {summary.num_classes} classes, {num_images:,} images"
        f"{effort if summary.is_new else '; already complete, nothing written'}"
    )
    if not summary.health:
        console.print(f"part finished; when all are there: python tools/shard_imagenet.py --merge {out}")
        return
    if not (out / "val").exists():
        console.print("there is no validation split (--split val adds one): training will not be evaluated")
    if (out / "train").exists():
        loss = " --loss bce" if read_dataset_facts(str(out)).multi_label else ""
        console.print(
            f"next: deepspeed -q launch/train.py --deepspeed_config ds_configs/quickstart.json --data {out} "
            f"--name {out.resolve().name}{loss}"
        )


if __name__ == "__main__":
    exit_with(main)
