"""Shards that stay where they are: indexed, read, and refused by shard and key where something is wrong."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vitds.data.adopt import index_shards
from vitds.data.decode import encode_png
from vitds.data.health import health_report
from vitds.data.reader import ShardReader
from vitds.data.verify import verify_dataset
from vitds.data.writer import WriteOptions
from vitds.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def png(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8))


def put_shard(path: Path, samples: list[tuple[str, int, str]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """Samples (key, seed, label): label first, then image, then a mask and a pickle that nobody opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for key, seed, label in samples:
            parts = {"json" if label[0] == "{" else "cls": label.encode(), "png": png(seed), "mask.png": b"x"}
            for extension, content in (parts | {"pyd": b"cposix\nsystem\n"}).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three training shards, each of another format and with a long name, and one for validation."""
    for number, kind in enumerate(FORMATS):
        long = "f" * 40 + "/" + "n" * 70 + str(number)
        samples = [(f"a{number}", 10 * number, "0"), (long, 10 * number + 1, "1"), ("same", 10 * number + 2, "2")]
        put_shard(tmp_path / f"data/train/s-{number}.tar", samples, kind)
    put_shard(tmp_path / "data/val/v.tar", [("v", 99, "1"), ("w", 98, "0")])
    return tmp_path / "data"


def index(shards: Path, classes: list[str] | None = None, **options):
    return index_shards(shards, WriteOptions("", **options), classes)


@pytest.mark.parametrize("workers", [1, 2])
def test_foreign_shards_are_read_where_they_are_and_as_webdataset_reads_them(shards, workers):
    webdataset = pytest.importorskip("webdataset")
    before = {path: path.read_bytes() for path in shards.rglob("*.tar")}
    summary = index(shards, workers=workers)
    assert {path: path.read_bytes() for path in shards.rglob("*.tar")} == before
    reader = ShardReader(shards, "train")
    theirs = list(webdataset.WebDataset([str(path) for path in sorted(shards.glob("train/*.tar"))], shardshuffle=False))
    assert len(reader) == len(theirs) == 9
    for sample, other in zip(map(reader.read, range(9)), theirs, strict=True):
        assert (sample.key, sample.data) == (other["__key__"], other["png"]) and sample.label == int(other["cls"])
        assert sample.extension == "png" and Path(other["__url__"]).name == sample.shard
    assert summary.splits["train"].num_images == 9 and summary.splits["val"].num_shards == 1
    assert any("passed over 11 pickles" in line for line in summary.warnings)
    assert reader.classes == ["0", "1", "2"] and set(reader.index.width) == {6}
    assert any("validation has no image of 2" in line for line in summary.warnings)
    repeats = [f"{shards}/train/s-{number}.tar same: duplicate key, first in s-0.tar" for number in (1, 2)]
    assert [line for line in summary.warnings if "duplicate" in line] == repeats
    found = verify_dataset(shards, decode_images=False)
    assert not found.findings and [line for line in found.notes if "duplicate" in line] == repeats


def test_the_index_is_the_same_whoever_makes_it_and_is_not_made_twice(shards):
    index(shards)
    made = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="is indexed already") as caught:
        index(shards)
    (shards / "_info.json").unlink()
    assert str(shards / "_info.json") in caught.value.fix
    index(shards, workers=2)
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == made


def test_damage_is_refused_by_shard_and_key_or_left_out_and_counted(shards):
    path = shards / "train/s-0.tar"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"a0.png")] ^= 1
    path.write_bytes(whole)
    put_shard(shards / "train/s-3.tar", [("../up", 1, "0"), ("b", 2, "0"), ("b", 3, "0"), ("c", 4, "cat")])
    (shards / "train/s-4.tar").touch()
    with pytest.raises(DataError, match="images cannot be used") as caught:
        index(shards)
    for line in ("s-0.tar: damaged header", "s-0.tar a0: no image", "s-3.tar ../up: keys that would leave",
                 "s-3.tar b: duplicate key", "s-3.tar c: label b'cat'", "s-4.tar: empty file"):  # fmt: skip
        assert f"{shards}/train/{line}" in str(caught.value), line
    assert not list(shards.rglob("*.parquet")) and not (shards / "classes.json").exists()
    summary = index(shards, skip_bad=True)
    reader = ShardReader(shards, "train")
    assert len(reader) == 9 and [reader.read(row).key for row in range(9)].count("b") == 1
    assert len(summary.splits["train"].bad) >= 6


def test_what_was_left_out_is_a_note_when_it_is_verified_also_elsewhere_and_what_else_is_wrong_is_found(
    shards, tmp_path
):
    path = shards / "train/s-0.tar"
    path.write_bytes(path.read_bytes().replace(b"a0.png", b"a0.pnh", 1))
    image = put_shard(
        shards / "train/s-3.tar", [("../up", 1, "0"), ("b", 2, "0"), ("b", 3, "0"), ("c", 4, "cat"), ("d", 5, "1")]
    )
    image.write_bytes(image.read_bytes().replace(png(5), b"no image".ljust(len(png(5)))))
    put_shard(shards / "train/s-4.tar", [("all", 1, "no label")])
    (shards / "train/s-5.tar").touch()
    index(shards, skip_bad=True)
    moved = shards.rename(tmp_path / "moved")
    found = verify_dataset(moved, decode_images=True)
    assert found.findings == []
    (note,) = (line for line in found.notes if "left out" in line)
    for name in ("s-0.tar a0: no image", "s-3.tar ../up:", "s-3.tar d:", "s-4.tar", "s-5.tar"):
        assert f"{moved}/train/{name}" in note
    (moved / "train/s-6.tar").touch()
    assert verify_dataset(moved, decode_images=False).findings == [f"{moved}/train/s-6.tar: is not in the index"]


def test_a_pipe_named_like_a_shard_is_named_and_never_waited_for(shards):
    pipe = shards / "train/9.tar"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=f"{pipe}: cannot be opened: no regular file"):
        index(shards)
    assert index(shards, skip_bad=True).splits["train"].bad == ["train/9.tar: cannot be opened: no regular file"]


def test_an_image_that_is_none_is_named(shards):
    path = shards / "val/v.tar"
    path.write_bytes(path.read_bytes().replace(png(98), b"not an image".ljust(len(png(98)))))
    with pytest.raises(DataError, match=rf"1 of \d+ images cannot be used:\n    {path} \w: no image"):
        index(shards)


def test_classes_and_several_labels(shards, tmp_path):
    index(shards, ["cat", "dog", "eel", "fox"])
    assert json.loads((shards / "classes.json").read_text()) == ["cat", "dog", "eel", "fox"]
    (shards / "_info.json").unlink()
    (shards / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(DataError, match="same: label 2 is out of range, there are 2 classes"):
        index(shards)
    put_shard(tmp_path / "several/train/0.tar", [("a", 0, '{"labels": [2, 0]}'), ("b", 1, "1")])
    index(tmp_path / "several")
    reader = ShardReader(tmp_path / "several", "train")
    assert [reader.read(row).label for row in range(2)] == [(0, 2), (1,)]
    put_shard(tmp_path / "none/train/0.tar", [("a", 0, '{"labels": []}')])
    with pytest.raises(DataError, match="no image has a class"):
        index(tmp_path / "none")
    (tmp_path / "none/train").rename(tmp_path / "none/val")
    put_shard(tmp_path / "none/train/0.tar", [("b", 1, '{"labels": [0]}')])
    summary = index(tmp_path / "none", ["cat"])
    assert summary.splits["val"].num_images == 1
    Console(file=io.StringIO()).print(health_report(summary.health))


def test_other_layouts_are_explained(tmp_path):
    put_shard(tmp_path / "flat/s.tar", [("a", 0, "0")])
    with pytest.raises(DataError, match=r"holds no train/\*\.tar, but s\.tar") as caught:
        index(tmp_path / "flat")
    assert f"{tmp_path}/flat/train" in caught.value.fix
    with pytest.raises(DataError, match="holds no train"):
        index(tmp_path / "nowhere")
    put_shard(tmp_path / "hub/train/s.tar", [("a", 0, "0")])
    (tmp_path / "hub/_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"_info\.json that vitds did not write"):
        index(tmp_path / "hub")
