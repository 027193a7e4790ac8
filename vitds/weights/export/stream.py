"""Files of arrays written one array after the other, so that no more than one is in memory. No torch."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitds.errors import WeightError
from vitds.layouts.array import ForeignArray
from vitds.weights.convert import from_parameter

OnBytes = Callable[[int], None]  # called with the number of bytes that were just written


def num_bytes(shape: Sequence[int]) -> int:
    """Bytes of a float32 array."""
    return 4 * math.prod(shape)


def converted(
    arrays: Mapping[str, np.ndarray], layout: Sequence[ForeignArray]
) -> Iterator[tuple[ForeignArray, np.ndarray]]:
    """Every entry of a layout with its array, float32 and in C order, one at a time."""
    name, parameter = None, np.empty(0)
    for entry in layout:
        if entry.name != name:  # query, key and value come from one parameter
            name, parameter = entry.name, arrays[entry.name]
        yield entry, np.ascontiguousarray(from_parameter(parameter, entry), "<f4")


def write_safetensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    layout: Sequence[ForeignArray],
    metadata: Mapping[str, str],
    on_bytes: OnBytes,
) -> None:
    """Write a .safetensors file; the library's own writer wants all arrays at once.

    Source: https://huggingface.co/docs/safetensors, the format: length (8 bytes), JSON header, data without gaps.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in layout:
        start, end = end, end + num_bytes(entry.shape)
        header[entry.key] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in converted(arrays, layout):
            stream.write(array.data)
            on_bytes(array.nbytes)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], layout: Sequence[ForeignArray], on_bytes: OnBytes) -> None:
    """Write an .npz as numpy.savez does, uncompressed, in the layout's order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, array in converted(arrays, layout):
            with archive.open(f"{entry.key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
            on_bytes(array.nbytes)


def check_held(path: Path, held: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises: WeightError when the bytes by name that a file was found to hold are not those of arrays so shaped."""
    wrong = [f"{name}: {held.get(name, 0)} bytes" for name in shapes if held.get(name) != num_bytes(shapes[name])]
    if wrong:
        raise WeightError("differs from what was written", where=str(path), fix="\n".join(wrong[:8]))
