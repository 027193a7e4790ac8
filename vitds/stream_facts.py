"""What a run must know of tar shards that are streamed without an index: which they are, and how they are opened.

A stream is named by a pattern, `URL-{000000..000127}.tar`; several of them go side by side with `::`, as webdataset has
it. Braces are expanded here, so that what cannot be opened or must not be run is refused before anything starts.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from braceexpand import braceexpand

from vitds.dataset_facts import DatasetFacts
from vitds.errors import ConfigError, DataError, UsageError
from vitds.transport import SCHEMES, Url

_MAX_SHARDS = 1_000_000  # braces of a few letters can stand for more than memory holds
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)")
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz)$")
# webdataset opens these by running a command: a shell for pipe:, curl or another program for the rest.
_RUN = {
    "pipe": "a shell command",
    "hf": "curl",
    "htgs": "curl",
    "sftp": "curl",
    "ftps": "curl",
    "scp": "curl",
    "ais": "ais",
}

WEAKER_GUARANTEE = (
    "tar shards without an index: labels are right, ranks take equal steps, no shard stalls one or is lost in silence; "
    "not promised are exact epochs, an order independent of ranks and workers, a resume to the bit (shards that were "
    "open are read again)"
)


def is_stream(path: str) -> bool:
    """Whether `--data` names tar shards rather than directories."""
    try:
        is_directory = Path(path).is_dir()
    except OSError as error:  # a longer name than any has
        raise UsageError(str(error.strerror), where=f"--data {path:.200}") from None
    return not is_directory and any(
        one.startswith("pipe:") or "{" in one or _TAR.search(urlsplit(one).path) for one in path.split("::")
    )


def shard_urls(path: str) -> list[str]:
    """The shards that a pattern names, in its order.

    Raises: UsageError for braces that do not match, or that stand for more shards than any data set has.
    """
    try:
        # A range is written out whole before the first of it is there.
        is_endless = any(abs(int(last) - int(first)) > _MAX_SHARDS for first, last in _RANGE.findall(path))
        shards = (url for one in path.split("::") for url in braceexpand(one))
        urls = [] if is_endless else list(islice(shards, _MAX_SHARDS + 1))
        if is_endless or len(urls) > _MAX_SHARDS:
            raise UsageError(f"braces that stand for more than {_MAX_SHARDS:,} shards", where=f"--data {path:.200}")
        return urls
    except ValueError:
        raise UsageError(
            "braces that do not match", where=f"--data {path}", fix="as in URL-{000000..000127}.tar"
        ) from None


def scheme(url: str) -> str:
    """How a shard is opened; "" for a local file."""
    found = "pipe" if url.startswith("pipe:") else urlsplit(url).scheme
    return "" if found == "file" else found


def local_path(url: str) -> Path:
    """The file of a shard without a scheme, or with file:."""
    return Path(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)


def shard_name(url: str) -> str:
    """What a shard is called wherever it lies: the last part of its URL, without a query."""
    return shown(url).rpartition("/")[2]


def shown(url: str) -> str:
    """A shard's URL for messages: without its query, which may hold a secret."""
    return Url(url).shown if scheme(url) in SCHEMES else url


def read_stream_facts(
    path: str, num_classes: int | None, samples_per_epoch: int | None, multi_label: bool, allow_pipe: bool
) -> DatasetFacts:
    """Look at what can be known of a stream beforehand.

    The class names are those of a classes.json beside local shards or one level above, else numbers.

    Raises: ConfigError for what has to be given; UsageError for what is not allowed; DataError for a local shard that
    does not exist.
    """
    urls = shard_urls(path)
    for url in urls:
        _check_scheme(url, allow_pipe)
    missing = [url for url in urls if not scheme(url) and not local_path(url).is_file()]
    if starred := next((url for url in urls if "*" in shown(url) and (url in missing or scheme(url) in SCHEMES)), None):
        raise UsageError("* is not expanded", where=shown(starred), fix="use braces, as in {000000..000005}")
    if missing:
        what = "no such shard" + (f", and {len(missing) - 1} more of {len(urls)}" if len(missing) > 1 else "")
        raise DataError(what, where=missing[0], fix="several patterns go side by side with ::" if "," in path else "")
    classes = _classes_beside(urls[0])
    fixes = {}
    if samples_per_epoch is None:
        fixes["how many samples they hold"] = (
            "--samples-per-epoch N; or give the directory, if they were written with an index"
        )
    if num_classes is None and not classes:
        fixes["how many classes there are"] = "--num-classes L, or a classes.json beside the shards"
    if fixes:
        what = "tar shards without an index do not say " + ", nor ".join(fixes)
        raise ConfigError(what, where=f"--data {path}", fix="\n".join(fixes.values()))
    assert samples_per_epoch is not None
    classes = classes or [str(label) for label in range(num_classes or 0)]
    return DatasetFacts(path, classes, [], [], multi_label, (samples_per_epoch, 0))


def _check_scheme(url: str, allow_pipe: bool) -> None:
    name = scheme(url)
    if name in _RUN and not allow_pipe:
        raise UsageError(
            f"{name}: runs {_RUN[name]}",
            where=url,
            fix="--allow-pipe, if you trust where this list of shards comes from",
        )
    if name and name not in SCHEMES and name not in _RUN:
        known = ", ".join([*SCHEMES, *_RUN])
        raise UsageError(f"{name}: is no way to open a shard", where=url, fix=f"a path, or one of {known}")


def _classes_beside(url: str) -> list[str]:
    """The names in classes.json, where one lies with local shards."""
    if scheme(url):
        return []
    for directory in local_path(url).absolute().parents[:2]:
        try:
            found = json.loads((directory / "classes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
    return []
