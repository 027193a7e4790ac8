"""Shards of all formats, whole and damaged in every place, scanned by their headers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vitds.data.scan import ScannedShard, scan_shard
from vitds.data.ustar import image_in

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: str = "ustar") -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, label: int, num_bytes: int = 1200) -> list[tuple[str, bytes]]:
    image = np.random.default_rng(label).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    return [(f"{key}.jpg", image), (f"{key}.cls", b"%d" % label)]


def shard_of(path: Path, num_samples: int = 5, kind: str = "ustar") -> bytes:
    samples = [sample(f"k{row}", row, 700 * row + 1) for row in range(num_samples)]
    return write_tar(path, [member for each in samples for member in each], kind).read_bytes()


def images(found: ScannedShard) -> dict[str, bytes]:
    """Key -> image, read both ways: at its place in the shard, and out of its sample's span."""
    whole = found.path.read_bytes()
    by_key = {}
    for each in found.samples:
        by_key[each.key] = whole[each.image_offset : each.image_offset + each.image_size]
        assert image_in(whole[each.offset : each.offset + each.size])[1] == by_key[each.key]
    return by_key


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_long_names_are_read(tmp_path, kind):
    long = "d" * 80 + "/" + "n" * 60 if kind == "ustar" else "d" * 180 + "/ü" + "n" * 160
    members = sample("a", 0) + sample(long, 1) + sample("b.c/x", 2) + [("b.c/x.seg.png", b"mask")]
    found = scan_shard(write_tar(tmp_path / "s.tar", members, kind))
    assert not found.bad and [each.key for each in found.samples] == ["a", long, "b.c/x"]
    assert [each.label for each in found.samples] == [0, 1, 2]
    assert images(found) == {"a": members[0][1], long: members[2][1], "b.c/x": members[4][1]}
    assert found.samples[1].offset == found.samples[0].offset + found.samples[0].size


def test_the_same_samples_as_webdataset_groups(tmp_path):
    import webdataset

    members = [
        ("./x/a.JPG", b"1"), ("./x/a.cls", b"0"), ("a.v1.jpg", b"2"), ("a.v1.cls", b"1"), ("b.cls", b"2"),
        ("b.rgb.png", b"mask"), ("b.png", b"3"), (".hidden.jpg", b"x"), ("__meta__/c.jpg", b"x"), ("noext", b"x"),
        ("b.json", b"{}"), ("c d/e.f/g.webp", b"4"), ("c d/e.f/g.json", b'{"label": 3}'),
    ]  # fmt: skip
    found = scan_shard(write_tar(tmp_path / "s.tar", members))
    theirs = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    assert [each.key for each in found.samples] == [each["__key__"] for each in theirs] and not found.bad
    assert list(images(found).values()) == [b"1", b"2", b"3", b"4"]
    assert [each.label for each in found.samples] == [0, 1, 2, 3]
    assert found.ignored == {"hidden files and files without extension": 2}


@pytest.mark.parametrize("kind", ["ustar", "pax"])
def test_a_shard_cut_at_any_block_is_found_and_keeps_what_is_whole(tmp_path, kind):
    path = tmp_path / "s.tar"
    whole = shard_of(path, kind=kind)
    expected = images(scan_shard(path))
    ends = {each.key: each.offset + each.size for each in scan_shard(path).samples}
    end_mark = max(ends.values()) + 1024
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        found = scan_shard(path)
        assert images(found) == {key: expected[key] for key, end in ends.items() if end <= size}
        assert bool(found.bad) == (size < end_mark) and all(str(path) in line for line in found.bad)
        torn = [key for key, end in ends.items() if end > size >= end - 1024]  # its image is there, its label is not
        assert all(any(f"{path} {key}: no label" in line for line in found.bad) for key in torn)


@pytest.mark.parametrize("damage", ["block lost", "block zeroed", "block of noise"])
def test_one_bad_block_costs_only_the_sample_it_is_in_and_is_named(tmp_path, damage):
    path = tmp_path / "s.tar"
    whole = shard_of(path)
    before = scan_shard(path).samples
    expected = images(scan_shard(path))
    noise = np.random.default_rng(0).integers(1, 256, 512, dtype=np.uint8).tobytes()
    for place in range(0, before[-1].offset + before[-1].size, 512):
        (hit,) = [each.key for each in before if each.offset <= place < each.offset + each.size]
        put = {"block lost": b"", "block zeroed": bytes(512), "block of noise": noise}[damage]
        path.write_bytes(whole[:place] + put + whole[place + 512 :])
        found = scan_shard(path)
        others = {key: image for key, image in images(found).items() if key != hit}
        assert others == {key: image for key, image in expected.items() if key != hit}, place
        is_in_image = any(each.image_offset <= place < each.image_offset + each.image_size for each in before)
        if damage == "block lost" or not is_in_image:  # headers say nothing of content that kept its length
            assert any(f"{path} {hit}: " in line for line in found.bad), (place, found.bad)
            assert hit not in images(found)
        else:
            assert not found.bad and hit in images(found)


@pytest.mark.parametrize("place", [0, 100, 124, 130, 148, 156, 257, 300])
def test_a_flipped_bit_anywhere_in_a_header_is_found(tmp_path, place):
    path = tmp_path / "s.tar"
    whole = bytearray(shard_of(path))
    offset = scan_shard(path).samples[2].offset
    whole[offset + place] ^= 4
    path.write_bytes(whole)
    found = scan_shard(path)
    assert [each.key for each in found.samples] == ["k0", "k1", "k3", "k4"]
    assert any("damaged header at byte" in line for line in found.bad)
    assert any(f"{path} k2: no image" in line for line in found.bad)


@pytest.mark.parametrize(
    "members, what",
    [
        ([("b.jpg", b"x")], "b: no label, only jpg"),
        ([("b.cls", b"1")], "b: no image, only cls"),
        ([("b.jpg", b"x"), ("b.cls", b"cat")], "b: label b'cat' cannot be used: "),
        ([("b.jpg", b"x"), ("b.cls", b"")], "b: label b'' cannot be used: "),
        ([("b.jpg", b"x"), ("b.cls", b"9" * 5000)], "cannot be used"),
        ([("b.jpg", b"x"), ("b.cls", b"-1")], "b: label b'-1' cannot be used: -1 is below 0"),
        ([("b.jpg", b"x"), ("b.cls", b"7")], "b: label 7 is out of range, there are 7 classes"),
        ([("b.jpg", b"x"), ("b.json", b'{"labels": [1, 7]}')], "b: label 7 is out of range"),
        ([("b.jpg", b"x"), ("b.json", b'{"labels": [1, "x"]}')], "cannot be used"),
        ([("b.jpg", b"x"), ("b.json", b"{")], "cannot be used"),
        ([("b.jpg", b"x"), ("b.json", b"{}")], "no list of integers under"),
        (sample("b", 1) + sample("b", 2), "b: duplicate key"),
        (sample("b", 1) + sample("c", 1) + sample("b", 2), "b: duplicate key"),
        ([("b.1.jpg", b"x"), ("b.1.cls", b"1"), ("b.2.jpg", b"x"), ("b.2.cls", b"1")], "keys end at the first dot"),
        ([("b.pkl", b"x"), ("b.cls", b"1")], "b: no image, only pkl, cls"),
    ],
)
def test_samples_that_cannot_be_used_are_named_by_shard_and_key(tmp_path, members, what):
    path = write_tar(tmp_path / "s.tar", sample("a", 0) + members + sample("z", 3))
    found = scan_shard(path, 7)
    assert len(found.bad) == 1 and found.bad[0].startswith(f"{path} b: ") and what in found.bad[0]
    assert [each.key for each in found.samples if each.key in "az"] == ["a", "z"]


def test_several_labels_come_as_a_list(tmp_path):
    members = [("a.jpg", b"x"), ("a.json", json.dumps({"labels": [3, 17]}).encode()), ("b.jpg", b"x")]
    found = scan_shard(write_tar(tmp_path / "s.tar", [*members, ("b.json", b'{"labels": []}')]))
    assert [each.label for each in found.samples] == [(3, 17), ()]


def test_pickles_are_counted_and_never_opened_and_unsafe_names_are_said(tmp_path):
    members = sample("a", 0) + sample("../up", 1) + sample("/abs", 2)
    members[2:2] = [("a.pyd", b"cposix\nsystem\n"), ("a.pkl", b"x")]
    path = write_tar(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = scan_shard(path)
    assert [each.key for each in found.samples] == ["a", "../up", "/abs"] and not found.bad
    assert found.unsafe == ["../up", "/abs"]
    assert found.ignored["pickles (.pyd, .pkl, .pth), never opened"] == 2
    assert found.ignored["links and other members that are no files"] == 1


def test_what_is_no_tar_is_said(tmp_path):
    path = tmp_path / "s.tar"
    for content, what in ((b"", "empty file"), (b"\x1f\x8b" + bytes(600), "gzip"), (b"hello" * 300, "damaged header")):
        path.write_bytes(content)
        assert len(found := scan_shard(path).bad) == 1 and what in found[0]
    assert "No such file" in scan_shard(tmp_path / "nowhere.tar").bad[0]
    whole = shard_of(path)
    path.write_bytes(whole[: whole.index(bytes(1024))] + bytes(2**21))
    assert any("zeros" in line for line in scan_shard(path).bad)


def test_two_tars_in_one_file_are_both_read_and_said(tmp_path):
    first, second = shard_of(tmp_path / "a.tar", 2), write_tar(tmp_path / "b.tar", sample("z", 9)).read_bytes()
    (tmp_path / "c.tar").write_bytes(first + second)
    found = scan_shard(tmp_path / "c.tar")
    assert [each.key for each in found.samples] == ["k0", "k1", "z"] and "zeros amid the data" in found.bad[0]


@pytest.mark.parametrize("order", [["png", "mask.png", "cls"], ["cls", "mask.png", "png"]])
def test_a_mask_beside_damage_is_never_taken_for_the_image(tmp_path, order):
    members = [
        (f"{key}.{extension}", {"cls": b"1"}.get(extension, extension.encode())) for key in "abc" for extension in order
    ]
    path = write_tar(tmp_path / "s.tar", members)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"b.png")] ^= 1
    path.write_bytes(whole)
    found = scan_shard(path)
    assert images(found) == {"a": b"png", "c": b"png"} and any(f"{path} b: no image" in line for line in found.bad)


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_is_done_to_a_shard_no_sample_is_lost_in_silence(tmp_path, kind):
    """Random bits flipped, blocks lost, doubled, swapped and overwritten: each sample is there whole, or named, or only
    its content changed."""
    rng = np.random.default_rng(len(kind))
    path = tmp_path / "s.tar"
    whole = shard_of(path, 8, kind)
    blocks = [whole[place : place + 512] for place in range(0, len(whole), 512)]
    expected = images(scan_shard(path))
    used = (max(each.offset + each.size for each in scan_shard(path).samples)) // 512
    for _ in range(150):
        damaged = list(blocks)
        for _ in range(rng.integers(1, 4)):
            one, other = rng.integers(used, size=2).tolist()
            match rng.integers(5):
                case 0:
                    del damaged[one]
                case 1:
                    damaged.insert(other, damaged[one])
                case 2:
                    damaged[one], damaged[other] = damaged[other], damaged[one]
                case 3:
                    damaged[one] = rng.bytes(512)
                case 4:
                    block = bytearray(damaged[one])
                    block[rng.integers(512)] ^= 1 << int(rng.integers(8))
                    damaged[one] = bytes(block)
        path.write_bytes(b"".join(damaged))
        found = scan_shard(path)
        there = images(found)
        assert there.keys() == expected.keys() or found.bad
        assert all(str(path) in line for line in found.bad)
