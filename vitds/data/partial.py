"""The directory beside OUT that is written in: ours alone meanwhile, kept when a run ends before its time."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitds.errors import DataError

_LOCK_NAME = ".vitds-is-writing"
_LOCK_WAIT_S = 10.0  # workers of a killed run hold the lock until they notice


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """TARGET.partial, ours alone while we write. It is gone when all went well; else what is finished stays.

    Raises: DataError when another process is writing there, or the directory is not ours.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        with _locked(partial):
            finished = False
            try:
                _clear(partial, keep=(_LOCK_NAME, "work"))
                yield partial
                finished = True
            finally:
                keep_work = not finished and any((partial / "work").glob("records/*/*.json"))
                _clear(partial, keep=(_LOCK_NAME, "work") if keep_work else (_LOCK_NAME,))
                if not keep_work:  # the lock goes last: it is what says that the rest is ours to delete
                    (partial / _LOCK_NAME).unlink()
                    partial.rmdir()
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=str(error.filename or target)) from error


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        lock_path = partial / _LOCK_NAME
        if any(partial.iterdir()) and not lock_path.exists():
            raise DataError("is in the way and was not made by vitds", where=str(partial), fix="move it away")
        with open(lock_path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock_path.exists() and os.path.samestat(os.fstat(lock.fileno()), lock_path.stat()):
                    yield
                    return
            except BlockingIOError:
                time.sleep(0.2)
        if time.monotonic() > deadline_s:
            raise DataError("another process is writing this data set", where=str(partial))


def _clear(directory: Path, keep: tuple[str, ...]) -> None:
    for path in directory.iterdir():
        if path.name not in keep:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def clear_leftovers(out: Path) -> None:
    """Delete what a run left that was killed after its data set was complete."""
    partial = out.with_name(out.name + ".partial")
    if partial.is_dir() and ((partial / _LOCK_NAME).exists() or not any(partial.iterdir())):
        with partial_directory(out):
            pass
