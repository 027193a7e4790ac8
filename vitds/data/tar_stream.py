"""One shard as a stream of bytes, and a stream of bytes as the members of a tar that is whole.

Nothing here runs a command unless it is allowed to, and no shard ends early in silence: a connection that breaks is
taken up where it broke, and a tar that is cut, damaged or followed by something is a `DataError` after its last whole
member.
"""

from __future__ import annotations

import lzma
import tarfile
import time
import zlib
from collections.abc import Iterator
from typing import Protocol, Self

from webdataset.gopen import gopen

from vitds.data.tar_members import MAX_ABOUT_BYTES
from vitds.errors import DataError
from vitds.stream_facts import local_path, scheme
from vitds.transport import PATIENT, SCHEMES, Answer, BrokenOff, Refused, Tries, Url, connect, unavailable

_MAX_MEMBER_BYTES = 2**28  # no image is as large

UNREADABLE = (DataError, tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What opening a shard and reading its members may raise."""


class ByteStream(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""

    def close(self) -> None:
        """Let go of it."""


def open_shard(url: str, allow_pipe: bool) -> ByteStream:
    """Open a shard wherever it lies.

    Raises: OSError when it cannot be opened; DataError for a command that is not allowed.
    """
    name = scheme(url)
    if not name:
        return open(local_path(url), "rb")
    if name in SCHEMES:
        return _Remote(Url(url))
    if not allow_pipe:
        raise DataError(f"{name}: runs a command, which --allow-pipe allows", where=url)
    return gopen(url)


class _Remote:
    """The bytes at an address; a connection that breaks is followed by one that goes on from there."""

    def __init__(self, url: Url) -> None:
        self._url, self._position, self._version = url, 0, ""
        self._answer: Answer | None = None
        self._tries = Tries(PATIENT)

    def read(self, size: int, /) -> bytes:
        while True:
            try:
                return self._read(size)
            except BrokenOff as broken:
                self.close()
                try:
                    pause_s = self._tries.pause_after(broken, self._position)
                except BrokenOff:
                    raise unavailable(self._url, broken) from None
            time.sleep(pause_s)

    def close(self) -> None:
        if self._answer is not None:
            self._answer.stream.close()
            self._answer = None

    def _read(self, size: int) -> bytes:
        answer = self._answer or self._connect()
        data = answer.read(size)
        if not data and answer.size is not None and self._position < answer.size:
            raise BrokenOff(f"the connection was closed at byte {self._position} of {answer.size}")
        self._position += len(data)
        return data

    def _connect(self) -> Answer:
        try:
            answer = self._answer = connect(self._url, self._position)
        except Refused as refused:
            raise DataError(str(refused)) from None
        if self._version and answer.version != self._version:
            raise DataError("changed on the server while it was read")
        self._version = answer.version
        while answer.start < self._position:  # a server that does not continue
            answer.start += len(answer.read(self._position - answer.start)) or self._position
        return answer


_DAMAGE = {"empty header": "cut off: no end mark", "truncated header": "cut off in a header"}  # tarfile's words


_ABOUT_NEXT = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}


class _Header(tarfile.TarInfo):
    """A member's header; one that is damaged or missing raises, where tarfile would take it for the end. So does one
    about the next member that is large, and a sparse file's: tarfile would hold in memory whatever they claim to be.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _ABOUT_NEXT and header.size > MAX_ABOUT_BYTES:
            raise DataError(f"a header of {header.size} bytes about the next member, the limit is {MAX_ABOUT_BYTES}")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(header)
        return header

    def _refuse_sparse(self, member: tarfile.TarInfo, *_: object) -> None:
        raise _sparse(member)

    # tarfile's names for the three ways in which pax headers say so
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if str(error) == "end of file header":  # the end mark
                raise
            what = _DAMAGE.get(str(error), f"damaged header ({error})") if archive.offset else "is no tar, or empty"
        raise DataError(f"{what} at byte {archive.offset}")


def _sparse(member: tarfile.TarInfo) -> DataError:
    return DataError(f"{member.name} is stored as a sparse file, which no image is: pack the tar without --sparse")


def members_of(stream: ByteStream) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of a tar, compressed or not, up to its end mark, each with the archive to extract it from.

    Raises: one of UNREADABLE after the last whole member, when there ought to be more.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would remember every one
            yield member, archive
        end = archive.offset
        while rest := archive.fileobj.read(2**16):  # type: ignore[union-attr]
            if rest.count(0) != len(rest):
                raise DataError(f"goes on after its end mark (byte {end}): damaged, or several tars in one")


def read_member(member: tarfile.TarInfo, archive: tarfile.TarFile) -> bytes:
    """The content of a member.

    Raises: DataError when it is no plain file, or larger than any image; one of UNREADABLE when it is cut.
    """
    if not member.isreg():
        raise DataError("is a link, not a file")
    if member.size > _MAX_MEMBER_BYTES:
        raise DataError(f"is larger than any image: {member.size} bytes")
    content = archive.extractfile(member)
    assert content is not None
    return content.read()
