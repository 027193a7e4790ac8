"""The arrays of an .npz, each read when it is looked up. No torch."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from vitds.errors import WeightError
from vitds.layouts.npz_archive import DAMAGE, read_npy_header
from vitds.weights.lazy import LazyArrays


def load_npz(path: str | Path) -> LazyArrays:
    """Every array of an .npz, without unpickling anything; `read_header` has checked names, shapes and types before.

    A bfloat16 array is widened to float32, which holds each of its values.

    Raises: WeightError, also at a lookup, when an array is damaged, or holds objects.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (*DAMAGE, OSError) as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None
    return LazyArrays({name.removesuffix(".npy"): partial(_read, archive, name) for name in archive.namelist()})


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    what = name.removesuffix(".npy")
    try:
        with archive.open(name) as stream:
            header = read_npy_header(stream)
            what += f", expected {header},"
            if header.dtype.hasobject:
                raise ValueError("pickled Python objects are never loaded")
            # To the very end, where the checksum is compared; the copy may be written to.
            values = np.frombuffer(bytearray(stream.read()), header.dtype)
        array = values.reshape(header.shape, order="F" if header.is_fortran else "C")
    except (*DAMAGE, OSError) as error:
        fix = "damaged: fetch the file again"
        raise WeightError(f"{what} cannot be read: {error}", where=str(archive.filename), fix=fix) from None
    if header.kind == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array
