"""The two kinds of 512-byte block that our shards are made of: a plain ustar header, and content padded with zeros.

Headers are the same for the same name and size (mode 644, owner 0, time 0), so equal data gives equal shards.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

import zlib

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_NAME_BYTES = 100

_BLANK_HEADER = (
    bytes(MAX_NAME_BYTES)
    + b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, owner, group
    + bytes(12) + b"00000000000\0"  # size, filled in below; modification time
    + b" " * 8  # the checksum counts its own field as blanks
    + b"0" + bytes(100) + b"ustar\x0000"  # a regular file
)  # fmt: skip


def member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """The parts of a tar member: its header, its content, and the zeros up to the next whole block."""
    name_bytes = name.encode("ascii")
    assert len(name_bytes) <= MAX_NAME_BYTES, name
    header = bytearray(_BLANK_HEADER.ljust(BLOCK_BYTES, b"\0"))
    header[: len(name_bytes)] = name_bytes
    header[124:136] = b"%011o\0" % len(content)
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header), content, bytes(-len(content) % BLOCK_BYTES)


def sample_span(key: str, extension: str, image: bytes, label: int) -> bytes:
    """All blocks of one sample: `key.EXT`, then `key.cls` (an ASCII integer)."""
    return b"".join(member(f"{key}.{extension}", image) + member(f"{key}.cls", b"%d" % label))


def first_member(span: bytes) -> tuple[str, bytes]:
    """Name and content of the member that a span starts with."""
    name = span[:MAX_NAME_BYTES].rstrip(b"\0").decode("ascii")
    size_bytes = int(span[124:136].rstrip(b"\0 "), 8)
    return name, span[BLOCK_BYTES : BLOCK_BYTES + size_bytes]


def checksum(span: bytes) -> int:
    """The crc32 that the index holds for a span."""
    return zlib.crc32(span)
