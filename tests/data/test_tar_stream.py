"""A shard as a stream: whatever is done to its bytes, what comes out is whole, and the rest is named."""

import gzip
import io
import subprocess
import tarfile
import time

import pytest
from tar_shards import write_shards, write_tar
from web_server import Server, serving

from vitds import transport
from vitds.data import tar_stream
from vitds.data.tar_stream import UNREADABLE, members_of, open_shard, read_member
from vitds.errors import DataError, DataUnavailable
from vitds.transport import Patience


def read(stream):
    """The members of a tar and, where it was not whole, what was said about it."""
    found = []
    try:
        for member, archive in members_of(stream):
            found.append((member.name, read_member(member, archive)))
    except UNREADABLE as error:
        return found, str(error)
    return found, ""


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    write_shards(folder, [5])
    return (folder / "s-000.tar").read_bytes()


@pytest.fixture(scope="module")
def whole(shard):
    members, said = read(io.BytesIO(shard))
    assert len(members) == 10 and not said
    return members


def test_a_shard_cut_anywhere_gives_its_whole_members_and_says_so(shard, whole):
    for size in range(0, len(shard) - 1024 + 1, 256):
        members, said = read(io.BytesIO(shard[:size]))
        assert members == whole[: len(members)] and said, size
    assert read(io.BytesIO(shard[:-512])) == (whole, "")  # of two zero blocks one is enough


def test_a_flipped_bit_in_a_header_is_never_the_silent_end(shard, whole):
    header_blocks = [place for place in range(0, len(shard), 512) if shard[place + 257 : place + 262] == b"ustar"]
    assert len(header_blocks) == 10
    for block in header_blocks:
        for place in (0, 50, 124, 130, 135, 148, 156, 257, 300, 511):
            damaged = bytearray(shard)
            damaged[block + place] ^= 1 << (place % 8)
            members, said = read(io.BytesIO(damaged))
            assert said or members == whole, (block, place)
            assert members == whole[: len(members)]


def test_a_wiped_header_and_a_second_tar_behind_the_first_are_no_end(shard, whole):
    wiped = bytearray(shard)
    wiped[1024 * 2 : 1024 * 2 + 512] = bytes(512)
    members, said = read(io.BytesIO(wiped))
    assert len(members) < 10 and "goes on after its end mark" in said
    assert "several tars in one" in read(io.BytesIO(shard + shard))[1]
    assert read(io.BytesIO(shard + bytes(20 * 512))) == (whole, "")


def test_a_block_that_is_wiped_or_missing_never_takes_members_in_silence(shard, whole):
    for place in range(0, len(shard) - 1024, 512):
        for damaged in (shard[:place] + bytes(512) + shard[place + 512 :], shard[:place] + shard[place + 512 :]):
            members, said = read(io.BytesIO(damaged))
            assert said or [name for name, _ in members] == [name for name, _ in whole], place


def test_compressed_tars_are_read_and_their_cuts_found(shard, whole):
    packed = gzip.compress(shard)
    assert read(io.BytesIO(packed)) == (whole, "")
    for size in range(0, len(packed) - 20, 64):
        members, said = read(io.BytesIO(packed[:size]))
        assert members == whole[: len(members)] and said


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_said(content):
    assert read(io.BytesIO(content))[1]


def test_links_and_giants_are_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 50)])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    monkeypatch.setattr(tar_stream, "_MAX_MEMBER_BYTES", 10)
    with open(path, "rb") as stream:
        reasons = []
        for member, archive in members_of(stream):
            with pytest.raises(DataError) as caught:
                read_member(member, archive)
            reasons.append(caught.value.what)
    assert reasons == ["is larger than any image: 50 bytes", "is a link, not a file"]


def test_members_with_long_names_of_gnu_and_pax_tars(tmp_path):
    name = "d" * 150 + "/" + "k" * 120 + ".jpg"
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as archive:
            header = tarfile.TarInfo(name)
            header.size = 3
            archive.addfile(header, io.BytesIO(b"abc"))
        with open(tmp_path / f"{number}.tar", "rb") as stream:
            assert read(stream) == ([(name, b"abc")], "")


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_a_header_that_claims_gigabytes_is_refused_before_they_are_read(kind):
    header = tarfile.TarInfo("bomb")
    header.type, header.size = kind, 2**31
    stream = Endless(2**20, header.tobuf(tarfile.GNU_FORMAT))
    assert read(stream) == ([], "data error  a header of 2147483648 bytes about the next member, the limit is 65536")


class Endless(io.RawIOBase):
    """A few bytes and endless zeros, of which only so many may be asked for."""

    def __init__(self, limit: int, content: bytes) -> None:
        self._left, self._content = limit, content

    def read(self, size: int = -1) -> bytes:
        self._left -= size
        assert self._left >= 0, "read on"
        found, self._content = self._content[:size], self._content[size:]
        return found.ljust(size, b"\0")


@pytest.fixture
def server(shard, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(tar_stream, "PATIENT", Patience(3, 3, 0.0, 0.0))
    server = Server()
    server.files["/s.tar"] = shard
    with serving(server) as server.address:
        yield server


@pytest.mark.parametrize("has_ranges", [True, False])
def test_http_connections_that_break_are_gone_on_from(server, whole, has_ranges):
    server.drop_after, server.num_drops, server.ranges = 1500, 2 if not has_ranges else 99, has_ranges
    assert read(open_shard(f"{server.address}/s.tar", False)) == (whole, "")
    assert len(server.requests) > 2 and server.requests[1][1] == "bytes=1500-"


def test_a_server_that_never_gives_more_is_named_and_a_missing_shard_refused(server):
    server.drop_after = 0
    with pytest.raises(DataUnavailable) as caught:
        list(members_of(open_shard(f"{server.address}/s.tar", False)))
    assert caught.value.where == f"{server.address}/s.tar" and len(server.requests) == 3
    assert "404" in read(open_shard(f"{server.address}/gone.tar", False))[1]


def test_a_server_that_trickles_is_given_up_and_one_that_is_read_slowly_is_not(server, whole, monkeypatch):
    monkeypatch.setattr(transport, "_SLOW_AFTER_S", 0.1)
    stream = open_shard(f"{server.address}/s.tar", False)
    first = stream.read(512)
    time.sleep(0.3)  # a reader that is busy with something else is no slow server
    rest = iter(lambda: stream.read(512), b"")
    assert first + b"".join(rest) == server.files["/s.tar"] and len(server.requests) == 1
    monkeypatch.setattr(transport, "_LEAST_BYTES_PER_S", 10**9)
    server.trickle, server.pause_s, server.requests = 10, 0.02, []
    with pytest.raises(DataUnavailable, match=r"only \d+ bytes"):
        list(members_of(open_shard(f"{server.address}/s.tar", False)))
    assert len(server.requests) == 3


def test_a_shard_that_changes_between_two_connections_is_damaged(server, shard):
    server.drop_after = 1500
    stream = open_shard(f"{server.address}/s.tar", False)
    assert len(stream.read(1500)) == 1500
    server.files["/s.tar"] = shard[:1500] + bytes(len(shard) - 1500)
    with pytest.raises(DataError, match="changed on the server"):
        stream.read(1500)


def test_commands_run_only_when_allowed(tmp_path, shard, whole):
    (tmp_path / "s.tar").write_bytes(shard)
    ran = tmp_path / "ran"
    command = f"pipe:touch {ran}; cat {tmp_path}/s.tar"
    with pytest.raises(DataError, match="allow-pipe"):
        open_shard(command, False)
    assert not ran.exists()
    stream = open_shard(command, True)
    assert read(stream) == (whole, "") and ran.exists()
    stream.close()
    with pytest.raises(OSError, match="exit 3"):
        failing = open_shard(f"pipe:cat {tmp_path}/s.tar; exit 3", True)
        list(members_of(failing))
        failing.close()


@pytest.mark.parametrize(
    "kind", [["gnu"], *(["posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))]
)
def test_a_sparse_file_takes_no_memory(tmp_path, kind):
    """Its map may be endless, and a small tar claims a large file."""
    with open(tmp_path / "0.jpg", "wb") as file:
        file.write(b"image")
        file.truncate(2**27)
    form, *options = kind
    command = ["tar", "--sparse", f"--format={form}", *options, "-czf", "s.tar.gz", "0.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with open(tmp_path / "s.tar.gz", "rb") as stream:
        members, said = read(stream)
    assert not members and "is stored as a sparse file" in said
