import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitds.data.decode import decode, encode_png
from vitds.data.reader import ShardReader
from vitds.data.sources import open_source
from vitds.data.sources.folders import class_folders
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def make_tree(root: Path, names: list[str], suffix: str = ".JPEG") -> Path:
    for seed, name in enumerate(names):
        path = root / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed))
    return root


def shard(source: Path | str, tmp_path: Path, split: str | None = None, **options) -> dict[str, dict[str, tuple]]:
    """Write what a source holds and read it back: split -> key -> (bytes, class name)."""
    out = tmp_path / "out"
    write_dataset(out, open_source(str(source), split, tmp_path), WriteOptions("test", **options))
    readers = {path.parent.name: ShardReader(out, path.parent.name) for path in sorted(out.glob("*/index.parquet"))}
    samples = {name: [reader.read(i) for i in range(len(reader))] for name, reader in readers.items()}
    classes = json.loads((out / "classes.json").read_text())
    return {name: {s.key: (s.data, classes[s.label]) for s in of} for name, of in samples.items()}


# Class folders


def test_a_tree_with_splits_keeps_bytes_keys_and_classes(tmp_path):
    make_tree(tmp_path / "in/train", ["dog/a", "cat/a", "cat/b", "eel/deep/c.d"])
    make_tree(tmp_path / "in/val", ["cat/v", "dog/v", "eel/v"])
    read = shard(tmp_path / "in", tmp_path, workers=2)
    assert read["train"] == {
        "dog/a": (image_bytes(0), "dog"), "cat/a": (image_bytes(1), "cat"), "cat/b": (image_bytes(2), "cat"),
        "eel/deep/c_d": (image_bytes(3), "eel"),
    }  # fmt: skip
    assert list(read["val"]) == ["cat/v", "dog/v", "eel/v"]


@pytest.mark.parametrize("split, expected", [(None, "train"), ("train", "train"), ("val", "val")])
def test_bare_class_folders_are_the_split_asked_for(tmp_path, split, expected):
    make_tree(tmp_path / "in", ["cat/a", "train/a"])  # a class may be called train
    assert {name: len(of) for name, of in shard(tmp_path / "in", tmp_path, split).items()} == {expected: 2}


def test_splits_are_known_in_any_case_and_what_lies_outside_of_class_folders_is_said(tmp_path):
    root = make_tree(tmp_path / "in", ["Train/cat/a", "Train/dog/a", "Train/b", "Valid/cat/c", "test/d"])
    sources = class_folders(root, None)
    assert {split: source.keys for split, source in sources.items()} == {"train": ["cat/a", "dog/a"], "val": ["cat/c"]}
    assert sources["train"].notes == [
        f"{root}/Train: left out 1 images that lie outside of the class folders",
        f"{root}/test: not used: images, but no class folders",
    ]


def test_folders_that_are_no_classes_are_refused_or_said(tmp_path):
    for names, found in ((["train/train/cat/a"], "train"), (["train/cat-1", "test/1"], "test, train")):
        with pytest.raises(DataError, match=f"called like splits, not like classes: {found}\n"):
            class_folders(make_tree(tmp_path / found, names), None)
    root = make_tree(tmp_path / "deep", ["Training/cat/a", "Testing/dog/a"])
    assert class_folders(root, None)["train"].notes == [
        f"{root}: all images lie deeper, as Testing/dog/a.JPEG; the classes are called Testing, Training"
    ]


def test_names_of_any_bytes_are_written_and_shown(tmp_path):
    root = os.fsencode(tmp_path / "in")
    for name in (b"caf\xe9/\xff1.jpg", b"caf\xe9/\xff2.jpg", b"tea/\xff.jpg"):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(image_bytes(1) if b"2" not in name else b"no image")
    with pytest.raises(DataError, match=re.escape(rf"{tmp_path}/in/caf\xe9/\xff2.jpg: no image")):
        shard(tmp_path / "in", tmp_path)
    read = shard(tmp_path / "in", tmp_path, skip_bad=True)["train"]
    assert {key: name for key, (_, name) in read.items()} == {"caf_/_1": r"caf\xe9", "tea/_": "tea"}
    health = json.loads((tmp_path / "out/health.json").read_text(encoding="utf-8"))
    assert health["splits"]["train"]["unreadable"] == [r"caf\xe9/\xff2.jpg: no image: UnidentifiedImageError"]


def test_one_split_of_a_tree(tmp_path):
    make_tree(tmp_path / "in/train", ["cat/a"])
    make_tree(tmp_path / "in/val", ["cat/v"])
    assert list(shard(tmp_path / "in", tmp_path, "val")) == ["val"]
    make_tree(tmp_path / "in2/train", ["cat/a"])
    with pytest.raises(DataError, match='no split "val", only train'):
        open_source(str(tmp_path / "in2"), "val", tmp_path)


def test_other_files_are_ignored_aloud_and_hidden_ones_in_silence(tmp_path):
    make_tree(tmp_path / "in", ["cat/a", "dog/b", "dog/.hidden"])
    make_tree(tmp_path / "in", ["cat/notes", "cat/more"], ".txt")
    (tmp_path / "in/yak").mkdir()
    summary = write_dataset(tmp_path / "out", open_source(str(tmp_path / "in"), None, tmp_path), WriteOptions("test"))
    assert summary.splits["train"].num_images == 2 and summary.num_classes == 3
    assert any(".txt (2)" in line for line in summary.warnings) and any("yak" in line for line in summary.warnings)


@pytest.mark.parametrize("here", [".", "in"])
def test_a_relative_path_gives_the_same_keys_and_the_sizes_of_its_files(tmp_path, monkeypatch, here):
    make_tree(tmp_path / "in", ["cat/a", "dog/b"])
    monkeypatch.chdir(tmp_path / "in" if here == "." else tmp_path)
    source = open_source(here, None, tmp_path)["train"]
    assert source.keys == ["cat/a", "dog/b"] and source.read(1) == image_bytes(1)
    assert source.sizes().tolist() == [len(image_bytes(seed)) for seed in range(2)]


def test_a_link_to_nothing_is_named_when_it_is_read(tmp_path):
    make_tree(tmp_path / "in", ["cat/a"])
    (tmp_path / "in/cat/b.jpg").symlink_to("nowhere")
    assert open_source(str(tmp_path / "in"), None, tmp_path)["train"].sizes().tolist() == [len(image_bytes(0)), 0]
    with pytest.raises(DataError, match=r"in/cat/b\.jpg: .*No such file"):
        shard(tmp_path / "in", tmp_path)


def test_a_pipe_named_like_an_image_is_named_and_never_waited_for(tmp_path):
    pipe = make_tree(tmp_path / "in", ["cat/1"]) / "cat/pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=f"{pipe}: (?s:.*)no regular file"):
        shard(tmp_path / "in", tmp_path)
    assert shard(tmp_path / "in", tmp_path, skip_bad=True)["train"].keys() == {"cat/1"}


def test_a_link_back_up_is_not_entered_and_said_while_others_are_followed(tmp_path):
    make_tree(tmp_path / "in/train", ["cat/a", "dog/b"])
    make_tree(tmp_path / "in/val", ["cat/v", "dog/v"])
    make_tree(tmp_path / "elsewhere", ["deep/c"])
    (tmp_path / "in/train/cat/here").symlink_to(".")
    (tmp_path / "in/train/cat/split").symlink_to("..")
    (tmp_path / "in/train/dog/all").symlink_to("../..")
    (tmp_path / "in/train/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/back").symlink_to("..")
    train = open_source(str(tmp_path / "in"), None, tmp_path)["train"]
    assert train.keys == ["cat/a", "dog/b", "dog/more/deep/c"] and not train.bad
    loops = ("cat/here", "cat/split", "dog/all", "dog/more/deep/back")
    assert train.notes == [
        f"{tmp_path}/in/train/{loop}: leads back to a folder that it lies in, and is not entered" for loop in loops
    ]


def test_a_folder_that_cannot_be_listed_is_named_or_left_out(tmp_path, monkeypatch):
    make_tree(tmp_path / "in", ["cat/a", "dog/b"])
    monkeypatch.chdir(tmp_path / "in/cat")
    for _ in range(os.pathconf("/", "PC_PATH_MAX") // 200 + 1):  # a path too long to be opened, also for root
        os.mkdir("x" * 200)
        os.chdir("x" * 200)
    source = class_folders(tmp_path / "in", None)
    with pytest.raises(DataError, match=r"1 of 3 images cannot be used") as caught:
        write_dataset(tmp_path / "out", source, WriteOptions("test"))
    assert f"{tmp_path}/in/cat/xxx" in str(caught.value) and "cannot be listed: File name too long" in str(caught.value)
    summary = write_dataset(tmp_path / "out", source, WriteOptions("test", skip_bad=True))
    [left_out] = summary.splits["train"].bad
    assert left_out.startswith("cat/xxx") and summary.splits["train"].num_images == 2


def test_names_of_classes_are_not_given_where_they_are_said(tmp_path):
    make_tree(tmp_path / "in", ["cat/a"])
    with pytest.raises(DataError, match="says the names of its classes itself"):
        open_source(str(tmp_path / "in"), None, tmp_path, ["dog"])


def test_files_of_one_stem_both_stay(tmp_path):
    make_tree(tmp_path / "in", ["cat/a"], ".jpg")
    make_tree(tmp_path / "in", ["cat/a"], ".png")
    assert list(shard(tmp_path / "in", tmp_path)["train"]) in (
        ["cat/a-00000000", "cat/a-00000001"],
        ["cat/a-00000001", "cat/a-00000000"],
    )


def test_an_unreadable_image_is_named_by_its_path(tmp_path):
    make_tree(tmp_path / "in", ["cat/a"])
    (tmp_path / "in/cat/empty.jpg").touch()
    (tmp_path / "in/cat/text.jpg").write_text("hello")
    with pytest.raises(DataError, match="2 of 3 images cannot be used") as caught:
        shard(tmp_path / "in", tmp_path)
    assert f"{tmp_path}/in/cat/empty.jpg: empty file" in str(caught.value)
    assert f"{tmp_path}/in/cat/text.jpg: no image" in str(caught.value)
    assert list(shard(tmp_path / "in", tmp_path, skip_bad=True)["train"]) == ["cat/a"]


@pytest.mark.parametrize("content", [None, "empty", "file"])
def test_what_is_no_source_is_refused(tmp_path, content):
    path = tmp_path / "in"
    if content == "empty":
        path.mkdir()
    if content == "file":
        path.write_text("hello")
    with pytest.raises(DataError) as caught:
        open_source(str(path), None, tmp_path)
    assert str(path) in str(caught.value) and caught.value.exit_code == 3


# Parquet


def write_parquet(
    path: Path,
    labels: list,
    names: list[str] | None = None,
    image="image",
    label="label",
    paths=True,
    offset=0,
    **columns,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {"bytes": image_bytes(offset + row), "path": f"x/{row}.jpg" if paths else None} for row in range(len(labels))
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(images, kind), label: pa.array(labels, pa.int64()), **columns})
    if names:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}/0000.parquet", "{}.parquet"])
def test_a_directory_of_parquet_has_the_splits_its_names_say(tmp_path, layout):
    for seed, split in enumerate(("train", "test", "validation")):
        write_parquet(tmp_path / "in" / layout.format(split), [0, 1, 1], ["cat", "dog"], offset=10 * seed)
    read = shard(tmp_path / "in", tmp_path)
    assert read["train"] == {f"x/{row}": (image_bytes(row), ["cat", "dog", "dog"][row]) for row in range(3)}
    assert [data for data, _ in read["val"].values()] == [
        image_bytes(20 + row) for row in range(3)
    ]  # not the test images


def test_test_is_validation_where_there_is_no_other(tmp_path):
    write_parquet(tmp_path / "in/train-0.parquet", [0, 1])
    write_parquet(tmp_path / "in/test-0.parquet", [0, 1], offset=5)
    assert len(shard(tmp_path / "in", tmp_path)["val"]) == 2


def test_several_files_make_one_split_and_may_lack_paths_and_names(tmp_path):
    for part in range(3):
        write_parquet(tmp_path / f"in/train-{part}.parquet", [part, 1], paths=False, offset=2 * part)
    read = shard(tmp_path / "in", tmp_path)["train"]
    assert {key: name for key, (_, name) in read.items()} == {
        f"row-{row:08d}": str(label) for row, label in enumerate([0, 1, 1, 1, 2, 1])
    }
    assert all(read[f"row-{row:08d}"][0] == image_bytes(row) for row in range(6))


def test_one_file_and_the_column_names_of_cifar100(tmp_path):
    path = tmp_path / "part.parquet"
    write_parquet(path, [1, 0], ["apple", "bear"], "img", "fine_label", coarse_label=pa.array([5, 6]))
    assert {name for _, name in shard(path, tmp_path)["train"].values()} == {"apple", "bear"}


def test_a_label_that_no_class_has_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 2], ["cat", "dog"])
    with pytest.raises(DataError, match="label 2, but only 2"):
        open_source(str(tmp_path / "train.parquet"), None, tmp_path)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int8(), pa.uint64()])
def test_labels_of_any_width(tmp_path, kind):
    images = pa.array([image_bytes(row) for row in range(3)], pa.large_binary())
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": images, "label": pa.array([127, None, 3], kind)}), path)
    source = open_source(str(path), None, tmp_path)["train"]
    assert source.labels.tolist() == [127, 3] and len(source.classes) == 128
    pq.write_table(pa.table({"image": images, "label": pa.array([[127, 3], [], [3]], pa.list_(kind))}), path)
    source = open_source(str(path), None, tmp_path)["train"]
    assert source.labels == [(3, 127), (), (3,)] and len(source.classes) == 128


def test_a_label_that_counts_no_classes_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 2**60])
    with pytest.raises(DataError, match=f"label {2**60} is no position"):
        open_source(str(tmp_path / "train.parquet"), None, tmp_path)


def test_paths_make_keys_that_stay_below_where_they_are_extracted(tmp_path):
    paths = ["/home/me/a.b/1.jpg", "../x/2.jpg", ".", None, ""]
    images = [{"bytes": image_bytes(row), "path": path} for row, path in enumerate(paths)]
    pq.write_table(pa.table({"image": images, "label": [0] * len(paths)}), tmp_path / "train.parquet")
    source = open_source(str(tmp_path / "train.parquet"), None, tmp_path)["train"]
    assert source.keys == ["home/me/a.b/1", "x/2", ".", "row-00000003", "row-00000004"]
    assert len(shard(tmp_path / "train.parquet", tmp_path)["train"]) == len(paths)


def test_images_that_the_table_only_points_to_are_named(tmp_path):
    images = [{"bytes": image_bytes(0), "path": "a.jpg"}, {"bytes": None, "path": "/elsewhere/b.jpg"}]
    pq.write_table(pa.table({"image": images, "label": [0, 0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"row 1 \(elsewhere/b\): its bytes are not in the table"):
        shard(tmp_path / "train.parquet", tmp_path)


def test_files_of_other_splits_are_named(tmp_path):
    for name in ("train", "test", "unlabeled"):
        write_parquet(tmp_path / f"in/{name}-0.parquet", [0, 1])
    sources = open_source(str(tmp_path / "in"), None, tmp_path)
    assert sources["train"].notes == [f"{tmp_path / 'in'}: not used: unlabeled-0.parquet"]
    for number in range(1, 6):
        write_parquet(tmp_path / f"in/unlabeled-{number}.parquet", [0, 1])
    (note,) = open_source(str(tmp_path / "in"), None, tmp_path)["train"].notes
    assert note.endswith("unlabeled-0.parquet, unlabeled-1.parquet, unlabeled-2.parquet and 3 more")


def test_rows_without_a_label_are_named_or_left_out(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, [None, 0, -1, 1], ["cat", "dog"])
    named = [rf"{path} row {row} \(x/{row}\): no label" for row in (0, 2)]
    with pytest.raises(DataError, match=rf"2 of 4 images cannot be used:\n    {named[0]}\n    {named[1]}"):
        shard(path, tmp_path)
    read = shard(path, tmp_path, skip_bad=True, shard_bytes=5000)["train"]
    assert read == {"x/1": (image_bytes(1), "cat"), "x/3": (image_bytes(3), "dog")}
    health = json.loads((tmp_path / "out/health.json").read_text())
    assert health["splits"]["train"]["unreadable"] == ["row 0 (x/0): no label", "row 2 (x/2): no label"]


@pytest.mark.parametrize("nested", [lambda names: [{"names": names}], lambda names: {"feature": {"names": names}}])
def test_lists_of_labels_stay_lists(tmp_path, nested):
    images = pa.array([image_bytes(row) for row in range(3)], pa.binary())
    table = pa.table({"image": images, "labels": pa.array([[2, 0], None, [1]], pa.list_(pa.int64()))})
    features = {"image": {"_type": "Image"}, "labels": nested(["cat", "dog", "eel"])}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_source(str(tmp_path / "train.parquet"), None, tmp_path)["train"]
    assert source.labels == [(0, 2), (), (1,)] and source.classes == ["cat", "dog", "eel"]
    named = open_source(str(tmp_path / "train.parquet"), None, tmp_path, ["a", "b", "c"])["train"]
    assert named.classes == ["a", "b", "c"]
    pq.write_table(table.set_column(1, "labels", pa.array([[2, None], [], [1]])), tmp_path / "train.parquet")
    source = open_source(str(tmp_path / "train.parquet"), None, tmp_path)["train"]
    assert source.labels == [(), (1,)] and source.keys == ["row-00000001", "row-00000002"]
    assert source.bad == [f"{tmp_path / 'train.parquet'} row 0 (row-00000000): no label"]


def write_labels(path: Path, labels: pa.Array, **columns) -> Path:
    images = pa.array([image_bytes(row) for row in range(len(labels))], pa.binary())
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path)
    return path


@pytest.mark.parametrize("encode", [lambda labels: labels, pa.Array.dictionary_encode], ids=["plain", "dictionary"])
def test_names_as_labels_are_numbered_in_sorted_order_through_all_splits(tmp_path, encode):
    write_labels(tmp_path / "train-0.parquet", encode(pa.array(["owl", "cat", None, " "])), id=[0, 1, 2, 3])
    write_labels(tmp_path / "train-1.parquet", encode(pa.array(["dog", "owl"])), id=[4, 5])
    write_labels(tmp_path / "val.parquet", encode(pa.array(["dog", "cat"])), id=[6, 7])
    sources = open_source(str(tmp_path), None, tmp_path)
    train, val = sources["train"], sources["val"]
    assert train.classes == val.classes == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [2, 0, 1, 2] and val.labels.tolist() == [1, 0]
    assert [line.partition(" row ")[2] for line in train.bad] == [
        f"{row} (row-0000000{row}): no label" for row in (2, 3)
    ]
    read = shard(tmp_path, tmp_path, skip_bad=True)
    assert read["val"] == {"row-00000000": (image_bytes(0), "dog"), "row-00000001": (image_bytes(1), "cat")}
    assert read["train"]["row-00000004"] == (image_bytes(0), "dog")


def test_names_as_labels_go_by_the_classes_that_are_given(tmp_path):
    path = write_labels(tmp_path / "train.parquet", pa.array(["owl", "cta", "cat"]))
    source = open_source(str(path), None, tmp_path, ["owl", "cat", "fox"])["train"]
    assert source.labels.tolist() == [0, 1] and source.classes == ["owl", "cat", "fox"]
    assert source.bad == [f'{path} row 1 (row-00000001): label cta is none of the 3 classes (did you mean "cat"?)']
    path = write_labels(tmp_path / "train.parquet", pa.array(["2", "0", "10"]))
    source = open_source(str(path), None, tmp_path)["train"]
    assert source.labels.tolist() == [2, 0, 10] and len(source.classes) == 11
    path = write_labels(tmp_path / "train.parquet", pa.array(["2", "owl"]))
    with pytest.raises(DataError, match=r'names and integers: "owl" in .* row 1, "2" in .* row 0'):
        open_source(str(path), None, tmp_path)


@pytest.mark.parametrize("item", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_lists_of_names_are_several_labels(tmp_path, item):
    labels = pa.array([["owl", "cat"], [], None, ["cat", "cat"], ["owl", None]], pa.list_(item))
    path = write_labels(tmp_path / "train.parquet", labels)
    source = open_source(str(path), None, tmp_path)["train"]
    assert source.labels == [(0, 1), (), (), (0,)] and source.classes == ["cat", "owl"]
    assert source.bad == [f"{path} row 4 (row-00000004): no label"]


@pytest.mark.parametrize("labels", [[0.5, 1.0], [True, False], [[0.5], [1.0]]], ids=["float", "bool", "list"])
def test_labels_of_another_type_are_refused_by_it(tmp_path, labels):
    path = write_labels(tmp_path / "train.parquet", pa.array(labels), id=[0, 1])
    with pytest.raises(DataError, match=f'column "label" is of type .*{"bool" if labels[0] is True else "double"}'):
        open_source(str(path), None, tmp_path)


def test_parquet_without_images_or_that_is_none_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("hello")
    for name, message in (("a", "no column for the Image among text, label"), ("b", "cannot be read")):
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / f"{name}.parquet"), None, tmp_path)


# CIFAR: its own archives are checked by md5, so the tests' small ones come with md5 sums of their own


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 archive and folder of 5 x 3 training and 4 test images, and its pixels."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = {}

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def write_batch(name: str, num_images: int) -> list[str]:
        pixels[name] = random.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
        content = {"data": pixels[name].reshape(num_images, -1), "labels": [row % 10 for row in range(num_images)]}
        return [name, write(name, content)]

    monkeypatch.setattr(CIFAR10, "train_list", [write_batch(name, 3) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [write_batch("test_batch", 3)])
    md5 = write("batches.meta", {"label_names": [f"thing-{label}" for label in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5})
    archive = tmp_path / "archive" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive, folder, pixels


@pytest.mark.parametrize("form", ["archive", "its directory", "folder", "the folder's directory", "word"])
def test_cifar_becomes_lossless_png(cifar, tmp_path, form):
    archive, folder, pixels = cifar
    if form == "word":
        (tmp_path / archive.name).write_bytes(archive.read_bytes())  # as if torchvision had downloaded it
    source = {
        "archive": archive, "its directory": archive.parent, "folder": folder,
        "the folder's directory": folder.parent, "word": "cifar10",
    }[form]  # fmt: skip
    read = shard(source, tmp_path)
    assert len(read["train"]) == 15 and list(read["val"]) == ["test-00000", "test-00001", "test-00002"]
    data, name = read["train"]["train-00007"]
    assert data.startswith(b"\x89PNG") and name == "thing-1"
    np.testing.assert_array_equal(decode(data), pixels["data_batch_3"][1])


def test_damaged_cifar_is_refused_and_never_unpickled(cifar, tmp_path):
    archive, folder, _ = cifar
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(DataError, match="md5"):
        open_source(str(archive), None, tmp_path)
    (folder / "data_batch_2").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exit\x85R.")
    with pytest.raises(DataError, match="missing or damaged"):
        open_source(str(folder), None, tmp_path)


# Digits


def test_digits_are_split_by_their_number(tmp_path):
    from sklearn.datasets import load_digits

    read, bunch = shard("digits", tmp_path), load_digits()
    assert {key for key in read["val"]} == {f"digit-{row:04d}" for row in range(0, 1797, 5)} and len(read["val"]) == 360
    assert len(read["train"]) == 1437 and not read["train"].keys() & read["val"].keys()
    for row in (0, 1, 999, 1796):
        data, name = (read["train"] | read["val"])[f"digit-{row:04d}"]
        assert name == str(bunch.target[row])
        np.testing.assert_array_equal(decode(data)[0], np.rint(bunch.images[row] / 16 * 255).astype(np.uint8))


def test_a_directory_too_high_is_refused_with_the_right_one(tmp_path):
    """Pointed at the parent of train/ and val/, the folder in between must not become the one class."""
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        (tmp_path / "images" / split / "cat" / "1.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8)))
    with pytest.raises(DataError, match="holds splits") as error:
        open_source(str(tmp_path), None, tmp_path)
    assert f"did you mean {tmp_path / 'images'}" in error.value.fix
