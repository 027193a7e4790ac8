"""Parquet from an address: http, https, s3, gs, hdfs, and the Hugging Face hub as hf://datasets/OWNER/NAME/FILE.

Files are downloaded whole, for every one of their bytes is needed twice: labels to plan, images to write. Each is
complete or called `.part`; a download that broke off is continued by the same command.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from vitds.data.sources.base import SPLIT_NAMES, Source, split_in_name
from vitds.data.sources.parquet import parquet_files
from vitds.data.sources.webdataset import expand
from vitds.errors import DataError
from vitds.progress import Watcher
from vitds.transport import PATIENT, BrokenOff, Refused, Url, fetch, hugging_face, location, unavailable

_HUB = "hf://"
_ON_THE_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


def is_address(source: str) -> bool:
    """Whether a source lies somewhere else: an address, or several by braces."""
    return source.startswith(_HUB) or isinstance(location(source.lstrip("{")), Url)


def remote_parquet(
    source: str, split: str | None, download_dir: Path, classes: list[str] | None, watcher: Watcher
) -> dict[str, Source]:
    """The splits of Parquet at an address, or at several by braces, downloaded into `download_dir`.

    Raises: DataError when it is no Parquet, or DataUnavailable when it cannot be had.
    """
    urls = [_on_the_web(url) for url in expand(source)]
    other = [url for url in urls if not url.name.endswith(".parquet")]
    if other:
        raise DataError(
            "only Parquet can be read from an address, this names no .parquet",
            where=other[0].shown,
            fix="name the files, as in https://HOST/train-{00000..00013}-of-00014.parquet; shards of WebDataset need "
            "not be written again: train from --data URL",
        )
    watcher.begin("download", len(urls), unit="files")
    files = {}
    for url in urls:
        host, *parts = (part for part in PurePosixPath(url.shown.partition("://")[2]).parts if part != "..")
        path = _download(url, download_dir.joinpath(host, *parts))
        files[path] = split_in_name(path, download_dir / host)
        watcher.advance("download", 1)
    sources = parquet_files(source, files, split, classes)
    next(iter(sources.values())).notes.append(
        f"downloaded {len(files)} files into {download_dir}: they are not needed when the shards are written"
    )
    return sources


def _on_the_web(url: str) -> Url:
    """An address that can be fetched: files on the hub have one behind their short name.

    Source: https://huggingface.co/docs/huggingface_hub/guides/hf_file_system (paths), /resolve/ of the hub (content).
    """
    if not url.startswith(_HUB):
        return Url(url)
    found = _ON_THE_HUB.fullmatch(url)
    if not found or set("*?[") & set(url):
        raise DataError(
            "names no file on the hub",
            where=url,
            fix=f"as in hf://datasets/OWNER/NAME/data/{SPLIT_NAMES[0]}-{{00000..00013}}-of-00014.parquet",
        )
    repository, revision, file = found.groups()
    return Url(f"{hugging_face()}/datasets/{repository}/resolve/{revision or 'main'}/{file}")


def _download(url: Url, path: Path) -> Path:
    if not path.exists():
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            with open(part, "r+b", buffering=0) as file:
                fetch(url, file, PATIENT)
            part.rename(path)
        except (Refused, BrokenOff) as error:
            raise unavailable(url, error) from None
        except OSError as error:
            raise DataError(f"cannot be downloaded: {error.strerror}", where=str(part)) from None
    return path
