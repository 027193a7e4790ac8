"""One published weights file over HTTP: resumed where it broke off, and under its name only once it is whole and right.

Bytes go to NAME.npz.part. It stays when anything fails, and the next call goes on from there. The finished file is
checked (size, CRC-32 of every array, architecture and head) before it gets its name.
"""

from __future__ import annotations

import fcntl
import zipfile
import zlib
from pathlib import Path

from vitds import transport
from vitds.durable import fsync
from vitds.errors import UsageError, WeightError
from vitds.published_weights import PublishedWeights
from vitds.transport import Answer, BrokenOff, OnNote, OnProgress, Patience, Refused, Url
from vitds.weights_header import read_header

_PATIENCE = Patience(num_tries=3, num_first_tries=1, pause_s=1.0, longest_pause_s=1.0)


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
    url = Url(weights.url(base))

    def check_answer(answer: Answer, first: bytes) -> None:
        if not answer.start and first and not first.startswith(b"PK"):
            start = first[:40].decode("ascii", "replace").strip().split("\n")[0]
            raise WeightError(f'the server sends no .npz, but what begins with "{start}"', where=url)
        if answer.size is not None:
            _check_size(weights, answer.size, url)

    try:
        with part.open("r+b", buffering=0) as file:
            transport.fetch(url, file, _PATIENCE, on_answer=check_answer, on_progress=on_progress, on_note=on_note)
    except Refused as refused:
        raise WeightError(str(refused), where=url, fix="a mirror needs the same folders: --from URL") from None
    except BrokenOff as broken:
        raise WeightError(
            f"cannot be fetched: {broken}",
            where=url,
            fix=f"{_kept(part)}fetch it elsewhere (wget {weights.url()}), or from a mirror (--from URL)",
        ) from None


def _kept(part: Path) -> str:
    size = part.stat().st_size if part.exists() else 0
    return f"{size:,} bytes are kept in {part}: the same command goes on from there\n" if size else ""
