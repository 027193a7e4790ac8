"""One published weights file over HTTP: resumed where it broke off, and under its name only once it is whole and right.

Bytes go to NAME.npz.part. It stays when anything fails, and the next call goes on from there. The finished file is
checked (size, CRC-32 of every array, architecture and head) before it gets its name.
"""

from __future__ import annotations

import fcntl
import re
import time
import zipfile
import zlib
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vitds.durable import fsync
from vitds.errors import UsageError, WeightError
from vitds.published_weights import PublishedWeights
from vitds.weights_header import read_header

_CHUNK_BYTES = 1024 * 1024
_TIMEOUT_S = 30
_NUM_TRIES = 3  # connections in a row that bring nothing new, once one has brought something
_PAUSE_S = 1.0

OnProgress = Callable[[int, int | None], None]  # bytes so far, and of the whole file where the server says it
OnNote = Callable[[str], None]


class _BrokenOff(Exception):
    """The connection failed in a way that another one may mend."""


def fetch(weights: PublishedWeights, directory: Path, base: str, on_progress: OnProgress, on_note: OnNote) -> Path:
    """Bring a published file into `directory` from the server at `base`, and say where it lies.

    Raises: UsageError when its name is taken; WeightError when it cannot be had, written, or is not what it should be.
    """
    target = directory / weights.file_name
    part = target.with_name(target.name + ".part")
    if target.exists():
        try:
            check(weights, target)
        except WeightError as error:
            what = f"exists, and is not {weights.name}: {error.what}"
            raise UsageError(what, where=str(target), fix="name another OUT_DIR") from None
        on_note(f"{target} is there already, and whole")
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_resumed = lock.tell() > 0
            try:
                _complete(weights, base, part, on_progress, on_note)
                try:
                    check(weights, part)
                except WeightError as error:
                    if not is_resumed:
                        raise
                    on_note(f"{part} {error.what}: starting over")
                    lock.truncate(0)
                    _complete(weights, base, part, on_progress, on_note)
                    check(weights, part)
                fsync(part)
                part.rename(target)
            finally:
                if part.exists() and not part.stat().st_size:
                    part.unlink()
        fsync(directory)
    except BlockingIOError:
        raise WeightError("another process is fetching this file", where=str(part)) from None
    except OSError as error:
        raise WeightError(f"cannot be written: {error.strerror}", where=str(part), fix=_kept(part)) from None
    return target


def check(weights: PublishedWeights, path: Path) -> None:
    """Make sure that a file is whole and is the published one, as far as that is known.

    Raises: WeightError when its size, a CRC-32, its architecture, image size, classes or pre_logits are others.
    """
    _check_size(weights, path.stat().st_size, str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise WeightError(f"is damaged: {error}", where=str(path)) from None
    if damaged:
        raise WeightError(f"is damaged: the CRC-32 of {damaged} is wrong", where=str(path))
    header = read_header(path)
    found = (header.spec.name, header.image_size[0], header.num_classes, header.pre_logits)
    expected = (weights.model, weights.image_size, weights.num_classes, weights.pre_logits)
    if found != expected:
        raise WeightError(f"holds {_described(*found)}, not {_described(*expected)}", where=str(path))


def _described(model: str, image_size: int, num_classes: int, pre_logits: int | None) -> str:
    return f"{model} at {image_size} px with {num_classes} classes and {pre_logits or 'no'} pre_logits"


def _check_size(weights: PublishedWeights, size: int, where: str) -> None:
    least, most = weights.size_range
    if not least <= size <= most:
        parameters = f"{weights.num_parameters:,} float32 parameters"
        raise WeightError(f"has {size:,} bytes, and {parameters} make {least:,} to {most:,}", where=where)


def _complete(weights: PublishedWeights, base: str, part: Path, on_progress: OnProgress, on_note: OnNote) -> None:
    """Connect as often as it takes for `part` to hold every byte that the server has.

    Raises: WeightError when a first connection brings nothing, or several in a row after one that did.
    """
    largest, tries = part.stat().st_size, 1
    while True:
        try:
            return _receive(weights, base, part, on_progress, on_note)
        except _BrokenOff as broken:
            size = part.stat().st_size
            largest, tries = max(largest, size), _NUM_TRIES if size > largest else tries - 1
            if not tries:
                raise WeightError(
                    f"cannot be fetched: {broken}",
                    where=weights.url(base),
                    fix=f"{_kept(part)}fetch it elsewhere (wget {weights.url()}), or from a mirror (--from URL)",
                ) from None
            on_note(f"broken off at {size:,} bytes ({broken}), going on")
            time.sleep(_PAUSE_S)


def _kept(part: Path) -> str:
    size = part.stat().st_size if part.exists() else 0
    return f"{size:,} bytes are kept in {part}: the same command goes on from there\n" if size else ""


def _receive(weights: PublishedWeights, base: str, part: Path, on_progress: OnProgress, on_note: OnNote) -> None:
    """One connection: append what `part` lacks, or write it anew where the server does not continue.

    Raises: _BrokenOff when bytes are missing at its end; WeightError for an answer that is not the file.
    """
    have, url = part.stat().st_size, weights.url(base)
    response, done, total = _connect(url, have)
    if response is None:
        return
    with response, part.open("r+b") as stream:
        if done < have:
            on_note(f"the server does not continue at {have:,} bytes: starting over")
        first = _read(response)
        if not done and first and not first.startswith(b"PK"):
            start = first[:40].decode("ascii", "replace").strip().split("\n")[0]
            raise WeightError(f'the server sends no .npz, but what begins with "{start}"', where=url)
        if total is not None:
            _check_size(weights, total, url)
        stream.seek(done)
        stream.truncate()
        chunk = first
        while chunk:
            stream.write(chunk)
            done += len(chunk)
            on_progress(done, total)
            chunk = _read(response)
    if total is not None and done < total:
        raise _BrokenOff("the connection was closed")


def _connect(url: str, have: int) -> tuple[HTTPResponse | None, int, int | None]:
    """Ask for the file from byte `have` on: the answer, the byte that it starts at, and the size of the whole file.

    The answer is None when nothing follows what is there already. A server that does not honour the range starts at 0.
    """
    headers = {"User-Agent": "vitds", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=_TIMEOUT_S)
    except HTTPError as error:
        with error:
            if error.code == 416 and have:
                is_whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
                return (None, have, have) if is_whole else _connect(url, 0)
            answer = f"the server answers {error.code} {error.reason}"
            if error.code in (408, 429) or error.code >= 500:
                raise _BrokenOff(answer) from None
            raise WeightError(answer, where=url, fix="a mirror needs the same folders: --from URL") from None
    except (OSError, HTTPException) as error:
        raise _BrokenOff(_reason(error)) from None
    if response.status == 206:
        answered = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if answered and int(answered[1]) == have:
            return response, have, None if answered[2] == "*" else int(answered[2])
        response.close()
        if not have:
            raise WeightError("the server sends a part where the whole was asked for", where=url)
        return _connect(url, 0)
    length = response.headers.get("Content-Length")
    return response, 0, int(length) if length else None


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise _BrokenOff(_reason(error)) from None


def _reason(error: Exception) -> str:
    """What went wrong with a connection, in the system's words."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
