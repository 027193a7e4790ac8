"""Which class each ImageNet validation image has: the devkit's ground truth, and the one table of MATLAB's it needs.

The ground truth counts classes by ILSVRC2012_ID; `meta.mat` says which WordNet id (wnid) that is. Of MATLAB's format
only what this table is made of is read: structs, text and numbers, compressed or not.

Source: "MAT-File Format", The MathWorks (version 5); ILSVRC2012_devkit_t12/readme.txt, section 4.
"""

from __future__ import annotations

import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitds.errors import DataError

_ARCHIVE, _FOLDER = "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12"
_TRUTH, _SYNSETS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_WNIDS = "imagenet_2012_validation_synset_labels.txt"  # TensorFlow's: the same as one wnid a line
WNID = re.compile(r"n\d{8}")

_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_NUMBERS |= {16: "u1", 17: "<u2"}  # text as UTF-8 and UTF-16
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _TEXT = 2, 4  # array classes


def validation_wnids(directory: Path) -> tuple[list[str], list[str]]:
    """The wnid of each validation image, by its number less one, and all wnids that there are, sorted.

    Looks in a directory for the devkit, packed or not, or for its two files; or for a list of wnids.
    Raises: DataError when nothing is there, or it is damaged.
    """
    if (directory / _WNIDS).is_file():
        wnids = (directory / _WNIDS).read_text().split()
        if not all(map(WNID.fullmatch, wnids)):
            raise DataError("expected a wnid a line, like n01440764", where=str(directory / _WNIDS))
        return wnids, sorted(set(wnids))
    where, truth, synsets = _devkit(directory)
    try:
        wnid_of = leaf_synsets(synsets)
    except (ValueError, LookupError, TypeError, StopIteration, struct.error, zlib.error) as error:
        raise DataError(f"{_SYNSETS} cannot be read: {error}", where=str(where)) from None
    ids = truth.split()
    numbers = [int(text) if re.fullmatch(rb"\d{1,9}", text) else 0 for text in ids]
    wrong = [line for line, number in enumerate(numbers, 1) if number not in wnid_of]
    if wrong or not ids:
        place = f"line {wrong[0]} of {_TRUTH}" if wrong else f"{_TRUTH} is empty, it"
        raise DataError(f"{place} names no class of {_SYNSETS}", where=str(where))
    return [wnid_of[number] for number in numbers], sorted(wnid_of.values())


def _devkit(directory: Path) -> tuple[Path, bytes, bytes]:
    """Where the devkit is, its ground truth, and its meta.mat."""
    for folder in (directory / _FOLDER / "data", directory / "data", directory):
        if (folder / _TRUTH).is_file():
            if not (folder / _SYNSETS).is_file():
                raise DataError(
                    f"the numbers in {_TRUTH} mean nothing without the devkit's {_SYNSETS}",
                    where=str(folder),
                    fix=f"put {_SYNSETS} beside it, or {_ARCHIVE} as it was downloaded",
                )
            return folder, (folder / _TRUTH).read_bytes(), (folder / _SYNSETS).read_bytes()
    archive = directory / _ARCHIVE
    if not archive.is_file():
        raise DataError(
            "the validation archive holds no labels, and the devkit that does is not beside it",
            where=str(directory),
            fix=f"put {_ARCHIVE} there (or its folder {_FOLDER}), or pass --split train",
        )
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.size < 0:  # tarfile would come back here for ever
                    raise tarfile.ReadError(f"damaged size at byte {member.offset}")
                if name in (_TRUTH, _SYNSETS) and member.isfile():
                    stream = tar.extractfile(member)
                    found[name] = stream.read() if stream else b""
        return archive, found[_TRUTH], found[_SYNSETS]
    except KeyError as error:
        raise DataError(f"holds no {error.args[0]}", where=str(archive)) from None
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(archive), fix="download it again") from None


def leaf_synsets(mat: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of every class that has images, out of meta.mat.

    Raises: nearly anything that parsing can, when the table is another, or damaged.
    """
    if mat[126:128] != b"IM":
        raise ValueError("no MATLAB file of version 5 (little-endian)")
    for kind, payload in _elements(mat[128:]):
        if kind == _COMPRESSED:
            kind, payload = next(_elements(zlib.decompress(payload)))
        name, rows = _matrix(payload) if kind == _MATRIX else ("", [])
        if name == "synsets":
            return {int(row["ILSVRC2012_ID"]): row["WNID"] for row in rows if not int(row["num_children"])}
    raise ValueError("no variable synsets")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The data elements: type, content."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, place)
        if kind >> 16:  # a small one: type and size in two bytes each, content in the four behind
            kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        else:
            start = place + 8
            end = start + size + (-size % 8 if kind != _COMPRESSED else 0)
        if start + size > len(data):
            raise ValueError("cut off")
        yield kind, data[start : start + size]
        place = end


def _matrix(payload: bytes) -> tuple[str, Any]:
    """Name and value of an array: a list of rows for a struct, a string for text, a number, or several of them."""
    elements = _elements(payload)
    flags, shape, name = (next(elements, (0, b""))[1] for _ in range(3))
    text = name.decode("ascii")
    if flags[0] == _STRUCT:
        length = int.from_bytes(next(elements)[1], "little")
        names = next(elements)[1]
        columns = [names[i : i + length].split(b"\0")[0].decode("ascii") for i in range(0, len(names), length)]
        num_rows = int(np.frombuffer(shape, "<i4").prod())
        return text, [{column: _matrix(next(elements)[1])[1] for column in columns} for _ in range(num_rows)]
    if flags[0] > 15 or flags[0] in (1, 3, 5):  # cells, objects, sparse: such a column is not ours
        return text, None
    kind, content = next(elements, (2, b""))
    numbers = np.frombuffer(content, _NUMBERS[kind])
    if flags[0] == _TEXT:
        return text, "".join(map(chr, numbers.tolist()))
    return text, numbers[0] if len(numbers) == 1 else numbers
