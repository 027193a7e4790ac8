"""Images where they lie, without an index: files, folders of any depth and tars, one after the other and never all at
once.

Everything comes in sorted order, tars in their own. What cannot be used is a `DataError` in the stream, in its place.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitds.data.image_files import IMAGE_SUFFIXES, files_below, shown
from vitds.data.ustar import BLOCK_BYTES, integer_in
from vitds.errors import DataError


@dataclass(frozen=True)
class LooseImage:
    """An encoded image, or the file to read it from; `name` is its path, or its shard's with its key: SHARD:KEY."""

    name: str
    source: Path | bytes
    label: int | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises: DataError when its file cannot be read.
        """
        if isinstance(self.source, bytes):
            return self.source
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=self.name) from None


def find_images(paths: Iterable[Path]) -> Iterator[LooseImage | DataError]:
    """Every image that the paths name: a file is taken for one whatever its name, a folder's files by their suffix.

    A label is what a tar holds beside an image: KEY.cls, an ASCII integer, as in our shards.
    """
    for path in paths:
        if path.is_dir():
            yield from _in_folder(path)
        elif path.suffix.lower() == ".tar":
            yield from _in_tar(path)
        else:
            yield LooseImage(shown(path), path)


def _in_folder(folder: Path) -> Iterator[LooseImage | DataError]:
    is_empty = True
    unreadable: list[OSError] = []
    for path in map(Path, files_below(folder, unreadable.append)):
        suffix = path.suffix.lower()
        if suffix == ".tar":
            is_empty = False
            yield from _in_tar(path)
        elif suffix in IMAGE_SUFFIXES:
            is_empty = False
            yield LooseImage(shown(path), path)
    for error in unreadable:
        yield DataError(f"cannot be read: {error.strerror}", where=str(error.filename))
    if is_empty and not unreadable:
        yield DataError("holds no image and no tar", where=shown(folder))


class _Member(NamedTuple):
    key: str  # the name up to the first dot after the last slash, as WebDataset splits it
    name: str  # without its last extension
    suffix: str
    content: bytes


def _in_tar(path: Path) -> Iterator[LooseImage | DataError]:
    shard, is_empty = shown(path), True
    try:
        with tarfile.open(path, "r:") as archive:
            for _, sample in itertools.groupby(_members(archive), lambda member: member.key):
                for image in _in_sample(shard, list(sample)):
                    is_empty = False
                    yield image
            _check_end(archive)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: of damaged numbers
        yield DataError(f"cannot be read on: {getattr(error, 'strerror', None) or error}", where=shard)
    else:
        if is_empty:
            yield DataError("holds no image", where=shard)


def _members(archive: tarfile.TarFile) -> Iterator[_Member]:
    """The members that matter, images and labels."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would remember every one
        if member.size < 0:  # tarfile would come back here for ever
            raise tarfile.ReadError(f"damaged size at byte {member.offset}")
        path = member.name.removeprefix("./")
        name, suffix = os.path.splitext(path)
        suffix = suffix.lower()
        is_visible = not os.path.basename(path).startswith(".")  # macOS adds a ._NAME beside each NAME
        if member.isfile() and is_visible and (suffix in IMAGE_SUFFIXES or suffix == ".cls"):
            content = archive.extractfile(member)
            assert content is not None
            key = re.match(r"(.*/)?[^./]*", path)
            yield _Member(key[0] if key else name, name, suffix, content.read())


def _in_sample(shard: str, members: list[_Member]) -> Iterator[LooseImage | DataError]:
    label = None
    for member in members:
        if member.suffix == ".cls":
            try:
                label = integer_in(member.content)
            except ValueError:
                yield DataError(f"label {member.content[:20]!r} is no integer", where=f"{shard}:{member.key}")
                return
    for member in members:
        if member.suffix != ".cls":
            yield LooseImage(f"{shard}:{member.name}", member.content, label)


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises: TarError when the tar ends before its end mark; tarfile takes a damaged header for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise tarfile.ReadError(f"no end mark, cut off or damaged at byte {archive.offset}")
