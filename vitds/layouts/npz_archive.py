"""The headers of an .npz, a zip of .npy members: believed only where archive, header and file size agree. No torch.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html; PKWARE's APPNOTE for the local header.
"""

from __future__ import annotations

import io
import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

from vitds.errors import WeightError

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    NotImplementedError,
)
"""What Python's zipfile and numpy raise on bytes that are no archive or no array; OSError beside."""

_HEADER_LIMIT = 10_000  # bytes, numpy's own limit
_BOMB_RATIO = 100  # an original 21k head is all zero, the rest of a file is not
_BOMB_FLOOR = 64 * 2**20  # bytes, that never hurt
_LOCAL_HEADER_BYTES = 30  # of a member, before its name and its extra field
_END_RECORD_BYTES = 22  # of the archive, before its comment
_TOLD_ELSEWHERE = 0xFFFF  # in the zip64 record, as some writers do above 4 GiB


class NpyHeader(NamedTuple):
    """What stands before the values of one array, and how many bytes it takes. `dtype` is numpy's."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: Any
    num_bytes: int

    @property
    def member_bytes(self) -> int:
        """Bytes of the header and the values."""
        return self.num_bytes + math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """The type in words; numpy knows no bfloat16 and stores two bytes of anything."""
        return "object" if self.dtype.hasobject else "bfloat16" if self.dtype.str == "|V2" else str(self.dtype)

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"


def read_npy_header(stream: IO[bytes]) -> NpyHeader:
    """Read up to the first value.

    Raises: ValueError when it is no .npy header, or a longer one than any array has.
    """
    from numpy.lib import format as npy  # most starts have no .npz to read

    version = npy.read_magic(stream)
    size, reader = {(1, 0): (2, npy.read_array_header_1_0), (2, 0): (4, npy.read_array_header_2_0)}[version]
    length = stream.read(size)
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > _HEADER_LIMIT:
        raise ValueError(f"its header claims {num_bytes:,} bytes")
    try:
        shape, is_fortran, dtype = reader(io.BytesIO(length + stream.read(num_bytes)))
    except (tokenize.TokenError, MemoryError) as error:  # numpy lets these pass
        raise ValueError(f"its header cannot be parsed: {error}") from None
    return NpyHeader(shape, is_fortran, dtype, npy.MAGIC_LEN + size + num_bytes)


def read_npz_headers(path: Path) -> dict[str, NpyHeader]:
    """The header of every array, by its key; nothing else is decompressed.

    Raises: WeightError when the file is no .npz, is damaged, or would unpack into far more than it holds.
    """
    headers: dict[str, NpyHeader] = {}
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (promised := _num_promised(path, archive)) not in (len(members), _TOLD_ELSEWHERE):
                raise zipfile.BadZipFile(f"it lists {len(members)} arrays and promises {promised}")
            for member in members:
                name = member.filename
                with archive.open(member) as stream:
                    header = read_npy_header(stream)
                key = name.removesuffix(".npy")
                if key in headers:
                    raise ValueError("it is there twice")
                if not header.dtype.hasobject and member.file_size != header.member_bytes:
                    raise ValueError(f"{header} takes {header.member_bytes:,} bytes, it claims {member.file_size:,}")
                headers[key] = header
    except OSError as error:
        raise WeightError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except DAMAGE as error:
        what = f'member "{name}" is no .npy array: {error}' if name else f"no .npz, or a truncated one: {error}"
        raise WeightError(what, where=str(path)) from None
    _refuse_bomb(path, headers, members)
    return headers


def _num_promised(path: Path, archive: zipfile.ZipFile) -> int:
    """The number of members that the archive's last record states: one wrong length in its list swallows others."""
    with open(path, "rb") as stream:
        stream.seek(-_END_RECORD_BYTES - len(archive.comment), io.SEEK_END)
        return int.from_bytes(stream.read(_END_RECORD_BYTES)[10:12], "little")


def _refuse_bomb(path: Path, headers: dict[str, NpyHeader], members: list[zipfile.ZipInfo]) -> None:
    """Weights hardly compress, so a small file that claims gigabytes is none."""
    size_bytes, claimed = path.stat().st_size, sum(member.file_size for member in members)
    stored = sum(member.compress_size for member in members)
    if stored > size_bytes or claimed > max(_BOMB_RATIO * size_bytes, _BOMB_FLOOR):
        largest = max(headers, key=lambda key: headers[key].member_bytes)
        raise WeightError(
            f"claims {claimed:,} bytes of arrays in a file of {size_bytes:,}",
            where=str(path),
            fix=f"most in {largest} {headers[largest]}, {headers[largest].member_bytes:,} bytes; nothing was unpacked",
        )


def where_it_ends(path: Path) -> str:
    """In which array a truncated .npz breaks off, in words; empty when even that is not to be read."""
    size_bytes, start, num_whole = path.stat().st_size, 0, 0
    try:
        with open(path, "rb") as stream:
            while True:
                stream.seek(start)
                local = stream.read(_LOCAL_HEADER_BYTES)
                if len(local) < _LOCAL_HEADER_BYTES or local[:4] != b"PK\x03\x04":
                    return f"it ends after {num_whole} whole arrays" if num_whole else ""
                stored, name_bytes, extra_bytes = (
                    int.from_bytes(local[at : at + size], "little") for at, size in ((18, 4), (26, 2), (28, 2))
                )
                name = stream.read(name_bytes).decode()
                extra = stream.read(extra_bytes)
                if stored == 0xFFFFFFFF and extra[:2] == b"\x01\x00":  # zip64 has it, after the unpacked size
                    stored = int.from_bytes(extra[12:20], "little")
                data = start + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
                if data + stored > size_bytes:
                    array = f" {read_npy_header(stream)}" if local[8:10] == b"\0\0" else ""
                    return f"it ends in {name.removesuffix('.npy')}{array}, after {num_whole} whole arrays"
                start, num_whole = data + stored, num_whole + 1
    except (*DAMAGE, OSError):
        return ""
