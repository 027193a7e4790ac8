"""Files that are named like images: their suffixes, and the walk through a tree of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def files_below(root: str | Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Paths of all visible files below a directory, in sorted order; `on_error` is told of a folder that cannot be
    listed.
    """
    for directory, folders, files in os.walk(str(root), onerror=on_error, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (f"{directory}/{name}" for name in sorted(files) if not name.startswith("."))
