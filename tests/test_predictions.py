"""Figures of an evaluation against cases worked out by hand, and against scikit-learn."""

import math
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from vitds.predictions import (
    MultiLabelPredictions,
    Predictions,
    average_precision,
    calibration_error,
    per_class,
    summary,
    write_predictions,
)


def predictions(labels, top_classes, confidence=None, losses=None):
    size = len(labels)
    top = np.asarray(top_classes)
    return Predictions(
        np.arange(size),
        np.asarray(labels),
        top[:, None] if top.ndim == 1 else top,
        np.asarray(confidence if confidence is not None else np.full(size, 0.5), dtype=np.float32),
        np.asarray(losses if losses is not None else np.zeros(size), dtype=np.float32),
    )


# Class 0: 3 samples, 2 found; class 1: 2 samples, 1 found; class 2: no sample, predicted once; class 3: never seen.
BY_HAND = predictions([0, 0, 0, 1, 1], [0, 0, 1, 1, 2])


def test_precision_recall_and_f1_by_hand():
    classes = per_class(BY_HAND, 4)
    nan = math.nan
    assert classes["precision"].tolist() == pytest.approx([1.0, 0.5, 0.0, nan], nan_ok=True)
    assert classes["recall"].tolist() == pytest.approx([2 / 3, 0.5, nan, nan], nan_ok=True)
    assert classes["f1"].tolist() == pytest.approx([0.8, 0.5, 0.0, nan], nan_ok=True)
    assert classes["support"].tolist() == [3, 2, 0, 0]


def test_summary_by_hand():
    figures = summary(BY_HAND, 4)
    assert figures["num_samples"] == 5
    assert figures["top1"] == 3 / 5
    assert figures["macro_f1"] == pytest.approx((0.8 + 0.5 + 0.0) / 3)
    assert figures["per_class_precision"] == [1.0, 0.5, 0.0, None]
    assert figures["per_class_recall"][2:] == [None, None]
    assert figures["per_class_support"] == [3, 2, 0, 0]


def test_many_classes_need_little_memory():
    tracemalloc.start()
    assert len(summary(BY_HAND, 21_843)["per_class_recall"]) == 21_843
    assert tracemalloc.get_traced_memory()[1] < 2**24  # 3.8 GB as a table of labels by predictions
    tracemalloc.stop()


def test_top_5_counts_the_first_five_classes():
    top = np.array([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    found = predictions([4, 0, 1], top)
    assert found.top1 == 1 / 3
    assert found.top5 == 2 / 3


def test_calibration_error_by_hand():
    """Two of the 15 bins are in use: (0.6, 0.667] holds one hit and one miss at 0.65, (0.933, 1] two hits at 0.95."""
    found = predictions([0, 0, 0, 0], [0, 1, 0, 0], confidence=[0.65, 0.65, 0.95, 0.95])
    assert calibration_error(found) == pytest.approx(0.5 * abs(0.5 - 0.65) + 0.5 * abs(1.0 - 0.95), rel=1e-6)


def test_gaps_of_opposite_sign_cancel_within_a_bin_but_not_between_bins():
    found = predictions([0, 0], [0, 1], confidence=[0.6, 0.9])
    assert calibration_error(found, num_bins=1) == pytest.approx(abs(1 - 0.6 - 0.9) / 2)
    assert calibration_error(found, num_bins=2) == pytest.approx(abs(1 - 0.6 - 0.9) / 2)
    assert calibration_error(found, num_bins=10) == pytest.approx((0.4 + 0.9) / 2)


def test_a_confidence_on_the_edge_belongs_to_the_bin_below_and_one_is_in_the_last():
    found = predictions([0, 0, 0, 1], [0, 1, 0, 0], confidence=[0.5, 0.75, 1.0, 1.0])
    # (0, 0.5]: |1 - 0.5|; (0.5, 1]: |(0 - 0.75) + (1 - 1) + (0 - 1)|
    assert calibration_error(found, num_bins=2) == pytest.approx((0.5 + 1.75) / 4)


def test_the_loss_is_summed_exactly():
    losses = np.array([1.0, 1e-8] * 1000 + [3e4], dtype=np.float32)
    found = predictions(np.zeros(len(losses), int), np.zeros(len(losses), int), losses=losses)
    assert found.loss == math.fsum(losses.tolist()) / len(losses)
    shuffled = np.random.default_rng(0).permutation(losses)
    assert predictions(found.labels, found.top_classes, losses=shuffled).loss == found.loss


def test_figures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 7, 500)
    guessed = np.where(draw.random(500) < 0.6, labels, draw.integers(0, 7, 500))
    figures = summary(predictions(labels, guessed), 7)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, guessed, labels=range(7))
    assert figures["per_class_precision"] == pytest.approx(precision, rel=1e-12)
    assert figures["per_class_recall"] == pytest.approx(recall, rel=1e-12)
    assert figures["per_class_f1"] == pytest.approx(f1, rel=1e-12)
    assert figures["per_class_support"] == support.tolist()
    assert figures["macro_f1"] == pytest.approx(metrics.f1_score(labels, guessed, average="macro"), rel=1e-12)
    assert figures["top1"] == metrics.accuracy_score(labels, guessed)


def test_the_parquet_file_has_a_row_a_sample(tmp_path):
    found = predictions([1, 0], np.array([[1, 0], [1, 0]]), confidence=[0.75, 0.5], losses=[0.25, 2.0])
    write_predictions(tmp_path / "predictions.parquet", found, ["a", "b"], ["cat", "dog"])
    assert pq.read_table(tmp_path / "predictions.parquet").to_pylist() == [
        {
            **{"sample_id": 0, "key": "a", "label": 1, "label_name": "dog", "predicted": 1, "predicted_name": "dog"},
            **{"confidence": 0.75, "loss": 0.25, "top5": [1, 0]},
        },
        {
            **{"sample_id": 1, "key": "b", "label": 0, "label_name": "cat", "predicted": 1, "predicted_name": "dog"},
            **{"confidence": 0.5, "loss": 2.0, "top5": [1, 0]},
        },
    ]


def test_average_precision_by_hand():
    """True at ranks 1 and 3 of 4: (1/1 + 2/3) / 2; all scores equal: the share of what is true."""
    truths = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), truths) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(4), truths) == 0.5
    assert average_precision(np.arange(4.0), np.ones(4, bool)) == 1.0
    assert math.isnan(average_precision(np.arange(4.0), np.zeros(4, bool)))


@pytest.mark.parametrize("decimals", [0, 1, 8])  # rounding makes ties, many and few
def test_average_precision_is_that_of_scikit_learn(decimals):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(decimals)
    for share in (0.02, 0.3, 0.9):
        truths = draw.random(300) < share
        scores = np.round(draw.normal(size=300) + truths, decimals).astype(np.float32)
        expected = metrics.average_precision_score(truths, scores)
        assert average_precision(scores, truths) == pytest.approx(expected, rel=1e-12)
        shuffled = draw.permutation(300)
        assert average_precision(scores[shuffled], truths[shuffled]) == average_precision(scores, truths)


def test_the_mean_average_precision_is_over_the_classes_that_have_samples():
    found = MultiLabelPredictions(
        *(np.arange(2), np.array([[1, 0], [0, 1]]), np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0.5, 1.5])),
        average_precision=np.array([0.5, math.nan, 0.75]),
        support=np.array([1, 0, 2]),
    )
    assert summary(found, 3) == {
        **{"num_samples": 2, "loss": 1.0, "map": 0.625},
        **{"per_class_average_precision": [0.5, None, 0.75], "per_class_support": [1, 0, 2]},
    }
    nothing = MultiLabelPredictions(
        found.ids, found.top_classes, found.top_scores, found.losses, np.full(3, math.nan), np.zeros(3, int)
    )
    assert summary(nothing, 3)["map"] is None
