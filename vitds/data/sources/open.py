"""Find out what a source is, by its content, and open it."""

from __future__ import annotations

from pathlib import Path

from vitds.data.sources.base import Source
from vitds.data.sources.downloads import is_address, remote_parquet
from vitds.data.sources.folders import class_folders
from vitds.data.sources.imagenet import imagenet_archives
from vitds.data.sources.parquet import parquet
from vitds.data.sources.pixels import CIFAR, cifar, cifar_on_disk, digits
from vitds.data.sources.table import table
from vitds.data.sources.webdataset import webdataset_pattern, webdataset_shards
from vitds.errors import DataError
from vitds.progress import Watcher


def open_source(
    source: str,
    split: str | None,
    download_dir: Path,
    classes: list[str] | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Source]:
    """Find out what `source` is and list its splits, `train` first; the images themselves are read later, row by row.

    `classes` names the labels of shards, tables and Parquet, which may not say it themselves.
    Raises: DataError when it is nothing that vitds reads, or lacks the split asked for.
    """
    if source == "digits":
        sources = digits()
    elif source in CIFAR:
        sources = cifar(source, download_dir, download=True)
    elif is_address(source):
        sources = remote_parquet(source, split, download_dir, classes, watcher or Watcher())
    elif Path(source).exists():
        path = Path(source)
        sources = (
            cifar_on_disk(path)
            or imagenet_archives(path, split)
            or table(path, split, classes)
            or parquet(path, split, classes)
            or webdataset_shards(path, split, classes)
            or class_folders(path, split)
        )
    elif "{" in source:
        sources = webdataset_pattern(source, split, classes)
    else:
        raise DataError("no such file or directory", where=source, fix="or one of the words cifar10, cifar100, digits")
    for opened in sources.values():
        if opened.bad and not opened.keys:
            raise DataError(f"nothing in it can be used: {opened.bad[0]}", where=opened.name)
        if classes is not None and opened.classes != classes:
            raise DataError(
                "says the names of its classes itself",
                where=opened.name,
                fix="leave --classes out; OUT/classes.json may be edited afterwards, its order is what counts",
            )
    if split is None:
        return sources
    if split not in sources:
        raise DataError(f'has no split "{split}", only {", ".join(sources)}', where=source)
    return {split: sources[split]}
