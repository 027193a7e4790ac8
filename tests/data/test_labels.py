"""Samples with any number of classes, from the source over shard, index and reader to a micro-batch."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_sets import multi_label_source, pixel_source, write_multi_label, write_pixels

from vitds.data.index import label_columns, read_index, write_index
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.order import NaturalOrder
from vitds.data.reader import ShardReader
from vitds.data.ustar import read_label
from vitds.data.writer import WriteOptions, write_dataset
from vitds.dataset_facts import read_dataset_facts
from vitds.ds_config import Batch
from vitds.errors import DataError
from vitds.run_config import DataConfig
from vitds.world import World


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_multi_label(tmp_path_factory.mktemp("labels") / "out")


def multi_hot(rows, num_classes):
    return [[float(label in row) for label in range(num_classes)] for row in rows]


def test_every_sample_keeps_its_classes(dataset):
    source, split = multi_label_source(53, seed=1), ShardReader(dataset, "train")
    assert {len(label) for label in source.labels} == {0, 1, 2, 3}
    for sample_id in range(53):
        sample = split.read(sample_id)
        assert sample.label == source.labels[int(sample.key.removeprefix("image-"))]


def test_webdataset_reads_key_json(dataset):
    import webdataset

    shards = sorted(str(path) for path in (dataset / "val").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "json"))
    source = multi_label_source(29, seed=2)
    assert samples == [(key, {"labels": list(row)}) for key, row in zip(source.keys, source.labels, strict=True)]


def test_the_index_holds_lists_and_comes_back_as_it_went(dataset, tmp_path):
    path = dataset / "val" / "index.parquet"
    assert str(pq.read_schema(path).field("label").type) == "list<element: int64>"
    index = read_index(path)
    write_index(tmp_path / "again", index)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    source = multi_label_source(29, seed=2)
    assert len(index) == 29 and len(index.label) == 0
    sample_ids, classes = index.label_pairs()
    expected = [(row, label) for row, labels in enumerate(source.labels) for label in labels]
    assert list(zip(sample_ids.tolist(), classes.tolist(), strict=True)) == expected
    assert index.class_counts(7) == [sum(label in row for row in source.labels) for label in range(7)]


def test_one_class_a_sample_is_an_int64_column_as_before(tmp_path):
    index = read_index(write_pixels(tmp_path / "out") / "val" / "index.parquet")
    assert str(pq.read_schema(tmp_path / "out/val/index.parquet").field("label").type) == "int64"
    assert index.labels is None and index.label_of(3) == 3
    np.testing.assert_array_equal(index.label_pairs()[0], np.arange(29))
    assert json.loads((tmp_path / "out/_info.json").read_text())["splits"]["val"].keys() == {
        *("name", "num_samples", "filenames", "shard_lengths", "class_counts")
    }


def test_info_counts_samples_of_each_class_and_says_so(dataset):
    facts, source = read_dataset_facts(str(dataset)), multi_label_source(53, seed=1)
    assert facts.multi_label and (facts.num_train, facts.num_val) == (53, 29)
    assert facts.train_counts == [sum(label in row for row in source.labels) for label in range(5)]
    assert sum(facts.train_counts) != 53


def test_bytes_do_not_depend_on_workers(dataset, tmp_path):
    again = write_multi_label(tmp_path / "again", workers=3)
    for path in sorted(path for path in dataset.rglob("*") if path.is_file()):
        assert (again / path.relative_to(dataset)).read_bytes() == path.read_bytes()


def test_classes_are_matched_by_name_sorted_and_kept_once(tmp_path):
    source = pixel_source(3, 3)
    source.classes, source.labels = ["c", "a", "b"], [(2, 0, 2), (1,), ()]
    write_dataset(tmp_path / "out", {"train": source}, WriteOptions("x"))
    added = pixel_source(2, 3)
    added.classes, added.labels = ["b", "c"], [(0, 1), (1, 1)]
    write_dataset(tmp_path / "out", {"val": added}, WriteOptions("x"))
    split = ShardReader(tmp_path / "out", "val")  # classes.json is c, a, b
    assert [split.read(sample_id).label for sample_id in range(2)] == [(0, 2), (0,)]


def test_a_class_that_is_none_is_named(tmp_path, dataset):
    source = multi_label_source(9, 3)
    source.labels[4] = (0, 3)
    with pytest.raises(DataError, match="label 3, but there are 3 classes") as caught:
        write_dataset(tmp_path / "out", {"train": source}, WriteOptions("x"))
    assert source.keys[4] in str(caught.value)
    copy = write_multi_label(tmp_path / "copy")
    (copy / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    with pytest.raises(DataError, match=r"label 4, and classes.json names 4") as caught:
        ShardReader(copy, "val")
    assert "pixels-val-00000" in str(caught.value) and "image-" in str(caught.value)


@pytest.mark.parametrize("labels", [[[1], None], [[1], [2, None]], [1, None]])
def test_an_index_without_a_label_is_refused(tmp_path, labels):
    index = write_multi_label(tmp_path / "out", num_val=2) / "val" / "index.parquet"
    table = pq.read_table(index)
    kind = pa.list_(pa.int64()) if isinstance(labels[0], list) else pa.int64()
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, kind)), index)
    with pytest.raises(DataError, match='without a value in "label"'):
        ShardReader(tmp_path / "out", "val")


def test_an_index_without_the_column_is_refused(tmp_path):
    index = write_multi_label(tmp_path / "out", num_val=2) / "val" / "index.parquet"
    pq.write_table(pq.read_table(index).drop_columns("label"), index)
    with pytest.raises(DataError, match="index cannot be read"):
        ShardReader(tmp_path / "out", "val")


@pytest.mark.parametrize(
    "suffix, content",
    [
        (".json", b'{"labels": [1, 2.5]}'),
        (".json", b'{"labels": [true]}'),
        (".json", b"[3]"),
        (".json", b"{"),
        (".json", b'{"labels": [-1]}'),
        (".json", b"\xff"),
        (".json", b"[" * 100_000),
        (".cls", b"cat"),
        (".cls", b"-1"),
    ],
)
def test_labels_that_are_none_are_refused(suffix, content):
    with pytest.raises(ValueError):
        read_label(suffix, content)


def test_labels_in_a_tar_are_read_back():
    assert read_label(".cls", b" 7\n") == 7
    assert read_label(".json", b'{"labels": [17, 3, 17], "more": 1}') == (3, 17)
    assert read_label(".json", b'{"labels": []}') == ()


def test_label_columns_take_either_form():
    label, labels = label_columns([3, np.int64(4)])
    assert label.tolist() == [3, 4] and labels is None
    label, labels = label_columns([(), (1, 2)])
    assert len(label) == 0 and labels.to_pylist() == [[], [1, 2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_are_multi_hot_over_the_outputs_of_the_head(dataset, workers):
    """A head may have more outputs than the data has classes; an evaluation counts the data's."""
    reader, world = ShardReader(dataset, "train"), World(0, 0, 1)
    batch = Batch(global_batch=8, micro_batch=4, accumulation_steps=2, world_size=1)
    order, size = NaturalOrder(1, len(reader)), (8, 8)
    loader = TrainLoader(
        reader, order, DataConfig(), size, 7, batch, world, 1, 0, 3, workers, "cpu", torch.float32
    )  # fmt: skip
    for micro_batch in loader:
        assert micro_batch.targets.dtype == torch.float32
        rows = [reader.index.label_of(sample_id) for sample_id in micro_batch.ids.tolist()]
        assert micro_batch.targets.tolist() == multi_hot(rows, 7)
    val = ShardReader(dataset, "val")
    for micro_batch in EvalLoader(val, DataConfig(), size, 8, world, workers, "cpu", torch.float32):
        rows = [val.index.label_of(sample_id) for sample_id in micro_batch.ids.tolist()]
        assert micro_batch.targets.tolist() == multi_hot(rows, 5)
