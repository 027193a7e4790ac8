"""Shards of anybody's as a source: other formats, other names, other orders, damage."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vitds.data.decode import encode_png
from vitds.data.reader import ShardReader
from vitds.data.sources import open_source
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError


def png(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8))


def write_shard(path: Path, samples: list[tuple[str, int, object]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """Samples (key, seed, label): the label first, then the image; a list of labels becomes key.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for key, seed, label in samples:
            told = {"labels": label} if isinstance(label, list) else None
            parts = {"json": json.dumps(told).encode()} if told else {"cls": str(label).encode()}
            for extension, content in (parts | {"png": png(seed)}).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def shard(source: object, tmp_path: Path, classes: list[str] | None = None, **options) -> dict[str, dict]:
    """Write what a source holds and read it back: split -> key -> (bytes, label)."""
    out = tmp_path / "out"
    write_dataset(out, open_source(str(source), None, tmp_path, classes), WriteOptions("test", **options))
    readers = {path.parent.name: ShardReader(out, path.parent.name) for path in sorted(out.glob("*/index.parquet"))}
    return {
        name: {sample.key: (sample.data, sample.label) for sample in map(reader.read, range(len(reader)))}
        for name, reader in readers.items()
    }


@pytest.mark.parametrize(
    "names", [("train/{}.tar", "val/{}.tar"), ("in1k-train-{}.tar", "in1k-validation-{}.tar")], ids=["folders", "names"]
)
def test_shards_become_shards_of_ours(tmp_path, names):
    train, val = names
    write_shard(tmp_path / "in" / train.format("000"), [("a", 0, 0), ("b/c", 1, 1)])
    write_shard(tmp_path / "in" / train.format("001"), [("d", 2, 2)])
    write_shard(tmp_path / "in" / val.format("000"), [("a", 3, 1)])
    read = shard(tmp_path / "in", tmp_path)
    assert read == {"train": {"a": (png(0), 0), "b/c": (png(1), 1), "d": (png(2), 2)}, "val": {"a": (png(3), 1)}}
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["0", "1", "2"]


def test_a_pattern_with_braces_and_a_single_shard(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"in/s-{number:02d}.tar", [(f"k{number}", number, number)])
    pattern = f"{tmp_path}/in/s-{{00..01}}.tar"
    assert shard(pattern, tmp_path) == {"train": {"k0": (png(0), 0), "k1": (png(1), 1)}}
    assert open_source(str(tmp_path / "in/s-02.tar"), None, tmp_path)["train"].keys == ["k2"]
    assert list(open_source(str(tmp_path / "in/s-02.tar"), "val", tmp_path)) == ["val"]
    write_shard(tmp_path / "in/val/s.tar", [("v", 9, 0)])
    both = open_source(f"{tmp_path}/in/{{s-00,s-01,val/s}}.tar", None, tmp_path)
    assert list(both) == ["val"] and any("not used: s-00.tar, s-01.tar" in note for note in both["val"].notes)
    with pytest.raises(DataError, match=r"s-03\.tar and 6 more, of 10 shards"):
        open_source(f"{tmp_path}/in/s-{{00..09}}.tar", None, tmp_path)


def test_classes_come_from_a_file_beside_or_are_given(tmp_path):
    write_shard(tmp_path / "in/train/0.tar", [("a", 0, 0), ("b", 1, 2)])
    names = ["cat", "dog", "eel"]
    assert open_source(str(tmp_path / "in"), None, tmp_path, names)["train"].classes == names
    (tmp_path / "in/classes.json").write_text(json.dumps(names))
    assert open_source(str(tmp_path / "in"), None, tmp_path)["train"].classes == names
    (tmp_path / "in/classes.json").write_text("cat\ndog\n")
    source = open_source(str(tmp_path / "in"), None, tmp_path)["train"]
    assert source.bad == [f"{tmp_path}/in/train/0.tar b: label 2 is out of range, there are 2 classes"]
    for text, message in (("{}", "expected a JSON list"), ("cat\ncat\n", '"cat" is there twice')):
        (tmp_path / "in/classes.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / "in"), None, tmp_path)


def test_several_labels_stay_several(tmp_path):
    write_shard(tmp_path / "in/train/0.tar", [("a", 0, [2, 0]), ("b", 1, [1])])
    assert shard(tmp_path / "in", tmp_path) == {"train": {"a": (png(0), (0, 2)), "b": (png(1), (1,))}}


def test_what_is_wrong_is_refused_by_shard_and_key_or_left_out(tmp_path):
    path = write_shard(tmp_path / "in/train/0.tar", [("a", 0, 0), ("b", 1, "cat"), ("../c", 2, 1), ("d", 3, 2)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"d.png")])
    with pytest.raises(DataError, match="images cannot be used") as caught:
        shard(tmp_path / "in", tmp_path)
    assert f"{path} b: label b'cat'" in str(caught.value) and f"{path}: cut off" in str(caught.value)
    read = shard(tmp_path / "in", tmp_path, skip_bad=True)["train"]
    assert sorted(read) == ["__/c", "a"] and read["__/c"] == (png(2), 1)
    source = open_source(str(tmp_path / "in"), None, tmp_path)["train"]
    assert any("renamed 1 keys" in note and f"{path} ../c" in note for note in source.notes)


def test_keys_that_repeat_across_shards_are_renamed_and_named_by_both(tmp_path):
    first = write_shard(tmp_path / "in/train/0.tar", [("a", 0, 0), ("b", 1, 1)])
    second = write_shard(tmp_path / "in/train/1.tar", [("c", 2, 0), ("a", 3, 1)])
    source = open_source(str(tmp_path / "in"), None, tmp_path)["train"]
    (note,) = [note for note in source.notes if "renamed" in note]
    assert "renamed 1 samples" in note and f"{first} a, {second} a" in note
    read = shard(tmp_path / "in", tmp_path)["train"]
    assert read["a-00000000"] == (png(0), 0) and read["a-00000003"] == (png(3), 1) and len(read) == 4


def test_an_archive_left_in_a_tree_of_class_folders_is_no_shard(tmp_path):
    (tmp_path / "in/train/cat").mkdir(parents=True)
    (tmp_path / "in/train/cat/a.png").write_bytes(png(0))
    write_shard(tmp_path / "in/train.tar", [("x", 0, 0)])
    assert open_source(str(tmp_path / "in"), None, tmp_path)["train"].keys == ["cat/a"]


def test_a_data_set_of_ours_is_a_source_too(tmp_path):
    write_shard(tmp_path / "in/train/0.tar", [("a", 0, 0), ("b", 1, 1)])
    first = shard(tmp_path / "in", tmp_path, ["cat", "dog"])
    (tmp_path / "out").rename(tmp_path / "ours")
    assert shard(tmp_path / "ours", tmp_path) == first
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]
