"""Names, shapes and types of the arrays in a weights file, by its headers alone: nothing is loaded, nothing is run."""

from __future__ import annotations

import io
import json
import lzma
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitds.errors import WeightError
from vitds.layouts.torch_pickle import LEGACY_MAGIC, is_torch_archive, read_torch_file

FileFormat = Literal["npz", "safetensors", "torch"]
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library
_NPY_HEADER_LIMIT = 10_000  # bytes, numpy's own limit
_BOMB_RATIO = 100  # an original 21k head is all zero, the rest of a file is not
_BOMB_FLOOR = 64 * 2**20  # bytes, that never hurt
_SAFETENSORS_TYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U64": ("uint64", 8), "U32": ("uint32", 4),
    "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip


@dataclass(frozen=True)
class ArrayFile:
    """What the headers of one file say: shapes and types by key; the type of pickled Python objects is "object".

    `section` is the way to the state dict in a PyTorch file that holds more; `notes` are lines for the user.
    """

    format: FileFormat
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    section: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_array_file(path: Path) -> ArrayFile:
    """Read the headers of an .npz, a .safetensors or a PyTorch file; its content says which it is, not its name.

    Raises: WeightError when it is none of them, or is damaged.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(LEGACY_MAGIC))
        is_zip = zipfile.is_zipfile(path)
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start == LEGACY_MAGIC:
        return _read_torch(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            return _read_torch(path) if is_torch_archive(archive) else _read_npz(path)
    if start[:2] == b"PK":
        raise WeightError("no .npz or .pth, or a truncated one: the end of the archive is not there", where=str(path))
    if start[:1] == b"\x80":
        raise WeightError("a pickle that torch.save did not write: never loaded", where=str(path))
    raise WeightError("no .npz, .safetensors or PyTorch file, or a truncated one", where=str(path))


def _read_torch(path: Path) -> ArrayFile:
    file = read_torch_file(path)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in file.tensors.items()}
    return ArrayFile("torch", shapes, dtypes, {}, file.section, file.notes)


def _read_npz(path: Path) -> ArrayFile:
    """Shapes and types of an .npz; of every member no more than its header is decompressed."""
    from numpy.lib import format as npy  # most starts have no .npz to read

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes, dtypes = {}, {}
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for name, member in ((member.filename, member) for member in members):
                with archive.open(member) as stream:
                    start = io.BytesIO(stream.read(_NPY_HEADER_LIMIT))
                shape, _, dtype = readers[npy.read_magic(start)](start)
                key, num_bytes = name.removesuffix(".npy"), start.tell() + math.prod(shape) * dtype.itemsize
                if key in shapes:
                    raise ValueError("it is there twice")
                if not dtype.hasobject and member.file_size != num_bytes:
                    raise ValueError(f"{dtype} {shape} takes {num_bytes:,} bytes, it claims {member.file_size:,}")
                shapes[key] = shape
                dtypes[key] = "bfloat16" if dtype.str == "|V2" else "object" if dtype.hasobject else str(dtype)
    except zipfile.BadZipFile as error:
        raise WeightError(f"no .npz, or a truncated one: {error}", where=str(path)) from None
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        raise WeightError(f'member "{name}" is no .npy array: {error}', where=str(path)) from None
    _refuse_bomb(path, members)
    return ArrayFile("npz", shapes, dtypes, {})


def _refuse_bomb(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Weights hardly compress, so a small file that claims gigabytes is none."""
    size_bytes, claimed = path.stat().st_size, sum(member.file_size for member in members)
    stored = sum(member.compress_size for member in members)
    if stored > size_bytes or claimed > max(_BOMB_RATIO * size_bytes, _BOMB_FLOOR):
        largest = max(members, key=lambda member: member.file_size)
        raise WeightError(
            f"claims {claimed:,} bytes of arrays in a file of {size_bytes:,}",
            where=str(path),
            fix=f'most in "{largest.filename}": {largest.file_size:,} bytes. Nothing was unpacked',
        )


def _read_safetensors(path: Path) -> ArrayFile:
    metadata, entries = read_safetensors_header(path)
    shapes = {key: entry.shape for key, entry in entries.items()}
    dtypes = {key: entry.dtype for key, entry in entries.items()}
    return ArrayFile("safetensors", shapes, dtypes, metadata)


class SafetensorsEntry(NamedTuple):
    """One array of a .safetensors file. Units: bytes from the start of the data, then of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, SafetensorsEntry]]:
    """The metadata of a .safetensors file and its arrays, with their bytes counted from the start of the file.

    Raises: WeightError when the header contradicts itself or the size of the file.
    Source: https://huggingface.co/docs/safetensors, the format: length (8 bytes), JSON header, data without gaps.
    """
    size_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size_bytes - 8, _SAFETENSORS_HEADER_LIMIT):
            raise WeightError(f"its header claims {length} bytes, the file has {size_bytes}", where=str(path))
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
            metadata = dict(header.pop("__metadata__", {}))
            entries = {key: _safetensors_entry(key, entry) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise WeightError(f"its header is no safetensors header: {reason}", where=str(path)) from None
    data, end = 8 + length, 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            what = f"{key} claims bytes {entry.start} to {entry.stop} of the data, expected its start at {end}"
            raise WeightError(what, where=str(path), fix="a gap or an overlap")
        end = entry.stop
    if end != size_bytes - data:
        what = f"its arrays claim {end} bytes of data, the file has {size_bytes - data}"
        raise WeightError(what, where=str(path), fix="truncated, or damaged: fetch it again")
    return metadata, {
        key: entry._replace(start=data + entry.start, stop=data + entry.stop) for key, entry in entries.items()
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(key for key in keys if keys.count(key) > 1)}" appears twice')
    return found


def _safetensors_entry(key: str, entry: dict[str, Any]) -> SafetensorsEntry:
    """What the header says of one array; raises: ValueError when it contradicts itself."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{key} has shape {list(shape)} at bytes {start} to {stop}")
    if entry["dtype"] not in _SAFETENSORS_TYPES:
        raise ValueError(f'{key} has the unknown type "{entry["dtype"]}"')
    dtype, item_bytes = _SAFETENSORS_TYPES[entry["dtype"]]
    if stop - start != math.prod(shape) * item_bytes:
        expected = math.prod(shape) * item_bytes
        raise ValueError(f"{key} is {dtype} {shape}, expected {expected} bytes, and claims {stop - start}")
    return SafetensorsEntry(dtype, shape, start, stop)
