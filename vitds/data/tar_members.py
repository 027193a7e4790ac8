"""The members of anybody's tar by their headers alone, and the way on behind damage.

Plain ustar, GNU's and pax's long names and large sizes; every header is held against its own checksum; nothing is ever
extracted. It costs one read of 512 bytes a member.

Source: POSIX.1-1988 ustar and POSIX.1-2001 pax interchange formats; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

BLOCK_BYTES = 512
_READ_BYTES = 2**20
MAX_ABOUT_BYTES = 2**16  # of a long name, or a member's other properties
_MAX_DIGITS = 19  # of a size in bytes
_MAX_PADDING_BYTES = 2**20  # tar fills up its last record, usually of 10 KiB


class Bytes(Protocol):
    """Bytes by position: a `bytes` object, or a file behind `FileBytes`."""

    def __getitem__(self, place: slice, /) -> bytes: ...


class FileBytes:
    """An open file as bytes by position, read without moving its cursor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getitem__(self, place: slice) -> bytes:
        return os.pread(self._descriptor, place.stop - place.start, place.start)


class Member(NamedTuple):
    """A member of a tar: where it begins (long-name headers included), and where its content lies, in bytes."""

    name: str
    start: int
    offset: int
    size: int
    is_file: bool  # neither directory nor link nor device

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.offset + self.size + -self.size % BLOCK_BYTES


class TarDamage(ValueError):
    """A tar cannot be read on from a member that starts at byte `start`; the text says why."""

    def __init__(self, what: str, start: int) -> None:
        super().__init__(f"{what} at byte {start}")
        self.start = start


def members(tar: Bytes, start: int, end: int) -> Iterator[Member]:
    """The members of a tar that lies between two positions, up to its first block of zeros or to its end.

    Raises: TarDamage when a header's checksum is wrong, or a member reaches past the end.
    """
    first, name, size_of = start, "", -1
    while start + BLOCK_BYTES <= end:
        header = tar[start : start + BLOCK_BYTES]
        if _is_zeros(header):
            return
        if not is_header(header):
            raise TarDamage("damaged header", start)
        offset, kind = start + BLOCK_BYTES, header[156:157]
        try:
            size = 0 if kind in b"123456" else number_in(header[124:136])
        except ValueError:
            raise TarDamage("damaged size", start) from None
        if kind in b"LKxg":  # a header about the next member, with content of its own
            about = tar[offset : min(offset + size, end, offset + MAX_ABOUT_BYTES)]
            start = offset + size + -size % BLOCK_BYTES
            if not offset <= start <= end:  # the way on never leads back
                raise TarDamage("cut off inside a header", first)
            if size > MAX_ABOUT_BYTES:
                raise TarDamage(f"a name of {size} bytes", first)
            if kind == b"L":
                name = text_in(about)
            elif kind == b"x":
                records = _pax_records(about, first)
                name = records.get("path", name)
                size_of = _decimal(records["size"].encode(), first) if "size" in records else size_of
            continue
        size = size_of if size_of >= 0 else size
        member = Member(name or _name(header), first, offset, size, kind in b"0\x007")
        if not offset <= member.end <= end:
            raise TarDamage(f"cut off inside {member.name}", first)
        yield member
        first, name, size_of = member.end, "", -1
        start = first


def _is_zeros(blocks: bytes) -> bool:
    return blocks.count(0) == len(blocks)


def is_header(block: bytes) -> bool:
    """Whether a block is a tar header, by its checksum."""
    try:
        written = int(block[148:156].split(b"\0", 1)[0] or b"-1", 8)
    except ValueError:
        return False
    total = zlib.adler32(block) % 2**16 - 1  # the sum of all bytes, modulo 65521, without a loop over them
    return len(block) == BLOCK_BYTES and (total - sum(block[148:156]) + 8 * ord(" ") - written) % 65521 == 0


def number_in(digits: bytes) -> int:
    """A size: octal digits, or GNU's binary form when its first bit is set.

    Raises: ValueError for a negative one, and for whatever else `int` would take.
    """
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    octal = digits.split(b"\0", 1)[0].strip() or b"0"
    if octal.translate(None, b"01234567"):
        raise ValueError(f"{digits!r} is no size")
    return int(octal, 8)


def text_in(name: bytes) -> str:
    """A name, which ends at the first zero byte; what is no UTF-8 is shown by its codes."""
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    name = text_in(header[:100])
    is_posix = header[257:263] == b"ustar\0"
    return f"{text_in(header[345:500])}/{name}" if is_posix and header[345] else name


def _pax_records(content: bytes, start: int) -> dict[str, str]:
    """The records of a pax header, each "LENGTH KEY=VALUE" and a line's end.

    Raises: TarDamage for a length of more digits than any has.
    """
    records = {}
    while content:
        length, _, _ = content.partition(b" ")
        num_bytes = _decimal(length, start) if length.isdigit() else 0
        if not num_bytes:
            break
        key, _, value = content[len(length) + 1 : num_bytes - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        content = content[num_bytes:]
    return records


def _decimal(digits: bytes, start: int) -> int:
    """A number of a pax header that begins at byte `start`.

    Raises: TarDamage for anything but a few digits.
    """
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise TarDamage("damaged size", start)
    return int(digits)


@dataclass(frozen=True)
class Damage:
    """A place where a tar cannot be read on: what is wrong, and the member before it if that turns out to be wrong."""

    what: str
    lost: Member | None


def walk(tar: Bytes, start: int, end: int) -> Iterator[Member | Damage]:
    """The members of a tar that lies between two positions; at damage, a `Damage`, and on from the next whole header.

    One bad block costs the member that it is in. A tar that just stops is damage too: it lacks its end mark.
    """
    while True:
        last: Member | None = None
        try:
            for last in members(tar, start, end):
                yield last
            damage = _at_the_end(tar, last.end if last else start, end)
            if damage is None:
                return
        except TarDamage as error:
            damage = error
        # Blocks that are missing from a member's content make the next header lie inside it.
        inside = _next_header(tar, last.offset, last.end) if last else None
        yield Damage(f"{damage}, after {last.name}" if last else str(damage), last if inside is not None else None)
        resumed = inside if inside is not None else _next_header(tar, damage.start + BLOCK_BYTES, end)
        if resumed is None:
            return
        start = resumed


def _at_the_end(tar: Bytes, start: int, end: int) -> TarDamage | None:
    """What is wrong behind the last member: zeros belong there, two blocks of them at least."""
    if end - start < 2 * BLOCK_BYTES or not _is_zeros(tar[start : start + BLOCK_BYTES]):
        return TarDamage("cut off: no end mark", start)
    for place in range(start, end, _READ_BYTES):
        if not _is_zeros(tar[place : min(place + _READ_BYTES, end)]):
            return TarDamage("zeros amid the data", start)
    if end - start > _MAX_PADDING_BYTES:
        return TarDamage(f"nothing but {end - start} zeros", start)
    return None


def _next_header(tar: Bytes, start: int, end: int) -> int | None:
    """The first block that is a ustar header, by its mark and its checksum, at or after a position."""
    for place in range(start, end, _READ_BYTES):
        chunk = tar[place : min(place + _READ_BYTES, end)]
        blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK_BYTES * BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
        marked = (blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)
        for number in np.flatnonzero(marked).tolist():
            if is_header(blocks[number].tobytes()):
                return place + number * BLOCK_BYTES
    return None
