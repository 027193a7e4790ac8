"""One shard and its record: written, put in place whole, and found again by a later run.

A shard's record holds its index rows and what `vitds.data.health` wants to know of each image. It is put in place
after the shard is on the disk, so a shard that has a record is finished, however its writer ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa

from vitds.data.decode import BadImage, as_image_file
from vitds.data.plan import SplitPlan
from vitds.data.ustar import END_OF_ARCHIVE, sample_pieces
from vitds.durable import fsync, replace_text
from vitds.errors import DataError

RECORD_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.uint32()),
        ("format", pa.string()),  # before it became PNG, if it did
        ("image_bytes", pa.int64()),
        ("image_crc32", pa.uint32()),  # null where no duplicates are looked for
    ]
)
_BUFFER_BYTES = 2**22
_ALIGNMENT = 4096  # of what goes past the page cache


def record_table(columns: dict[str, list]) -> pa.Table:
    """The columns of a record as a table; labels are lists where samples have several."""
    schema = RECORD_SCHEMA
    if columns["label"] and not isinstance(columns["label"][0], int):
        schema = schema.set(schema.get_field_index("label"), pa.field("label", pa.list_(pa.int64())))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


class ShardFiles:
    """Where the shards of a split and their records lie below a directory of work."""

    def __init__(self, work: Path, split: str, prefix: str) -> None:
        self.shards, self.records = work / "data" / split, work / "records" / split
        self._prefix = prefix

    def name(self, number: int) -> str:
        """A shard's file name."""
        return f"{self._prefix}-{numbered(number)}.tar"

    def shard(self, number: int) -> Path:
        """A shard's path."""
        return self.shards / self.name(number)

    def record(self, number: int) -> Path:
        """The path of a shard's record."""
        return self.records / f"{numbered(number)}.json"

    def make_directories(self) -> None:
        """Make what is missing, and clear away what a killed run was in the middle of."""
        for directory in (self.shards, self.records):
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob(".*.writing"):
                path.unlink()

    def read_record(self, number: int) -> dict[str, Any] | None:
        """The record of a finished shard; None when the shard is not there, whole."""
        try:
            record = json.loads(self.record(number).read_text(encoding="utf-8"))
            if record["size_bytes"] and self.shard(number).stat().st_size != record["size_bytes"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record


def numbered(number: int) -> str:
    """A shard's number as it stands in file names."""
    return f"{number:06d}"


def write_shard(plan: SplitPlan, files: ShardFiles, number: int, advance: Callable[[int], None]) -> None:
    """Write a shard and then its record; images that cannot be used are left out, and named in the record.

    Raises: DataError naming the file that cannot be written.
    """
    source, options = plan.source, plan.options
    rows, bad, offset = [], [], 0
    path = files.shard(number)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with _Shard(temporary) as shard:
            for row, key, label in plan.shard_samples(number):
                try:
                    image = as_image_file(source.read(row), verify=options.verify)
                except (BadImage, OSError) as error:
                    bad.append(f"{source.where(row)}: {error}")
                    advance(1)
                    continue
                first, data, last = sample_pieces(key, image.extension, image.data, label)
                size = len(first) + len(data) + len(last)
                checksum = crc32(last, crc32(data, crc32(first)))
                image_checksum = crc32(data) if options.find_duplicates else None
                for piece in (first, data, last):
                    shard.write(piece)
                place = key, offset, size, label, image.width, image.height, checksum
                rows.append((*place, image.format, len(data), image_checksum))
                offset += size
                advance(1)
            shard.write(END_OF_ARCHIVE)
        if rows:
            temporary.rename(path)
            fsync(path.parent)
        else:
            temporary.unlink()
        columns = zip(*rows, strict=True) if rows else [()] * len(RECORD_SCHEMA)
        record = {"size_bytes": offset + len(END_OF_ARCHIVE) if rows else 0, "bad": bad}
        record |= dict(zip(RECORD_SCHEMA.names, columns, strict=True))
        replace_text(files.record(number), json.dumps(record))
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror or error}",
            where=str(error.filename or temporary),
            fix="the shards that are finished are kept: when this is mended, the same command goes on with them",
        ) from error


class _Shard:
    """A file that is written in large pieces past the page cache, where its file system can do that.

    That takes half the CPU time, and leaves the cache to the images that are read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        pages = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # aligned, as pages are
        with suppress(AttributeError, OSError):  # large ones halve the cost of writing
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = memoryview(pages)
        self._filled = self._num_bytes = 0

    def __enter__(self) -> _Shard:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(self._path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(self._path, flags, 0o666)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._num_bytes += self._filled
                self._flush(self._filled + -self._filled % _ALIGNMENT)
                os.ftruncate(self._descriptor, self._num_bytes)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, content: bytes) -> None:
        """Add bytes to the end."""
        end = self._filled + len(content)
        if end < _BUFFER_BYTES:
            self._buffer[self._filled : end] = content
            self._filled = end
            return
        room = _BUFFER_BYTES - self._filled
        self._buffer[self._filled :] = content[:room]
        self._flush(_BUFFER_BYTES)
        self._num_bytes += _BUFFER_BYTES
        self._filled = 0
        self.write(content[room:])

    def _flush(self, num_bytes: int) -> None:
        rest = self._buffer[:num_bytes]
        while rest:  # a full disk takes a part first, and then says why
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                direct = flags & getattr(os, "O_DIRECT", 0)
                if error.errno != errno.EINVAL or not direct:
                    raise
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~direct)
