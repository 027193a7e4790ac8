import io
import json
import os
import tarfile
import tempfile

import numpy as np
import pytest
from data_sets import files_of, multi_label_source, pixel_source, write_pixels

from vitds.data.adopt import index_shards
from vitds.data.index import read_index
from vitds.data.plan import SplitPlan
from vitds.data.reader import ShardReader
from vitds.data.sources import PixelSource
from vitds.data.writer import WriteOptions, merge_parts, write_dataset
from vitds.errors import DataError


def with_classes(names: list[str], labels: list[int]) -> PixelSource:
    source = pixel_source(len(labels), len(names))
    source.classes, source.labels = names, np.array(labels)
    return source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("written") / "out")


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, dataset):
    expected = files_of(dataset)
    assert len(expected) == 7 + 4 + 2 + 3
    for workers in (2, 3):
        assert files_of(write_pixels(tmp_path / f"by-{workers}", workers=workers)) == expected


@pytest.fixture(scope="module", params=["by count", "by bytes", "in parts", "indexed"])
def any_dataset(request, tmp_path_factory, dataset):
    """Shards of every origin, with the same images: ours, and somebody else's that were only indexed."""
    out = tmp_path_factory.mktemp("any") / "out"
    if request.param == "by count":
        return dataset
    if request.param == "by bytes":
        return write_pixels(out, shard_bytes=20_000)
    if request.param == "in parts":
        for number in (1, 2, 3):
            write_pixels(out, part=(number, 3))
        return merge_parts(out).path
    for split, num_samples, seed in (("train", 53, 1), ("val", 29, 2)):
        (out / split).mkdir(parents=True)
        source = pixel_source(num_samples, seed=seed)
        for first in range(0, num_samples, 20):
            with tarfile.open(out / split / f"theirs-{first:03d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for row in range(first, min(first + 20, num_samples)):
                    for suffix, content in (("png", source.read(row)), ("cls", b"%d" % source.labels[row])):
                        member = tarfile.TarInfo(f"{source.keys[row]}.{suffix}")
                        member.size, member.mtime = len(content), 0.5
                        tar.addfile(member, io.BytesIO(content))
    return index_shards(out, WriteOptions("theirs")).path


def test_webdataset_reads_the_shards(any_dataset):
    import webdataset

    shards = sorted(str(path) for path in (any_dataset / "train").glob("*.tar"))
    assert len(shards) > 2
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    source = pixel_source(53, seed=1)
    row_of = {key: row for row, key in enumerate(source.keys)}
    assert sorted(row_of[key] for key, _, _ in samples) == list(range(53))
    for key, image, label in samples:
        assert label == source.labels[row_of[key]]
        np.testing.assert_array_equal(image, source.images[row_of[key]])


@pytest.mark.parametrize("split, num_samples", [("train", 53), ("val", 29)])
def test_timm_reads_the_data_set(any_dataset, split, num_samples):
    timm_data = pytest.importorskip("timm.data")
    source = pixel_source(num_samples, seed={"train": 1, "val": 2}[split])
    read = timm_data.create_dataset("wds/", root=str(any_dataset), split=split)
    assert len(read) == num_samples
    labels = {np.asarray(image).tobytes(): target for image, target in read}
    assert labels == {image.tobytes(): label for image, label in zip(source.images, source.labels, strict=True)}


def test_the_index_and_info_describe_what_was_written(dataset):
    index = read_index(dataset / "train" / "index.parquet")
    assert index.shard_lengths() == [8] * 6 + [5]
    assert set(index.width) == {15} and set(index.height) == {12}
    for shard, end in zip(index.shards, index.shard_ends(), strict=True):
        assert (dataset / "train" / shard).stat().st_size == end + 1024
    info = json.loads((dataset / "_info.json").read_text())["splits"]["val"]
    assert info["num_samples"] == 29 and info["shard_lengths"] == [8, 8, 8, 5]
    assert info["class_counts"] == [6, 6, 6, 6, 5]
    assert info["filenames"][0] == "val/pixels-val-000000.tar"


def test_training_is_shuffled_once_and_validation_is_not(dataset):
    train, val = (read_index(dataset / split / "index.parquet").key.to_pylist() for split in ("train", "val"))
    assert val == [f"image-{row}" for row in range(29)]
    assert train != sorted(train, key=lambda key: int(key[6:])) and len(set(train)) == 53


def test_keys_are_ascii_without_dots_short_and_unique(tmp_path):
    source = pixel_source(4)
    source.keys = ["a.b/ü", "a_b/_", "x" * 300, "x" * 299]
    write_dataset(tmp_path / "out", {"train": source}, WriteOptions("keys"))
    keys = sorted(read_index(tmp_path / "out/train/index.parquet").key.to_pylist())
    assert keys[:2] == ["a_b/_-00000000", "a_b/_-00000001"]
    assert [key.lstrip("x") for key in keys[2:]] == ["-00000002", "-00000003"]


@pytest.mark.parametrize(
    "keys, expected",
    [
        (["c/a-00000001", "c/a", "c/a"], ["c/a-00000001-00000000", "c/a-00000001", "c/a-00000002"]),
        (
            ["a", "a", "a-00000001", "a-00000001-00000002"],
            ["a-00000000", "a-00000001", "a-00000001-00000002", "a-00000001-00000002-00000003"],
        ),
    ],
)
def test_a_key_made_unique_is_no_other_samples_key(keys, expected):
    source = pixel_source(len(keys))
    source.keys = keys
    plan = SplitPlan("val", source, source.classes, source.labels, WriteOptions("keys"))
    assert plan.keys == expected and len(set(expected)) == len(keys)


def test_a_split_is_added_to_a_data_set_of_ours_and_never_replaced(tmp_path):
    out, options = tmp_path / "out", WriteOptions("pixels", samples_per_shard=8)
    write_dataset(out, {"train": pixel_source(53, seed=1)}, options)
    before = files_of(out)
    with pytest.raises(DataError, match='a split "train" already') as caught:
        write_dataset(out, {"train": pixel_source(10)}, options)
    assert caught.value.exit_code == 3 and files_of(out) == before
    write_dataset(out, {"val": pixel_source(29, seed=2)}, options)
    assert files_of(out) == files_of(write_pixels(tmp_path / "at-once"))


@pytest.mark.parametrize("splits", [1, [], {"train": 1}, {"train": None}])
def test_a_damaged_health_report_replaces_no_split(tmp_path, splits):
    out, options = tmp_path / "out", WriteOptions("pixels", samples_per_shard=8)
    write_dataset(out, {"train": pixel_source(53, seed=1)}, options)
    (out / "health.json").write_text(json.dumps({"splits": splits}))
    before = files_of(out)
    with pytest.raises(DataError, match='a split "train" already'):
        write_dataset(out, {"train": pixel_source(53, seed=1)}, options)
    assert files_of(out) == before


def test_labels_are_matched_by_name_and_missing_validation_classes_are_named(tmp_path):
    train = with_classes(["cat", "dog", "eel"], [0, 1, 2, 2])
    val = with_classes(["eel"], [0, 0])
    summary = write_dataset(tmp_path / "out", {"train": train, "val": val}, WriteOptions("animals"))
    assert ShardReader(tmp_path / "out", "val").index.label.tolist() == [2, 2]
    assert len(summary.warnings) == 1 and "cat, dog" in summary.warnings[0]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "train_labels, val_names", [([0, 1], ["cat", "dog", "yak"]), ([0, 0], ["cat", "dog"])], ids=["unknown", "untrained"]
)
def test_a_validation_class_that_training_lacks_is_refused(tmp_path, at_once, train_labels, val_names):
    train = with_classes(["cat", "dog"], train_labels)
    val = with_classes(val_names, list(range(len(val_names))))
    out = tmp_path / "out"
    if not at_once:
        write_dataset(out, {"train": train}, WriteOptions("animals"))
    with pytest.raises(DataError, match=val_names[-1]):
        write_dataset(out, {"train": train, "val": val} if at_once else {"val": val}, WriteOptions("animals"))
    assert not (out / "val").exists() and not (tmp_path / "out.partial").exists()


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="no data set of vitds"):
        write_pixels(tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="was not made by vitds"):
        write_pixels(tmp_path / "new")
    assert (tmp_path / "out" / "thesis.txt").exists() and (tmp_path / "new.partial" / "thesis.txt").exists()


class Holey(PixelSource):
    def read(self, row: int) -> bytes:
        return [b"", b"not an image", super().read(row)][min(row, 2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_cannot_be_used_are_named_or_left_out(tmp_path, workers):
    source = Holey(**vars(pixel_source(20)))
    options = {"name": "holey", "samples_per_shard": 8, "workers": workers}
    with pytest.raises(DataError, match="2 of 20 images") as caught:
        write_dataset(tmp_path / "out", {"train": source}, WriteOptions(**options))
    assert "pixels image-0: empty file" in str(caught.value) and "pixels image-1: no image" in str(caught.value)
    assert not (tmp_path / "out").exists()
    summary = write_dataset(tmp_path / "out", {"train": source}, WriteOptions(**options, skip_bad=True))
    assert summary.splits["train"].num_images == 18
    assert [line.partition(":")[0] for line in sorted(summary.splits["train"].bad)] == ["image-0", "image-1"]
    assert os.listdir(tmp_path) == ["out"]
    assert len(ShardReader(tmp_path / "out", "train")) == 18


def test_a_long_list_of_images_that_cannot_be_used_lies_in_a_file_outside_of_the_data_set(tmp_path, monkeypatch):
    source = pixel_source(3)
    source.bad = [f"pixels other-{number}: no label" for number in range(21)]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for directory in ("there", "missing"):
        with pytest.raises(DataError, match=r"21 of 24 images cannot(?s:.*)other-19: no label\n    \.\.\.") as caught:
            write_dataset(tmp_path / "out", {"train": source}, WriteOptions("long"))
        if directory == "missing":
            assert "listed" not in caught.value.fix
            break
        (written,) = (tmp_path / "temporary").iterdir()
        assert written.read_text().splitlines() == source.bad
        assert caught.value.fix.endswith(f"; all of them are listed in {written}")
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    source.bad = source.bad[:20]
    with pytest.raises(DataError) as caught:
        write_dataset(tmp_path / "out", {"train": source}, WriteOptions("long"))
    assert "listed" not in caught.value.fix


def test_a_kill_between_the_last_two_steps_is_completed_by_the_next_run(tmp_path):
    out = write_pixels(tmp_path / "out")
    whole = (out / "_info.json").read_bytes()
    info = json.loads(whole)
    del info["splits"]["val"]
    (out / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match='a split "val" already'):
        write_dataset(out, {"val": pixel_source(3)}, WriteOptions("pixels"))
    assert (out / "_info.json").read_bytes() == whole


def test_images_without_any_class_are_refused(tmp_path):
    source = multi_label_source(4)
    source.labels = [()] * 4
    with pytest.raises(DataError, match="no image has a class"):
        write_dataset(tmp_path / "out", {"train": source}, WriteOptions("none"))
