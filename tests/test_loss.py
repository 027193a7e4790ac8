"""The training loss against its definition."""

import math

import pytest
import torch

from vitds.loss import cross_entropy

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
LABELS = torch.tensor([0, 2])


def by_hand(logits, probabilities):
    """-sum p log softmax(logits), in double precision, averaged over the images."""
    total = 0.0
    for row, target in zip(logits.double().tolist(), probabilities, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total -= sum(p * (value - log_sum) for p, value in zip(target, row, strict=True))
    return total / len(probabilities)


def test_labels():
    assert cross_entropy(LOGITS, LABELS).item() == pytest.approx(by_hand(LOGITS, [[1, 0, 0], [0, 0, 1]]), rel=1e-6)


def test_class_probabilities():
    mixed = [[0.7, 0.3, 0.0], [0.25, 0.25, 0.5]]
    assert cross_entropy(LOGITS, torch.tensor(mixed)).item() == pytest.approx(by_hand(LOGITS, mixed), rel=1e-6)


def test_label_smoothing_spreads_its_share_over_all_classes():
    smooth = [[0.7 + 0.1, 0.1, 0.1], [0.1, 0.1, 0.7 + 0.1]]
    assert cross_entropy(LOGITS, LABELS, 0.3).item() == pytest.approx(by_hand(LOGITS, smooth), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_16_bit_logits_is_float32(dtype):
    loss = cross_entropy(LOGITS.to(dtype), LABELS)
    assert loss.dtype == torch.float32
    assert loss.item() == cross_entropy(LOGITS.to(dtype).float(), LABELS).item()
