"""The arrays of an .npz, each read when it is looked up. No torch."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from vitds.errors import WeightError
from vitds.weights.lazy import LazyArrays

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
)
_BFLOAT16 = np.dtype("V2")  # numpy has no such type and reads two bytes of anything


def load_npz(path: str | Path) -> LazyArrays:
    """Every array of an .npz, without unpickling anything; `read_header` has checked names, shapes and types before.

    A bfloat16 array is widened to float32, which holds each of its values.

    Raises: WeightError, also at a lookup, when an array is damaged, or holds objects.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None
    return LazyArrays({name.removesuffix(".npy"): partial(_read, archive, name) for name in archive.namelist()})


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(name) as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # the checksum is compared at the end, and not before it
                raise ValueError("more bytes than its shape takes")
    except _DAMAGE as error:
        reason = f"{name.removesuffix('.npy')} cannot be read: {error}"
        raise WeightError(reason, where=str(archive.filename), fix="fetch the file again") from None
    return (
        (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        if array.dtype == _BFLOAT16
        else array
    )
