"""Headers that somebody made up: sizes that lead back, numbers without end; every reader says so and ends."""

import io
import tarfile

import numpy as np
import pytest

from vitds.data.images import find_images
from vitds.data.scan import scan_shard
from vitds.data.sources.imagenet import first_member, imagenet_archives
from vitds.data.tar_members import BLOCK_BYTES, Damage, TarDamage, members, number_in, walk
from vitds.data.tar_stream import UNREADABLE, members_of
from vitds.data.ustar import END_OF_ARCHIVE, image_in, member, read_label

NEGATIVE = [b"-0000002000\0", b"-1\0", b"\xff" * 12, b"-0000000001\0"]


def with_header(block: bytes, place: int, field: bytes) -> bytes:
    """A header with a field put in, and the checksum that fits."""
    block = bytearray(block)
    block[place : place + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def crafted(size: bytes, kind: bytes) -> bytes:
    """Two samples; between them a member of some kind and with some size."""
    first, second = (member(f"{key}.jpg", bytes(600)) + member(f"{key}.cls", b"0") for key in "ab")
    odd = with_header(with_header(member("x.jpg", b"x" * 700)[:BLOCK_BYTES], 124, size), 156, kind) + b"x" * 1024
    return first + odd + second + END_OF_ARCHIVE


def pax(records: bytes) -> bytes:
    """A sample whose first member has these properties, and one behind it."""
    header = with_header(member("PaxHeader", records)[:BLOCK_BYTES], 156, b"x")
    return header + records.ljust(-(-len(records) // 512) * 512, b"\0") + crafted(b"%011o\0" % 1024, b"0")


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
@pytest.mark.parametrize("size", NEGATIVE)
def test_a_size_below_zero_is_damage_and_what_is_around_it_is_found(tmp_path, size, kind):
    path = tmp_path / "s.tar"
    path.write_bytes(crafted(size, kind))
    found = scan_shard(path)
    assert [sample.key for sample in found.samples] == ["a", "b"]
    assert any("damaged size at byte 2560" in line for line in found.bad)
    with pytest.raises(TarDamage):
        list(members(path.read_bytes(), 2560, path.stat().st_size))
    with pytest.raises(ValueError):
        image_in(path.read_bytes()[2560:])
    assert any(isinstance(item, Exception) for item in find_images([path]))
    with pytest.raises(UNREADABLE), open(path, "rb") as stream:
        for _ in zip(members_of(stream), range(20), strict=False):
            pass


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
@pytest.mark.parametrize("size", NEGATIVE[:2])
def test_archives_of_imagenet_with_a_size_below_zero_are_read_around_it(tmp_path, size, kind):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(member("n00000001.tar", crafted(size, kind)) + END_OF_ARCHIVE)
    source = imagenet_archives(tmp_path, None)["train"]
    assert source.keys == ["n00000001/a", "n00000001/b"] and any("damaged size" in line for line in source.bad)
    path.write_bytes(crafted(size, kind)[2560:])
    assert first_member(path) is None


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" size=1\n",
        b"5013 size=" + b"1" * 5000 + b"\n",
        b"14 size=-1024\n",
        "12 size=٣\n".encode(),
    ],
    ids=["length", "size", "negative", "other digits"],
)
def test_the_numbers_of_a_pax_header_have_few_digits(tmp_path, records):
    path = tmp_path / "s.tar"
    path.write_bytes(pax(records))
    found = scan_shard(path)
    assert {sample.key for sample in found.samples} >= {"a", "b"}
    assert any("damaged size at byte 0" in line for line in found.bad)
    assert list(find_images([path]))  # Python's tarfile, which takes the last one


def test_sizes_are_octal_or_binary_and_nothing_else():
    assert number_in(b"00000002000\0") == number_in(b"      2000 \0") == number_in(b"2000\0\0\0\0\0\0\0\0") == 1024
    assert number_in(b"\x80" + (2**40).to_bytes(11, "big")) == 2**40 and number_in(bytes(12)) == 0
    for digits in (*NEGATIVE, b"+0000002000\0", b"1_0\0", b"0o17\0", b"00000000009\0", b"\x81" + bytes(11)):
        with pytest.raises(ValueError):
            number_in(digits)


def test_a_walk_goes_forward_whatever_the_headers_say():
    rng = np.random.default_rng(0)
    numbers = [b"-0000002000\0", b"00000000000\0", b"00000001000\0", b"77777777777\0", b"\x80" + b"\xff" * 11]
    for _ in range(300):
        blocks = []
        for key in range(8):
            block = member(f"{key}.jpg", b"y")[:BLOCK_BYTES]
            block = with_header(block, 124, numbers[rng.integers(len(numbers))])
            blocks.append(with_header(block, 156, b"0LxKg5"[(kind := rng.integers(6)) : kind + 1]))
            blocks.append(b"%02d size=%s\n" % (14, b"-1024") + bytes(498))
        tar = b"".join(blocks) + END_OF_ARCHIVE
        found = [each for each, _ in zip(walk(tar, 0, len(tar)), range(100), strict=False)]
        assert len(found) < 50
        starts = [each.start for each in found if not isinstance(each, Damage)]
        assert starts == sorted(set(starts))


@pytest.mark.parametrize("text", [b"1_0", b"+7", b"1 0", b"0x1", b"\xd9\xa3", b"7\0", b"", b"9" * 19])
def test_a_label_is_plain_digits(text):
    with pytest.raises(ValueError):
        read_label(".cls", text)


def test_blanks_around_a_label_are_none_of_it():
    assert read_label(".cls", b" 7\r\n") == 7 and read_label(".cls", b"007") == 7
    with pytest.raises(ValueError, match="-1 is below 0"):
        read_label(".cls", b"-1")


def test_labels_of_loose_tars_are_plain_digits_too(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (("a.jpg", b"A"), ("a.cls", b"1_0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (item,) = find_images([tmp_path / "t.tar"])
    assert isinstance(item, Exception) and "is no integer" in str(item)
