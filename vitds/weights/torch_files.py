"""The arrays of .safetensors and PyTorch files, each read when it is looked up."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitds.errors import WeightError, first_line
from vitds.layouts.files import read_safetensors_header
from vitds.layouts.torch_pickle import without_absent_checksum
from vitds.weights.lazy import LazyArrays
from vitds.weights.stored import StoredTensor
from vitds.weights_header import WeightsHeader

_READ_BYTES = 1 << 20


def open_arrays(header: WeightsHeader) -> LazyArrays:
    """Every array that the header names, by its key in the file; 16 bits become float32, which holds every one of them.

    Raises: WeightError, also at a lookup, when a file is damaged or holds more than tensors and plain containers.
    """
    wanted = {array.key for array in header.arrays}
    found: dict[str, Any] = {}
    for path in header.files:
        is_safe = header.format == "safetensors"
        arrays = _safetensors(path) if is_safe else _torch_tensors(path, header.section)
        found |= {key: partial(_read, path, key, array) for key, array in arrays.items() if key in wanted}
    return LazyArrays(found)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    _, entries = read_safetensors_header(path)
    found = {}
    for key, entry in entries.items():
        strides = tuple(int(np.prod(entry.shape[axis + 1 :])) for axis in range(len(entry.shape)))
        found[key] = StoredTensor(path, entry.dtype, entry.shape, strides, entry.start)
    return found


def _torch_tensors(path: Path, section: tuple[str, ...]) -> Mapping[str, Any]:
    """The state dict of a PyTorch file, mapped into memory where its format allows it (since torch 1.6).

    `read_header` has read the pickle with nothing but stand-ins before; here torch's own restricted unpickler reads it.
    """
    import torch  # no other kind of weights needs it to be read

    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _compare_checksums(path)
        if path.suffix == ".safetensors":  # torch.load believes the name
            with open(path, "rb") as stream:
                tree = torch.load(stream, map_location="cpu", weights_only=True)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        for key in section:
            tree = tree[key]
        return tree
    except WeightError:
        raise
    except Exception as error:  # of many kinds, and none of them means that the file is whole
        raise WeightError(f"cannot be read: {first_line(error)}", where=str(path)) from None


def _compare_checksums(path: Path) -> None:
    """torch.load compares none. Raises: WeightError that names the member which is not what was written."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            try:
                with archive.open(without_absent_checksum(member)) as stream:
                    while stream.read(_READ_BYTES):
                        pass
            except (zipfile.BadZipFile, EOFError) as error:
                raise WeightError(f"damaged: {error or member.filename}", where=str(path)) from None


def _read(path: Path, key: str, array: Any) -> np.ndarray:
    try:
        return array.read() if isinstance(array, StoredTensor) else array.detach().float().numpy()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise WeightError(f"{key} cannot be read: {error}", where=str(path)) from None
