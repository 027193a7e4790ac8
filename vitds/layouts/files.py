"""Names, shapes and types of the arrays in a weights file, by its headers alone: nothing is loaded, nothing is run."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitds.errors import WeightError
from vitds.layouts.npz_archive import DAMAGE, read_npz_headers, where_it_ends
from vitds.layouts.torch_pickle import LEGACY_MAGIC, is_torch_archive, read_torch_file

FileFormat = Literal["npz", "safetensors", "torch"]
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library
_SAFETENSORS_TYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U64": ("uint64", 8), "U32": ("uint32", 4),
    "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
# What downloads leave in the place of weights, by its first bytes.
_TAKEN_FOR_WEIGHTS = {
    b"version https": "a pointer of Git LFS, not the file that it points to (git lfs pull)",
    b"<!DOCTYPE": "a web page, not a file of weights",
    b"<!doctype": "a web page, not a file of weights",
    b"<html": "a web page, not a file of weights",
}

# A protobuf of ONNX begins with ir_version, a small number, and the tag of one of the fields after it.
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")


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
        if path.exists() and not path.is_file():  # a pipe or a device has no end
            raise WeightError("is no file", where=str(path))
        with open(path, "rb") as stream:
            start = stream.read(len(LEGACY_MAGIC))
        is_zip = zipfile.is_zipfile(path)
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except zipfile.BadZipFile as error:  # of a damaged end record, although nothing is opened yet
        raise WeightError(f"no .npz or .pth, or a damaged one: {error}", where=str(path)) from None
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start == LEGACY_MAGIC:
        return _read_torch(path)
    if is_zip:
        try:
            with zipfile.ZipFile(path) as archive:
                is_torch, is_program = is_torch_archive(archive), _is_program(archive)
        except (*DAMAGE, OSError) as error:
            raise WeightError(f"no .npz or .pth, or a damaged one: {error}", where=str(path)) from None
        if is_program:
            raise _for_others("a program of torch.export", path)
        return _read_torch(path) if is_torch else _read_npz(path)
    if start[:2] == b"PK":
        what = "no .npz or .pth, or a truncated one: the end of the archive is not there"
        raise WeightError(what, where=str(path), fix=where_it_ends(path))
    if start[:1] == b"\x80":
        raise WeightError("a pickle that torch.save did not write: never loaded", where=str(path))
    if _ONNX.match(start):
        raise _for_others("an ONNX graph", path)
    for beginning, what in _TAKEN_FOR_WEIGHTS.items():
        if start.startswith(beginning):
            raise WeightError(what, where=str(path), fix="fetch the file itself")
    raise WeightError("no .npz, .safetensors or PyTorch file, or a truncated one", where=str(path))


def _is_program(archive: zipfile.ZipFile) -> bool:
    """True for what torch.export.save wrote (.pt2), its weights beside the graph or in it."""
    names = {name.partition("/")[2] for name in archive.namelist()}
    return "archive_format" in names or "serialized_exported_program.json" in archive.namelist()


def _for_others(what: str, path: Path) -> WeightError:
    return WeightError(
        f"{what}, for other software to run: vitds does not read it back",
        where=str(path),
        fix="give the weights that it was exported from: a run, a checkpoint, .npz, .safetensors, .pth",
    )


def _read_torch(path: Path) -> ArrayFile:
    file = read_torch_file(path)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in file.tensors.items()}
    return ArrayFile("torch", shapes, dtypes, {}, file.section, file.notes)


def _read_npz(path: Path) -> ArrayFile:
    headers = read_npz_headers(path)
    shapes = {key: header.shape for key, header in headers.items()}
    dtypes = {key: header.kind for key, header in headers.items()}
    return ArrayFile("npz", shapes, dtypes, {})


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
        beyond = [(entry.stop, key) for key, entry in entries.items() if entry.stop > size_bytes - data]
        if beyond:
            _, key = min(beyond)
            what += f"; the first beyond its end is {key}, {entries[key].dtype} {entries[key].shape}"
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
