"""The arrays of an .npz as tensors."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitds.errors import WeightError


def load_npz(path: str | Path) -> dict[str, Tensor]:
    """Every array of an .npz, without unpickling anything; `read_header` has checked names, shapes and types before.

    Raises: WeightError when an array is damaged, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        KeyError,
        EOFError,
        OSError,
        AttributeError,
        TypeError,
    ) as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None
