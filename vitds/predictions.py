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
    def top1(self) -> float:
        """Share of samples whose label is the first class, in [0, 1]."""
        return int((self.top_classes[:, 0] == self.labels).sum()) / len(self.labels)

    @property
    def top5(self) -> float:
        """Share of samples whose label is among the first five classes (all, when there are fewer), in [0, 1]."""
        return int((self.top_classes == self.labels[:, None]).any(axis=1).sum()) / len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, summed exactly, so that it does not depend on the number of ranks."""
        return math.fsum(self.losses.tolist()) / len(self.losses)


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


def summary(predictions: Predictions, num_classes: int) -> dict[str, Any]:
    """All figures of an evaluation; macro-F1 is the mean over the classes that have samples or predictions."""
    classes = per_class(predictions, num_classes)
    return {
        "num_samples": len(predictions.labels),
        "loss": predictions.loss,
        "top1": predictions.top1,
        "top5": predictions.top5,
        "macro_f1": float(np.nanmean(classes["f1"])),
        "calibration_error": calibration_error(predictions),
    } | {
        f"per_class_{name}": [None if math.isnan(v) else v for v in values.tolist()] for name, values in classes.items()
    }


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
