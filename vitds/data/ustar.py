"""The two kinds of 512-byte block that our shards are made of: a plain ustar header, and content padded with zeros.

Headers are the same for the same name and size (mode 644, owner 0, time 0), so equal data gives equal shards. Whoever
wrote a shard, its samples are found in it as WebDataset finds them, by the names of its members.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

import json
import re
import zlib

from vitds.data.image_files import IMAGE_SUFFIXES
from vitds.data.tar_members import BLOCK_BYTES, Member, members, number_in, text_in

Label = int | tuple[int, ...]
"""The class of a sample, or all its classes in rising order (none is legal)."""

END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_NAME_BYTES = 100

_BEFORE_SIZE = b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, owner, group
_BEFORE_CHECKSUM = b"00000000000\0"  # modification time
_AFTER_CHECKSUM = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK_BYTES - 156, b"\0")  # a regular file
_FIXED_SUM = sum(_BEFORE_SIZE + _BEFORE_CHECKSUM + b" " * 8 + _AFTER_CHECKSUM)  # its own field counts as blanks
_HEADER = b"%b" + _BEFORE_SIZE + b"%b" + _BEFORE_CHECKSUM + b"%06o\0 " + _AFTER_CHECKSUM


def header(name: str, size: int) -> bytes:
    """The header block of a tar member."""
    name_bytes, size_bytes = name.encode("ascii"), b"%011o\0" % size
    assert len(name_bytes) <= MAX_NAME_BYTES, name
    checksum = _FIXED_SUM + sum(name_bytes) + sum(size_bytes)
    return _HEADER % (name_bytes.ljust(MAX_NAME_BYTES, b"\0"), size_bytes, checksum)


def member(name: str, content: bytes) -> bytes:
    """A tar member: its header, its content, and the zeros up to the next whole block."""
    return header(name, len(content)) + content + bytes(-len(content) % BLOCK_BYTES)


def sample_pieces(key: str, extension: str, image: bytes, label: Label) -> tuple[bytes, bytes, bytes]:
    """All blocks of one sample, `key.EXT` and then its label, in three pieces of which the second is the image itself.

    One class is `key.cls` (an ASCII integer), any number of them `key.json` ({"labels": [3, 17]}).
    """
    if isinstance(label, tuple):
        told = member(f"{key}.json", json.dumps({"labels": label}).encode())
    else:
        told = member(f"{key}.cls", b"%d" % label)
    return header(f"{key}.{extension}", len(image)), image, bytes(-len(image) % BLOCK_BYTES) + told


def read_label(suffix: str, content: bytes) -> Label:
    """The label in a member `key.cls`, or in `key.json` under "labels" or "label"; classes in rising order, each once.

    Raises: ValueError for anything else than classes counted from 0.
    """
    if suffix == ".cls":
        label: Label = integer_in(content)
    else:
        try:
            body = json.loads(content)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        told = body.get("labels", body.get("label")) if isinstance(body, dict) else None
        classes: list = told if isinstance(told, list) else [told]
        if not all(type(one) is int for one in classes):
            raise ValueError('no list of integers under "labels"')
        label = tuple(sorted(set(classes))) if classes is told else classes[0]
    if min(label if isinstance(label, tuple) else (label,), default=0) < 0:
        raise ValueError(f"{label} is below 0")
    return label


def integer_in(text: bytes) -> int:
    """An ASCII integer as people and programs write it: digits, a minus perhaps, and blanks around them.

    Raises: ValueError for anything else, even what `int` would take, as 1_0.
    """
    if not re.fullmatch(rb"\s*-?\d{1,18}\s*", text):
        raise ValueError("no integer")
    return int(text)


def split_name(name: str) -> tuple[str, str]:
    """A member's name as WebDataset splits it, at the first dot behind the last slash: key, extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def image_among(sample: list[Member]) -> Member | None:
    """A sample's image: the first member whose extension is an image's alone (`key.jpg`), else the first whose
    extension ends in one (`key.rgb.jpg`); hidden files are none.
    """
    images = [member for member in sample if member.is_file and _is_image(member.name)]
    return next((member for member in images if "." not in split_name(member.name)[1]), images[0] if images else None)


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and "." + base.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def image_in(span: bytes) -> tuple[str, bytes]:
    """Extension and content of the image in a sample's span.

    Raises: ValueError when there is none.
    """
    extension = split_name(text_in(span[:MAX_NAME_BYTES]))[1]
    if "." + extension in IMAGE_SUFFIXES and span[156:157] == b"0":  # all that shards of ours need
        return extension, span[BLOCK_BYTES : BLOCK_BYTES + number_in(span[124:136])]
    image = image_among(list(members(span, 0, len(span))))
    if image is None:
        raise ValueError("no image in it")
    return image.name.rpartition(".")[2].lower(), span[image.offset : image.offset + image.size]


def checksum(span: bytes) -> int:
    """The crc32 that the index holds for a span."""
    return zlib.crc32(span)
