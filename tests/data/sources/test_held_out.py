"""The validation split that is made: stratified, of the right size, and a pure function of seed and keys."""

import numpy as np
import pytest
from data_sets import pixel_source

from vitds.data.sources import hold_out
from vitds.data.sources.pixels import PixelSource
from vitds.errors import DataError


def source_of(keys: list[str], labels: list) -> PixelSource:
    source = pixel_source(1, 100)
    source.images = np.zeros((len(keys), 2, 2, 3), np.uint8)
    source.images[:, 0, 0, 0] = np.arange(len(keys)) % 256
    source.keys, source.labels = keys, labels if isinstance(labels[0], tuple) else np.array(labels)
    return source


def random_source(rng: np.random.Generator) -> PixelSource:
    counts = rng.integers(4, 60, rng.integers(1, 9))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return source_of([f"k{number}" for number in rng.permutation(10_000)[: len(labels)]], labels.tolist())


def held(source: PixelSource, fraction: float, seed: int = 0) -> set[str]:
    return set(hold_out({"train": source}, fraction, seed)["val"].keys)


CASES = range(60)


@pytest.mark.parametrize("case", CASES)
def test_it_is_disjoint_stratified_and_of_the_right_size(case):
    rng = np.random.default_rng(case)
    source, fraction = random_source(rng), float(rng.choice([0.01, 0.02, 0.1, 0.25, 0.5]))
    if round(round(fraction * len(source.keys), 9)) == 0:
        with pytest.raises(DataError, match="is not one that a class can spare"):
            held(source, fraction)
        return
    parts = hold_out({"train": source}, fraction, case)
    train, val = parts["train"], parts["val"]
    assert sorted(train.keys + val.keys) == sorted(source.keys) and not set(train.keys) & set(val.keys)
    assert len(val.keys) == round(round(fraction * len(source.keys), 9))
    for label, count in enumerate(np.bincount(source.labels)):
        assert abs((val.labels == label).sum() - fraction * count) < 1
    for part in (train, val):
        rows = [source.keys.index(key) for key in part.keys]
        assert part.labels.tolist() == source.labels[rows].tolist()
        assert part.read(0) == source.read(rows[0]) and part.where(0) == source.where(rows[0])
        assert part.sizes().tolist() == source.sizes()[rows].tolist()


@pytest.mark.parametrize("case", CASES)
def test_it_does_not_depend_on_the_order_of_rows_and_hardly_on_other_samples(case):
    rng = np.random.default_rng(case)
    source, fraction = random_source(rng), float(rng.choice([0.1, 0.25, 0.5]))
    before = held(source, fraction)
    shuffled = rng.permutation(len(source.keys))
    keys, labels = [source.keys[row] for row in shuffled], source.labels[shuffled].tolist()
    assert held(source_of(keys, labels), fraction) == before
    label_of = dict(zip(keys, labels, strict=True))
    added = int(rng.integers(max(labels) + 1))
    moved = held(source_of([*keys, "new"], [*labels, added]), fraction) ^ before
    moved.discard("new")
    assert sum(label_of[key] == added for key in moved) <= 1 and sum(label_of[key] != added for key in moved) <= 1


def test_a_seed_gives_another_split_of_the_same_sizes():
    source = source_of([f"k{row}" for row in range(400)], [row % 4 for row in range(400)])
    splits = [held(source, 0.1, seed) for seed in range(5)]
    assert len({frozenset(split) for split in splits}) == 5 and {len(split) for split in splits} == {40}
    assert held(source, 0.1, 3) == splits[3]


def test_the_split_is_frozen():
    """Others' numbers rest on it: which samples are held out must never change."""
    source = source_of([f"n{row % 3}/img_{row:03d}" for row in range(30)], [row % 3 for row in range(30)])
    assert sorted(held(source, 0.1)) == ["n0/img_006", "n1/img_010", "n2/img_008"]


def test_small_classes_keep_a_training_image_and_googles_shares_come_out():
    source = source_of(["a", "b", "c", "d"], [0, 1, 1, 1])
    assert "a" not in held(source, 0.9) and len(held(source, 0.9)) == 2
    many = source_of([f"k{row}" for row in range(5000)], [row % 50 for row in range(5000)])
    for fraction in (0.01, 0.02):
        val = hold_out({"train": many}, fraction, 0)["val"]
        assert np.bincount(val.labels).tolist() == [int(100 * fraction)] * 50


def test_where_there_are_fewer_images_than_classes_no_class_is_preferred_for_its_place():
    source = source_of([f"k{row}" for row in range(400)], [row // 4 for row in range(400)])
    firsts = [sorted(set(hold_out({"train": source}, 0.1, seed)["val"].labels)) for seed in range(3)]
    assert all(len(labels) == 40 and max(labels) > 90 for labels in firsts) and firsts[0] != firsts[1]


def test_several_labels_are_counted_by_their_first():
    source = source_of([f"k{row}" for row in range(40)], [(row % 2, 7) if row % 4 else () for row in range(40)])
    val = hold_out({"train": source}, 0.1, 0)["val"]
    assert sorted(labels[:1] for labels in val.labels) == [(), (0,), (1,), (1,)]


def test_a_source_with_a_validation_split_is_refused():
    source = source_of(["a", "b"], [0, 1])
    with pytest.raises(DataError, match="has a validation split") as caught:
        hold_out({"train": source, "val": source}, 0.5, 0)
    assert "--split train" in caught.value.fix


@pytest.mark.parametrize("labels, can_help", [([0, 1, 2], False), ([(0,), (), (1,)], False), ([0, 0, 1], True)])
def test_a_larger_share_is_advised_where_a_class_could_give_an_image(labels, can_help):
    with pytest.raises(DataError, match="is not one that a class can spare") as caught:
        held(source_of(["a", "b", "c"], labels), 0.1)
    assert ("larger share" in caught.value.fix) == can_help and "more images a class" in caught.value.fix
