"""How well an order shuffles: three figures of its global batches, to set a windowed order beside a whole shuffle.

One epoch in ImageNet's shape: 1,281,167 samples, 1,000 classes, shards of 1,000 samples, global batches of 1,024. Of
classes, those of shards sorted by class (as a tar of folders has them) and of shards shuffled when they were written
(as tools/shard_imagenet.py does) are told apart:

    data.shuffle_window   shards in a batch   correlation   bits, sorted by class   bits, shuffled when written
    0 (all)                    705.7            0.00              9.16                      9.16
    256                        251.2            0.00              8.07                      9.16
    64                          64.7            0.01              6.43                      9.16
    16 (remote data)            16.9            0.05              4.57                      9.16
    4                            5.0            0.21              2.74                      9.16
    1                            2.0            1.00              1.30                      9.16

So a window costs shuffled shards nothing in the mix of classes: all it fixes is which samples can meet in a batch, and
that changes with the sequence of the shards each epoch. Shards sorted by class need a shuffle when they are written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vitds.data.order import Order


class ShuffleQuality(NamedTuple):
    """Means over global batches. A whole shuffle is what the first and the last are to be compared with."""

    shards: float  # different shards that a batch draws from
    neighbour_correlation: float  # rank correlation of the sample ids at positions p and p + 1; 0 is a whole shuffle
    class_entropy_bits: float  # of the labels of a batch


def shuffle_quality(
    order: Order, labels: np.ndarray, shard: np.ndarray, global_batch: int, num_batches: int
) -> ShuffleQuality:
    """Measure the first `num_batches` global batches of an order that draws samples of one class each.

    Shapes: labels (N,), shard (N,) the number of each sample's shard.
    """
    ids = order.at(np.arange(num_batches * global_batch)).ids
    batches = ids.reshape(num_batches, global_batch)
    ranks = np.argsort(np.argsort(ids, kind="stable"), kind="stable")
    return ShuffleQuality(
        float(np.mean([len(np.unique(shard[batch])) for batch in batches])),
        float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]),
        float(np.mean([_entropy_bits(labels[batch]) for batch in batches])),
    )


def _entropy_bits(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())
