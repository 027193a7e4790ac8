"""What a model said of each sample, and every figure that follows from it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What the model said of each sample, in the order of sample ids. Shapes: (N,), top classes (N, min(5, L))."""

    ids: np.ndarray
    labels: np.ndarray
    top_classes: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray

    @property
    def figures(self) -> dict[str, float]:
        """What a validation reports."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    @property
    def top1(self) -> float:
        """Share of samples whose label is the first class, in [0, 1]."""
        return int((self.top_classes[:, 0] == self.labels).sum()) / len(self.labels)

    @property
    def top5(self) -> float:
        """Share of samples whose label is among the first five classes (all, when there are fewer), in [0, 1]."""
        return int((self.top_classes == self.labels[:, None]).any(axis=1).sum()) / len(self.labels)

    @property
    def loss(self) -> float:
        """Mean of the samples' losses."""
        return _mean(self.losses)


@dataclass(frozen=True)
class MultiLabelPredictions:
    """What the model said of each sample of any number of classes, in the order of sample ids.

    Shapes: (N,), top classes and their scores (N, min(5, outputs)), average precision and support (L,).
    """

    ids: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    losses: np.ndarray
    average_precision: np.ndarray  # NaN for a class without samples
    support: np.ndarray

    @property
    def figures(self) -> dict[str, float]:
        """What a validation reports."""
        return {"loss": self.loss, "map": self.mean_average_precision}

    @property
    def mean_average_precision(self) -> float:
        """The mean over the classes that have samples, NaN when none has."""
        known = self.average_precision[self.support > 0]
        return float(known.mean()) if len(known) else math.nan

    @property
    def loss(self) -> float:
        """Mean of the samples' losses."""
        return _mean(self.losses)


def _mean(losses: np.ndarray) -> float:
    """Summed exactly, so that it does not depend on the number of ranks."""
    return math.fsum(losses.tolist()) / len(losses)


def average_precision(scores: np.ndarray, truths: np.ndarray) -> float:
    """Precision at each score that occurs, weighted by the recall that it adds; NaN when nothing is true.

    Equal scores count together, so the order of samples does not matter.

    Shapes: (N,), (N,) bool.
    Source: scikit-learn's average_precision_score.
    """
    num_true = int(truths.sum())
    if not num_true:
        return math.nan
    order = np.argsort(-scores)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(truths[order])[ends]
    return float(np.sum(np.diff(hits, prepend=0) * (hits / (ends + 1))) / num_true)


def per_class(predictions: Predictions, num_classes: int) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class; NaN precision if it was never predicted, NaN recall without samples.

    Shapes: (L,) each; a table of labels by predictions would be (L, L), gigabytes for ImageNet-21k.
    """
    labels, predicted = predictions.labels, predictions.top_classes[:, 0]
    hits, times_predicted, support = (
        np.bincount(classes, minlength=num_classes) for classes in (labels[labels == predicted], predicted, labels)
    )
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = hits / times_predicted, hits / support, 2 * hits / (times_predicted + support)
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def calibration_error(predictions: Predictions, num_bins: int = _CALIBRATION_BINS) -> float:
    """Expected calibration error over equal-width bins of confidence.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    correct = predictions.top_classes[:, 0] == predictions.labels
    bins = np.clip(np.ceil(predictions.confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - predictions.confidence.astype(np.float64), minlength=num_bins)
    return float(np.abs(gaps).sum() / len(correct))


def summary(predictions: Predictions | MultiLabelPredictions, num_classes: int) -> dict[str, Any]:
    """All figures of an evaluation; macro-F1 is the mean over the classes that have samples or predictions."""
    figures: dict[str, Any] = {"num_samples": len(predictions.ids)} | predictions.figures
    if isinstance(predictions, MultiLabelPredictions):
        classes = {"average_precision": predictions.average_precision, "support": predictions.support}
        figures["map"] = None if math.isnan(figures["map"]) else figures["map"]
    else:
        classes = per_class(predictions, num_classes)
        figures["macro_f1"] = float(np.nanmean(classes["f1"]))
        figures["calibration_error"] = calibration_error(predictions)
    return figures | {
        f"per_class_{name}": [None if math.isnan(v) else v for v in values.tolist()] for name, values in classes.items()
    }


def write_multi_label_predictions(
    path: Path, predictions: MultiLabelPredictions, keys: list[str], labels: list[list[int]], classes: list[str]
) -> None:
    """Write a row a sample: id, key, its classes and the five that score highest with their names, scores and loss.

    A head may have more classes than the data: those have no name.
    """
    names, top = dict(enumerate(classes)), predictions.top_classes.tolist()
    table = pa.table(
        {
            "sample_id": pa.array(predictions.ids, pa.int64()),
            "key": keys,
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "label_names": pa.array([[names[label] for label in row] for row in labels], pa.list_(pa.string())),
            "loss": pa.array(predictions.losses, pa.float32()),
            "top5": pa.array(top, pa.list_(pa.int32())),
            "top5_names": pa.array([[names.get(label) for label in row] for row in top], pa.list_(pa.string())),
            "top5_scores": pa.array(predictions.top_scores.tolist(), pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, path)


def write_predictions(path: Path, predictions: Predictions, keys: list[str], classes: list[str]) -> None:
    """Write a row a sample: id, key, label and prediction with their names, confidence, loss, top-5 classes.

    A head may have more classes than the data: those have no name.
    """
    first = predictions.top_classes[:, 0]
    names = dict(enumerate(classes))
    table = pa.table(
        {
            "sample_id": pa.array(predictions.ids, pa.int64()),
            "key": keys,
            "label": pa.array(predictions.labels, pa.int32()),
            "label_name": [names[label] for label in predictions.labels.tolist()],
            "predicted": pa.array(first, pa.int32()),
            "predicted_name": pa.array([names.get(label) for label in first.tolist()], pa.string()),
            "confidence": pa.array(predictions.confidence, pa.float32()),
            "loss": pa.array(predictions.losses, pa.float32()),
            "top5": predictions.top_classes.tolist(),
        }
    )
    pq.write_table(table, path)
