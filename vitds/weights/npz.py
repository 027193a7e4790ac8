"""The arrays of an .npz, each read when it is looked up. No torch."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from vitds.errors import WeightError
from vitds.weights.lazy import LazyArrays

_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, AttributeError, TypeError)


def load_npz(path: str | Path) -> LazyArrays:
    """Every array of an .npz, without unpickling anything; `read_header` has checked names, shapes and types before.

    Raises: WeightError, also at a lookup, when an array is damaged, or holds objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        return LazyArrays({key: partial(_read, archive, key, path) for key in archive.files})
    except _DAMAGE as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None


def _read(archive: np.lib.npyio.NpzFile, key: str, path: str | Path) -> np.ndarray:
    try:
        return archive[key]
    except _DAMAGE as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None
