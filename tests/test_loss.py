"""The training losses against their definitions, torch and timm."""

import math

import pytest
import torch
import torch.nn.functional as F

from vitds.loss import LOSSES, binary_cross_entropy, cross_entropy, sample_losses

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


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])


def drawn(num_images=16, num_classes=5):
    """Logits, labels, one-hot rows blended by mixup, and rows of zeros and ones."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_images, num_classes, generator=draw)
    labels = torch.randint(0, num_classes, (num_images,), generator=draw)
    rows = F.one_hot(labels, num_classes).float()
    mixed = torch.lerp(rows, rows.flip(0), torch.rand(num_images, 1, generator=draw))
    multi_hot = (torch.rand(num_images, num_classes, generator=draw) < 0.4).float()
    return logits, labels, rows, mixed, multi_hot


def test_softmax_without_weights_is_bit_for_bit_torchs():
    logits, labels, _, mixed, _ = drawn()
    for targets in (labels, mixed):
        assert torch.equal(cross_entropy(logits, targets, 0.1), F.cross_entropy(logits, targets, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_softmax_is_the_weighted_sum_over_the_number_of_images(smoothing):
    logits, labels, rows, mixed, _ = drawn()
    for targets in (labels, mixed):
        probabilities = rows if targets is labels else mixed
        probabilities = (1 - smoothing) * probabilities + smoothing / 5
        terms = -(WEIGHTS.double() * probabilities.double() * logits.double().log_softmax(dim=1))
        assert cross_entropy(logits, targets, smoothing, WEIGHTS).item() == pytest.approx(terms.sum().item() / 16)
    assert torch.allclose(
        cross_entropy(logits, labels, smoothing, WEIGHTS), cross_entropy(logits, rows, smoothing, WEIGHTS)
    )
    # With rows torch divides by the number of images too; with labels by the weights that they have.
    torchs = F.cross_entropy(logits, mixed, WEIGHTS, label_smoothing=smoothing)
    assert torch.allclose(cross_entropy(logits, mixed, smoothing, WEIGHTS), torchs)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_is_torchs_for_any_kind_of_target(weights):
    logits, labels, rows, mixed, multi_hot = drawn()
    oracle = torch.nn.BCEWithLogitsLoss(weight=weights)
    for targets, as_rows in ((labels, rows), (mixed, mixed), (multi_hot, multi_hot)):
        assert torch.equal(binary_cross_entropy(logits, targets, 0.0, weights), oracle(logits, as_rows))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_smooths_as_timm(weights):
    timm_loss, timm_mixup = pytest.importorskip("timm.loss"), pytest.importorskip("timm.data.mixup")
    logits, labels, _, _, _ = drawn()
    oracle = timm_loss.BinaryCrossEntropy(smoothing=0.1, weight=weights)
    assert torch.allclose(binary_cross_entropy(logits, labels, 0.1, weights), oracle(logits, labels), rtol=1e-6)
    # Under mixup timm smooths where it blends, and its loss no more.
    theirs = timm_mixup.mixup_target(labels, 5, lam=0.3, smoothing=0.1)
    rows = F.one_hot(labels, 5).float()
    ours = binary_cross_entropy(logits, torch.lerp(rows.flip(0), rows, 0.3), 0.1, weights)
    assert torch.allclose(ours, oracle(logits, theirs), rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_one_batch_of_16_has_the_gradient_of_16_batches_of_one(kind, weights):
    """An engine averages micro-batches, so each has to be a mean over its images."""
    logits, labels, _, mixed, _ = drawn()
    for targets in (labels, mixed):
        whole, pieces = (logits.clone().requires_grad_() for _ in range(2))
        loss = LOSSES[kind](whole, targets, 0.1, weights)
        loss.backward()
        total = sum(LOSSES[kind](pieces[[i]], targets[[i]], 0.1, weights) / 16 for i in range(16))
        total.backward()
        assert total.item() == pytest.approx(loss.item(), rel=1e-6)
        assert torch.allclose(pieces.grad, whole.grad, rtol=1e-5, atol=1e-9)


def test_each_sample_of_an_evaluation_has_its_loss():
    logits, labels, rows, _, multi_hot = drawn()
    assert sample_losses("softmax", logits, labels).mean().item() == pytest.approx(cross_entropy(logits, labels).item())
    for targets in (labels, multi_hot):
        expected = binary_cross_entropy(logits, targets).item()
        assert sample_losses("bce", logits, targets).mean().item() == pytest.approx(expected)
    assert torch.equal(sample_losses("bce", logits, labels), sample_losses("bce", logits, rows))
    wider = torch.cat([multi_hot, torch.zeros(16, 2)], dim=1)
    more = torch.cat([logits, torch.ones(16, 2)], dim=1)
    assert torch.equal(sample_losses("bce", more, multi_hot), sample_losses("bce", more, wider))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_give_a_float32_loss_of_every_kind(dtype):
    for loss_of in LOSSES.values():
        loss = loss_of(LOGITS.to(dtype), LABELS, 0.1, torch.ones(3))
        assert loss.dtype == torch.float32
        assert loss.item() == loss_of(LOGITS.to(dtype).float(), LABELS, 0.1, torch.ones(3)).item()
