"""Files that are on the disk when a call returns, and never half there."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Put a file of this text at `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # what could not be written is being raised
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A stream of which a file at `path` is made when all went well; without a byte written there is none.

    Nothing else is left behind, and what appeared at `path` meanwhile stays: FileExistsError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    with directories_for(path):
        stream = open(temporary, "xb")
        try:
            yield stream
            stream.flush()
            if stream.tell():
                os.fsync(stream.fileno())
                stream.close()
                put_in_place(temporary, path)
        finally:
            with suppress(OSError):  # what it could not write has been raised
                stream.close()
            temporary.unlink(missing_ok=True)


@contextmanager
def directories_for(path: Path) -> Iterator[None]:
    """Make the missing parents of `path`; those that this made are removed again if they are empty in the end."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            try:
                parent.mkdir()
                made.append(parent)
            except FileExistsError:
                if not parent.is_dir():  # else somebody made it meanwhile
                    raise
        yield
    finally:
        with suppress(OSError):  # something is in it
            for parent in reversed(made):
                parent.rmdir()


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file or directory the name that was meant for it.

    Raises: FileExistsError when something has that name.
    """
    if temporary.is_file():
        try:
            os.link(temporary, path)
            temporary.unlink()
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            pass
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary.rename(path)
