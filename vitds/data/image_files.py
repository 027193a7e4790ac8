"""Files that are named like images: their suffixes, the walk through a tree of them, and how one is opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def files_below(
    root: str | Path,
    on_error: Callable[[OSError], None] | None = None,
    on_loop: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Paths of all visible files below a directory, in sorted order; links are followed.

    `on_error` is told of a folder that cannot be listed, `on_loop` of a link to a folder that it lies in, which is not
    entered again.
    """
    top = Path(os.path.abspath(root))
    above = {str(root): frozenset(map(_identity, (top, *top.parents)))}  # each folder to come: it and those it lies in
    for directory, folders, files in os.walk(str(root), onerror=on_error, followlinks=True):
        ancestors = above.pop(directory)
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = os.path.join(directory, name)
            identity = _identity(path)
            if identity is None or identity not in ancestors:
                entered.append(name)
                above[path] = ancestors | {identity}
            elif on_loop:
                on_loop(path)
        folders[:] = entered
        yield from (f"{directory}/{name}" for name in sorted(files) if not name.startswith("."))


def shown(path: str | Path) -> str:
    """A path as text that can be written anywhere, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_file(path: str | Path) -> int:
    """A descriptor to read a file by. A pipe is not waited for, nor a device read.

    Raises: OSError when it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file", str(path))


def _identity(directory: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(directory)
    except OSError:  # it is named when it is listed
        return None
    return status.st_dev, status.st_ino
