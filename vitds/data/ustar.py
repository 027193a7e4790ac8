"""The two kinds of 512-byte block that our shards are made of: a plain ustar header, and content padded with zeros.

Headers are the same for the same name and size (mode 644, owner 0, time 0), so equal data gives equal shards.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

import json
import zlib

Label = int | tuple[int, ...]
"""The class of a sample, or all its classes in rising order (none is legal)."""

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


def sample_span(key: str, extension: str, image: bytes, label: Label) -> bytes:
    """All blocks of one sample: `key.EXT`, then its label.

    One class is `key.cls` (an ASCII integer), any number of them `key.json` ({"labels": [3, 17]}).
    """
    if isinstance(label, tuple):
        told = member(f"{key}.json", json.dumps({"labels": label}).encode())
    else:
        told = member(f"{key}.cls", b"%d" % label)
    return b"".join(member(f"{key}.{extension}", image) + told)


def read_label(suffix: str, content: bytes) -> Label:
    """The label in a member `key.cls` or `key.json`; classes in rising order, each once.

    Raises: ValueError for anything else than classes counted from 0.
    """
    if suffix == ".cls":
        label: Label = int(content)
    else:
        try:
            body = json.loads(content)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        classes = body.get("labels") if isinstance(body, dict) else None
        if not isinstance(classes, list) or not all(type(one) is int for one in classes):
            raise ValueError('no list of integers under "labels"')
        label = tuple(sorted(set(classes)))
    if min(label if isinstance(label, tuple) else (label,), default=0) < 0:
        raise ValueError(f"{label} is below 0")
    return label


def first_member(span: bytes) -> tuple[str, bytes]:
    """Name and content of the member that a span starts with."""
    name = span[:MAX_NAME_BYTES].rstrip(b"\0").decode("ascii")
    size_bytes = int(span[124:136].rstrip(b"\0 "), 8)
    return name, span[BLOCK_BYTES : BLOCK_BYTES + size_bytes]


def checksum(span: bytes) -> int:
    """The crc32 that the index holds for a span."""
    return zlib.crc32(span)
