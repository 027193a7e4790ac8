"""Names, shapes and types of the arrays in a weights file, by its headers alone: nothing is loaded or unpickled."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitds.errors import WeightError

FileFormat = Literal["npz", "safetensors", "torch"]
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library


@dataclass(frozen=True)
class ArrayFile:
    """What the headers of one file say: shapes and types by key, and a line for each array that is never loaded."""

    format: FileFormat
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    refused: list[str]
    metadata: dict[str, str]


def read_array_file(path: Path) -> ArrayFile:
    """Read the headers of an .npz or a .safetensors file; its content says which it is, not its name.

    Raises: WeightError when it is neither, or is damaged.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if start[8:9] == b"{":
        return _read_safetensors(path)
    return _read_npz(path)


def _read_npz(path: Path) -> ArrayFile:
    from numpy.lib import format as npy  # most starts have no .npz to read

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes, dtypes = {}, {}
    refused = []
    member = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, _, dtype = readers[npy.read_magic(stream)](stream)
                shapes[key] = shape
                dtypes[key] = "bfloat16" if dtype.str == "|V2" else str(dtype)
                if dtype.hasobject:
                    refused.append(f"{key} holds pickled Python objects: never loaded")
                elif dtype != "float32":
                    refused.append(f"{key} is {dtypes[key]}: only float32 is read")
    except zipfile.BadZipFile as error:
        raise WeightError(f"no .npz, or a truncated one: {error}", where=str(path)) from None
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise WeightError(f'member "{member}" is no .npy array: {error}', where=str(path)) from None
    return ArrayFile("npz", shapes, dtypes, refused, {})


def _read_safetensors(path: Path) -> ArrayFile:
    """Source: https://huggingface.co/docs/safetensors, the format: length (8 bytes), JSON header, data."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size_bytes - 8, _SAFETENSORS_HEADER_LIMIT):
            raise WeightError(f"its header claims {length} bytes, the file has {size_bytes}", where=str(path))
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
            dtypes = {key: entry["dtype"] for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"its header is no safetensors header: {error}", where=str(path)) from None
    return ArrayFile("safetensors", shapes, dtypes, [], metadata)
