from dataclasses import replace

import numpy as np
import pytest
import torch
from data_sets import damage, pixel_source, write_pixels

from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.mixture import Mixture, open_split
from vitds.data.order import NaturalOrder, build_order
from vitds.data.reader import ShardReader
from vitds.data.writer import WriteOptions, write_dataset
from vitds.ds_config import Batch
from vitds.errors import DataError
from vitds.run_config import DataConfig
from vitds.world import World


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Three data sets: five classes; two of those and a new one, without validation; samples of several classes."""
    folder = tmp_path_factory.mktemp("mixture")
    first = write_pixels(folder / "one,two", num_train=20, num_val=7)
    source = replace(pixel_source(11, num_classes=3, seed=5), classes=["class-3", "new", "class-0"])
    write_dataset(folder / "b", {"train": source}, WriteOptions("pixels", samples_per_shard=4))
    lists = [(), (0,), (1, 2), (0, 2), (2,)]
    source = replace(pixel_source(5, num_classes=3, seed=6), classes=["new", "class-1", "late"], labels=lists)
    write_dataset(folder / "c", {"train": source, "val": source}, WriteOptions("pixels", samples_per_shard=2))
    return [str(first), str(folder / "b"), str(folder / "c")]


def test_samples_count_on_and_labels_go_by_name(directories):
    mixture = open_split(",".join(directories[:2]), "train")
    assert isinstance(mixture, Mixture) and len(mixture) == 31
    assert mixture.classes == [*(f"class-{number}" for number in range(5)), "new"]
    for number, directory in enumerate(directories[:2]):
        reader = ShardReader(directory, "train")
        for own_id in range(len(reader)):
            sample_id = own_id + 20 * number
            sample, own = mixture.read(sample_id), reader.read(own_id)
            assert sample.data == own.data and sample.key == own.key
            assert mixture.classes[sample.label] == reader.classes[own.label]
            assert mixture.index.label[sample_id] == sample.label
            assert mixture.where(sample_id) == reader.where(own_id)
            assert mixture.key(sample_id) == f"{directory}/{own.key}"
    lengths = [length for index in mixture.indexes for length in index.shard_lengths()]
    assert mixture.index.shard_lengths() == lengths == [8, 8, 4, 4, 4, 3]
    assert all(shard.startswith((directories[0], directories[1])) for shard in mixture.index.shards)


def test_validation_is_the_splits_that_are_there_one_after_the_other(directories):
    mixture = open_split(",".join(directories[:2]), "val")
    assert len(mixture) == 7 and mixture.classes[-1] == "new"
    with pytest.raises(DataError, match='no split "test"'):
        open_split(",".join(directories[:2]), "test")
    assert isinstance(open_split(directories[0], "val"), ShardReader)


def test_a_directory_with_nothing_to_train_on_is_not_passed_over(directories, tmp_path):
    write_dataset(tmp_path / "v", {"val": pixel_source(5, num_classes=3)}, WriteOptions("pixels"))
    assert len(open_split(f"{directories[0]},{tmp_path / 'v'}", "val")) == 12
    with pytest.raises(DataError, match='no split "train"') as caught:
        open_split(f"{directories[0]},{tmp_path / 'v'}", "train")
    assert caught.value.where == str(tmp_path / "v")


def test_one_class_and_several_together_are_lists(directories):
    mixture = open_split(",".join([directories[1], directories[2]]), "train")
    assert mixture.classes == ["class-3", "new", "class-0", "class-1", "late"]
    names = [{mixture.classes[label] for label in mixture.read(number).label} for number in range(16)]
    readers = [ShardReader(directory, "train") for directory in directories[1:]]
    assert names[:11] == [{readers[0].classes[label]} for label in readers[0].index.label]
    assert names[11:] == [{readers[1].classes[label] for label in readers[1].read(own_id).label} for own_id in range(5)]
    assert mixture.index.class_counts(5) == [4, 6, 3, 1, 3]


def test_a_loader_takes_a_mixture_through_workers(directories):
    mixture = open_split(",".join(directories[:2]), "train")
    data = DataConfig(weights=(0.25, 0.75), train_crop="none", flip=0.0)
    batch = Batch(10, 5, 1, 2)
    order = build_order(data, 3, 10, mixture.indexes)
    place = (batch, World(1, 1, 2), 3, 0, 40, 2, "cpu", torch.float32)
    loaded = list(TrainLoader(mixture, order, data, (12, 15), 6, *place))
    ids = torch.cat([micro_batch.ids for micro_batch in loaded])
    assert (torch.cat([micro_batch.targets for micro_batch in loaded]).numpy() == mixture.index.label[ids]).all()
    assert 0.65 < (ids >= 20).float().mean() < 0.85
    val = EvalLoader(open_split(",".join(directories[:2]), "val"), data, (12, 15), 2, World(), 0, "cpu", torch.float32)
    assert [number for micro_batch in val for number in micro_batch.ids.tolist()] == list(range(7))


def test_what_is_wrong_is_named_with_its_directory(directories, tmp_path):
    with pytest.raises(DataError, match="no such directory") as caught:
        open_split(f"{directories[0]},{tmp_path / 'nowhere'}", "train")
    assert caught.value.where == str(tmp_path / "nowhere")
    dataset = write_pixels(tmp_path / "damaged", num_train=9, num_val=3)
    shard = next((dataset / "train").glob("*000001.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    mixture = open_split(f"{directories[0]},{dataset}", "train")
    with pytest.raises(DataError, match="crc32") as caught:
        mixture.read(28)
    assert caught.value.where == f"{shard} {ShardReader(dataset, 'train').key(8)}"


def test_bad_samples_of_the_same_name_in_two_directories_are_two_wherever_the_data_lie(tmp_path):
    def loader(folder):
        paths = [write_pixels(folder / name, num_train=9, num_val=3) for name in ("a", "b")]
        for path in paths:
            key = damage(path, "train", 4)
        mixture = open_split(",".join(map(str, paths)), "train")
        place = (Batch(18, 18, 1, 1), World(), 0, 0, 1, 0, "cpu", torch.float32)
        return key, TrainLoader(mixture, NaturalOrder(0, 18), DataConfig(), (12, 15), 5, *place, max_bad_samples=0.12)

    key, first = loader(tmp_path / "first")
    list(first)
    assert set(first.known_bad) == {("pixels-train-000000.tar", key), ("1/pixels-train-000000.tar", key)}
    assert {bad.where for bad in first.bad_samples} == {
        f"{tmp_path}/first/{name}/train/pixels-train-000000.tar {key}" for name in ("a", "b")
    }
    _, moved = loader(tmp_path / "moved")
    moved.know(first.bad_samples)
    list(moved)
    assert moved.known_bad == first.known_bad and not moved.bad_samples


def test_balanced_sampling_is_over_the_classes_of_all_directories(directories):
    mixture = open_split(",".join(directories[:2]), "train")
    ids = build_order(DataConfig(sampling="balanced"), 0, 8, mixture.indexes).at(np.arange(600)).ids
    assert np.bincount(mixture.index.label[ids]).tolist() == [100] * 6


def test_a_stream_is_nothing_to_evaluate_or_look_at():
    with pytest.raises(DataError, match="tar shards without an index can be trained on, and nothing else"):
        open_split("shards/s-{000..002}.tar", "val")
