"""Shards from a URL in a bounded directory on this machine, shared by the ranks and workers of a node.

A file lies there under a name made of its URL, beside NAME.json (URL, size, version). While it is fetched it is
NAME.part, which is also its lock: one process downloads, the others wait for it, and what a killed one left is
continued by the next. Room is made, under the directory's own lock, by removing the files that were used longest ago;
who has one of them open reads on, and nothing is removed that was not fetched here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from vitds import transport
from vitds.errors import DataError, DataUnavailable
from vitds.run_config import DataConfig
from vitds.transport import Answer, BrokenOff, Refused, Url, unavailable

_NAME = re.compile(r"[0-9a-f]{16}-[\w.-]+")
_POLL_S = 0.05  # while others' downloads fill the cache


@dataclass(frozen=True)
class _Fetched:
    """What is known of a file in the cache, complete or begun."""

    url: str
    size: int
    version: str
    is_second: bool = False  # fetched again, because the first copy's bytes were wrong


@dataclass(frozen=True)
class Cache:
    """A directory of fetched files that never has more than `max_bytes` in it."""

    directory: Path
    max_bytes: int

    def open(self, url: Url, at_least: int = 0, is_checked: bool = False) -> int:
        """A descriptor of the file at `url`, fetched if it is not here (or, when `is_checked`, not here as it is now).

        What the descriptor reads stays, whatever becomes of the name.

        Raises: DataUnavailable when it cannot be had, or has fewer bytes than `at_least`.
        """
        path = self._path(url)
        if not is_checked:
            with self._on_disk(), suppress(FileNotFoundError):
                return used(os.open(path, os.O_RDONLY))
        with self._on_disk(), self._to_be_filled(path) as part:
            if is_checked and path.exists() and not self._is_at_server(url, path):
                path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                return used(os.open(path, os.O_RDONLY))
            return self._fetch(url, path, part, at_least)

    def renew(self, url: Url, descriptor: int, at_least: int = 0) -> bool:
        """Make sure that the bytes of an open file that were found wrong are not this cache's fault.

        False when they are what the server has: when this very version was fetched twice already.

        Raises: DataUnavailable when it cannot be had again.
        """
        path = self._path(url)
        with self._on_disk(), self._to_be_filled(path) as part:
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
                return True  # somebody was faster
            known = _read_fetched(path)
            if known and known.is_second and self._is_at_server(url, path):
                return False
            path.unlink(missing_ok=True)
            os.close(self._fetch(url, path, part, at_least, is_second=True))
            return True

    def check_room(self, sizes: Sequence[int], num_together: int) -> None:
        """Make sure that so many of the shards, of these sizes in bytes, fit at a time, and one on its way.

        Raises: DataError.
        """
        needed = sum(sorted(sizes)[-(num_together + 1) :])
        if needed > self.max_bytes:
            what = f"{num_together} shards shuffled together" if num_together < len(sizes) else "all shards"
            raise DataError(
                f"the cache is too small: {what} are {_gib(needed)}, data.cache_gib is {_gib(self.max_bytes)}",
                where=str(self.directory),
                fix=f"--set data.cache_gib={needed / 2**30:.3g} or more, or a smaller data.shuffle_window",
            )
        with self._on_disk():
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free + sum(entry.on_disk for entry in self._entries())
        if needed > free:
            raise DataError(
                f"the disk of the cache has room for {_gib(free)}, {_gib(needed)} are needed",
                where=str(self.directory),
                fix="--set data.cache_dir=DIR on another disk, or a smaller data.shuffle_window",
            )

    def _path(self, url: Url) -> Path:
        """Where a file lies; whatever query, which may be a token of an hour, it is asked for with."""
        name = re.sub(r"[^\w.-]", "_", url.name)[-100:]
        return self.directory / f"{_digest(url.shown)}-{name}"

    def _is_at_server(self, url: Url, path: Path) -> bool:
        """Whether the server has what was fetched, as far as it names versions.

        Raises: DataUnavailable.
        """
        known = _read_fetched(path)
        if known is None or not known.version:
            return False
        with _explained(url), transport.connect_patiently(url, transport.PATIENT) as answer:
            return (answer.size, answer.version) == (known.size, known.version)

    @contextmanager
    def _to_be_filled(self, path: Path) -> Iterator[int]:
        """The locked NAME.part of a file, once nobody else has it; gone afterwards, if it came to nothing."""
        part = path.with_name(path.name + ".part")
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(part.stat(), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # who had it has finished, and it has its name
        try:
            yield descriptor
        finally:
            with suppress(FileNotFoundError):
                if not os.fstat(descriptor).st_size and os.path.samestat(part.stat(), os.fstat(descriptor)):
                    part.unlink()
            os.close(descriptor)

    def _fetch(self, url: Url, path: Path, part: int, at_least: int, is_second: bool = False) -> int:
        """Fill the locked part, give it its name and open it.

        Raises: DataUnavailable.
        """
        begun = _read_fetched(path)
        partial = path.with_name(path.name + ".part")

        def on_answer(answer: Answer, _: bytes) -> None:
            size = at_least if answer.size is None else answer.size
            if size < at_least:
                raise Refused(f"is truncated: {size:,} bytes, the index knows {at_least:,}")
            self._make_room(path, _Fetched(url.shown, size, answer.version, is_second))

        version = begun.version if begun else None
        if not version:  # nobody knows of what it is the beginning
            os.ftruncate(part, 0)
        with _explained(url), open(os.dup(part), "r+b", buffering=0) as file:
            transport.fetch(url, file, transport.PATIENT, version, at_least, on_answer)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            partial.rename(path)
            return descriptor

    def _make_room(self, path: Path, coming: _Fetched) -> None:
        """Note what is coming, once everything together is within the bound; waits while only downloads could go.

        Raises: DataUnavailable when it never could be.
        """
        if coming.size > self.max_bytes:
            raise DataUnavailable(
                f"the cache is too small for a shard of {_gib(coming.size)}: data.cache_gib is {_gib(self.max_bytes)}",
                where=str(self.directory),
                fix=f"--set data.cache_gib={coming.size / 2**30:.3g} or more",
            )
        while True:
            with self._locked():
                entries = self._entries()
                free = shutil.disk_usage(self.directory).free + sum(entry.on_disk for entry in entries)
                others = [entry for entry in entries if entry.path != path]
                excess = sum(entry.num_bytes for entry in others) + coming.size - min(self.max_bytes, free)
                is_filling = False
                for entry in sorted(others, key=lambda entry: entry.last_used):
                    if excess <= 0:
                        break
                    if _remove(entry):
                        excess -= entry.num_bytes
                    else:
                        is_filling = True
                if excess <= 0:
                    _sidecar(path).write_text(json.dumps(asdict(coming)))
                    return
                _sidecar(path).unlink(missing_ok=True)  # who waits holds no room, else two could wait for each other
            if not is_filling:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            time.sleep(_POLL_S)

    def _entries(self) -> list[_Entry]:
        """The files that were fetched here or are being fetched."""
        entries = []
        for sidecar in self.directory.glob("*.json"):
            path = sidecar.with_suffix("")
            fetched = _read_fetched(path)
            if fetched is None or not _NAME.fullmatch(path.name) or path.name[:16] != _digest(fetched.url):
                continue  # not ours
            part = path.with_name(path.name + ".part")
            for file in (path, part):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    num_bytes = fetched.size if file is part else status.st_size
                    entries.append(_Entry(path, file is part, num_bytes, status.st_size, status.st_mtime))
        return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Raises: DataUnavailable in place of what the disk says."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DataUnavailable(
                f"the cache cannot be used: {error.strerror}",
                where=str(self.directory),
                fix="--set data.cache_dir=DIR on another disk"
                + (", or a smaller data.cache_gib and data.shuffle_window" if is_full else ""),
            ) from None


class _Entry(NamedTuple):
    path: Path
    is_part: bool
    num_bytes: int  # of a part: what it will have
    on_disk: int
    last_used: float


def named_cache(cache_dir: str | None = None, cache_gib: float = DataConfig.cache_gib) -> Cache:
    """The cache that a configuration names; else `vitds` in the user's cache directory."""
    directory = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitds")
    return Cache(directory.expanduser().absolute(), int(cache_gib * 2**30))


@contextmanager
def _explained(url: Url) -> Iterator[None]:
    """Raises: DataUnavailable in place of what the transport says."""
    try:
        yield
    except (Refused, BrokenOff) as error:
        raise unavailable(url, error) from None


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_fetched(path: Path) -> _Fetched | None:
    try:
        return _Fetched(**json.loads(_sidecar(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def used(descriptor: int) -> int:
    """Note that a file was used now, for the choice of what goes when room is made."""
    with suppress(OSError):  # somebody else's file, or a read-only disk
        os.utime(descriptor)
    return descriptor


def _remove(entry: _Entry) -> bool:
    """Remove a file of the cache; a part only when nobody fills it."""
    if entry.is_part:
        part = entry.path.with_name(entry.path.name + ".part")
        try:
            with open(part, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
        except BlockingIOError:
            return False
        except FileNotFoundError:  # it has become whole in the meantime
            return False
    else:
        entry.path.unlink(missing_ok=True)
    if not entry.path.exists():
        _sidecar(entry.path).unlink(missing_ok=True)
    return True


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
