"""Tensors of a PyTorch file that stay on the disk until they are read, one by one. No torch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitds.errors import WeightError
from vitds.layouts.torch_pickle import Tensor, read_torch_zip

_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and its extra field
_NUM_NODES_LIMIT = 3_000_000  # a short pickle may name one list twice, that in another twice, and so on


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, its shape, and where its values lie.

    Units: strides in values, start_byte from the file's start.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start_byte: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def run(self, start: int, numel: int) -> StoredTensor:
        """`numel` values of a vector, from `start` on."""
        return replace(self, shape=(numel,), start_byte=self.start_byte + start * _kind(self.dtype).itemsize)

    def read(self) -> np.ndarray:
        """Its values; 16 bits become float32, which holds every one of them.

        Raises: OSError when the file cannot be read, ValueError when it ends before, or when its values overlap.
        """
        spread = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        count = spread if self.numel else 0
        if self.numel > count:
            raise ValueError(f"a tensor of {self.numel} values is said to lie in {count}")
        values = np.fromfile(self.path, _kind(self.dtype), count, offset=self.start_byte)
        if len(values) != count:
            raise ValueError(f"{self.path} ends {count - len(values)} values early")
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif self.dtype == "float16":
            values = values.astype(np.float32)
        strides = [stride * values.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, self.shape, strides))


def read_stored(path: Path, stand_ins: Mapping[str, Any]) -> Any:
    """The object that torch.save wrote, with a StoredTensor in the place of every tensor.

    Raises: WeightError when the file is damaged, or holds an object that is neither inert nor in `stand_ins`.
    """
    tree = read_torch_zip(path, stand_ins)
    try:
        starts = _first_bytes(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None

    num_nodes = 0

    def place(node: Any) -> Any:
        nonlocal num_nodes
        if (num_nodes := num_nodes + 1) > _NUM_NODES_LIMIT:
            raise WeightError("its pickle unfolds without end", where=str(path))
        match node:
            case Tensor():
                start_byte = starts[node.storage] + node.offset * _kind(node.dtype).itemsize
                return StoredTensor(path, node.dtype, node.shape, node.strides, start_byte)
            case dict():
                return {key: place(value) for key, value in node.items()}
            case list() | tuple():
                return type(node)(place(value) for value in node)
            case _:
                return node

    try:
        return place(tree)
    except RecursionError:
        raise WeightError("its pickle is nested without end", where=str(path)) from None


def _kind(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _first_bytes(path: Path) -> dict[str, int]:
    """Where each storage begins in the file, by its key."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
        for member in archive.infolist():
            folder, _, key = member.filename.rpartition("/")
            if folder.endswith("/data"):
                stream.seek(member.header_offset)
                header = stream.read(_LOCAL_HEADER_BYTES)
                name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                found[key] = member.header_offset + _LOCAL_HEADER_BYTES + name + extra
    return found
