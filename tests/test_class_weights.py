"""Weights of the classes: counted, from a file, and what is refused."""

import json

import numpy as np
import pytest

from vitds.class_weights import class_weights
from vitds.dataset_facts import DatasetFacts
from vitds.errors import ConfigError

FACTS = DatasetFacts("data", ["ant", "bee", "cow", "dog"], [60, 30, 10, 0], [])


def weights(given, num_classes=4):
    return class_weights(given, FACTS, num_classes, "--class-weights")


def written(tmp_path, content):
    path = tmp_path / "weights.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_auto_is_inverse_to_the_counts_and_one_in_the_mean():
    found = weights("auto")
    assert found == pytest.approx((100 / (3 * 60), 100 / (3 * 30), 100 / (3 * 10), 1.0))
    assert sum(count * weight for count, weight in zip(FACTS.train_counts, found, strict=True)) == pytest.approx(100)
    assert weights("auto", 6) == (*found, 1.0, 1.0)


def test_auto_is_balanced_of_scikit_learn():
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = np.repeat(np.arange(4), FACTS.train_counts)
    assert weights("auto")[:3] == pytest.approx(compute("balanced", classes=np.arange(3), y=labels), rel=1e-12)


def test_no_weights_are_none():
    assert weights(None) is None


def test_a_file_lists_them_or_names_them(tmp_path):
    assert weights(written(tmp_path, [1, 2.5, 0, 4])) == (1.0, 2.5, 0.0, 4.0)
    assert weights(written(tmp_path, {"dog": 3, "ant": 0.5})) == (0.5, 1.0, 1.0, 3.0)
    assert weights(written(tmp_path, {"dog": 3}), 6) == (1.0, 1.0, 1.0, 3.0, 1.0, 1.0)


def test_a_resolved_configuration_gives_them_again():
    assert weights(weights("auto")) == weights("auto")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2, 3], "3 class weights, and the head has 4 outputs"),
        ({"bea": 1}, 'did you mean "bee"'),
        ([1, 2, 3, -1], "class weight -1"),
        ([1, 2, 3, "4"], 'class weight "4"'),
        ([1, 2, 3, True], "class weight true"),
        ([1, 2, 3, None], "class weight null"),
        ("[1, 2, 3, NaN]", "class weight NaN"),
        ("[1, 2, 3, 1e999]", "class weight Infinity"),
        ([0, 0, 0, 0], "every class weight is 0"),
        ("[1, 2", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("3", "neither a list"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        weights(written(tmp_path, content))
    assert message in str(caught.value) and "weights.json" in str(caught.value)


def test_a_missing_file_and_data_without_counts_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file of class weights"):
        weights(str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match="does not tell"):
        class_weights("auto", DatasetFacts("data", ["a", "b"], [0, 0], []), 2, "--class-weights")
