import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from vitds.data.mixup import Mix, draw_mix, mix, mixup_coefficients
from vitds.run_config import DataConfig


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_coefficients_follow_the_beta_distribution(alpha):
    numbers = mixup_coefficients(alpha, 0, 3, np.arange(20_000))
    assert stats.kstest(numbers, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_a_tiny_alpha_does_not_underflow():
    numbers = mixup_coefficients(1e-3, 0, 0, np.arange(1000))
    assert np.isfinite(numbers).all() and 0.45 < numbers.mean() < 0.55


def test_a_coefficient_depends_on_seed_step_and_pair_alone():
    numbers = mixup_coefficients(0.2, 1, 5, np.arange(10))
    assert mixup_coefficients(0.2, 1, 5, np.arange(7, 8)) == numbers[7]
    assert (
        len({*numbers, *mixup_coefficients(0.2, 1, 6, np.arange(10)), *mixup_coefficients(0.2, 2, 5, np.arange(10))})
        == 30
    )


def test_coefficients_of_runs_that_began_before_stay_what_they_were():
    of_alpha = {
        0.2: [0.9828237624477362, 7.444030178036164e-05, 0.07387856794253155],
        1.0: [0.6895967875310993, 0.16552671689304296, 0.37330232519925954],
    }
    for alpha, expected in of_alpha.items():
        np.testing.assert_allclose(mixup_coefficients(alpha, 42, 7, np.arange(3)), expected, rtol=1e-13)
        np.testing.assert_array_equal(
            draw_mix(DataConfig(mixup_alpha=alpha), (8, 8), 42, 7, np.arange(3)).own,
            mixup_coefficients(alpha, 42, 7, np.arange(3)),
        )


def torchvision_s(images, labels, is_cutmix, own, box, num_classes):
    """One pair through torchvision's transform; it takes the image before, which in a batch of two is the neighbour."""
    height, width = images.shape[2:]
    top, left, bottom, right = box
    params = {"labels": labels, "batch_size": 2, "lam": own, "box": (left, top, right, bottom)}
    params["lam_adjusted"] = 1 - (bottom - top) * (right - left) / (height * width)
    transform = (v2.CutMix if is_cutmix else v2.MixUp)(num_classes=num_classes)
    return transform.transform(images, params), transform.transform(labels, params)


def test_each_pair_is_what_torchvision_makes_of_it():
    data = DataConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    images, labels = torch.randn(40, 3, 9, 12), torch.arange(40) % 7
    drawn = draw_mix(data, (9, 12), 0, 0, np.arange(20))
    mixed, targets = mix(images, labels, drawn, 7)
    seen = set()
    for pair, (own, box) in enumerate(zip(drawn.own.tolist(), drawn.boxes.tolist(), strict=True)):
        both, is_cutmix = slice(2 * pair, 2 * pair + 2), own == 1
        expected = torchvision_s(images[both], labels[both], is_cutmix, own, box, 7)
        torch.testing.assert_close(mixed[both], expected[0], **({"rtol": 0, "atol": 0} if is_cutmix else {}))
        torch.testing.assert_close(targets[both], expected[1])
        seen.add(is_cutmix)
    assert seen == {False, True} and targets.dtype == torch.float32


def test_neighbours_are_blended_and_their_targets_alike():
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 2, 1, 1])
    mixed, targets = mix(images, labels, Mix(np.array([0.75, 0.1]), np.zeros((2, 4), np.int64)), 3)
    torch.testing.assert_close(mixed[0], 0.75 * images[0] + 0.25 * images[1])
    torch.testing.assert_close(mixed[1], 0.75 * images[1] + 0.25 * images[0])
    torch.testing.assert_close(mixed[3], 0.1 * images[3] + 0.9 * images[2])
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 1, 0], [0, 1, 0]]))


def test_one_box_is_exchanged_and_targets_are_its_exact_area():
    images = torch.stack([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)])
    mixed, targets = mix(images, torch.tensor([1, 0]), Mix(np.ones(1), np.array([[1, 2, 4, 4]])), 2)
    expected = torch.zeros(4, 5)
    expected[1:4, 2:4] = 1
    assert torch.equal(mixed[0], expected.expand(3, 4, 5)) and torch.equal(mixed[1], 1 - mixed[0])
    torch.testing.assert_close(targets, torch.tensor([[6 / 20, 14 / 20], [14 / 20, 6 / 20]]))


def test_several_labels_of_an_image_are_blended_like_one():
    labels = torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    _, targets = mix(torch.zeros(2, 3, 2, 2), labels, Mix(np.array([0.75]), np.zeros((1, 4), np.int64)), 3)
    torch.testing.assert_close(targets, torch.tensor([[0.75, 1, 0.25], [0.25, 1, 0.75]]))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cutmix_is_chosen_as_often_as_asked(share):
    data = DataConfig(mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_share=share)
    num_cutmix = (draw_mix(data, (224, 224), 0, 1, np.arange(5000)).own == 1).sum()
    assert abs(num_cutmix - 5000 * share) <= 5 * np.sqrt(5000 * share * (1 - share))


def test_what_is_on_alone_is_always_chosen():
    pairs = np.arange(500)
    assert not draw_mix(DataConfig(mixup_alpha=0.4, cutmix_share=1.0), (8, 8), 0, 0, pairs).boxes.any()
    assert (draw_mix(DataConfig(cutmix_alpha=1.0, cutmix_share=0.0), (8, 8), 0, 0, pairs).own == 1).all()


def test_boxes_follow_the_law_of_torchvision():
    """Centres evenly over the image, sides sqrt(1 - coefficient) of its own before the edges cut them off."""
    height, width, pairs = 160, 240, np.arange(20_000)
    own, boxes = draw_mix(DataConfig(cutmix_alpha=1.0), (height, width), 0, 0, pairs)
    top, left, bottom, right = boxes.T
    assert (own == 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top <= bottom).all() and (bottom <= height).all() and (left <= right).all() and (right <= width).all()
    torch.manual_seed(0)
    reference, images = v2.CutMix(num_classes=2), torch.empty(2, 3, height, width)
    theirs = np.array([reference.make_params([images])["box"] for _ in range(4000)])
    for ours, column in ((left, 0), (top, 1), (right, 2), (bottom, 3)):
        assert stats.ks_2samp(ours, theirs[:, column]).pvalue > 1e-3
    areas = (theirs[:, 2] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 1])
    assert stats.ks_2samp((bottom - top) * (right - left), areas).pvalue > 1e-3


def test_a_mix_depends_on_seed_step_and_pair_alone():
    data = DataConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    own, boxes = draw_mix(data, (32, 32), 1, 5, np.arange(40))
    for first in range(0, 40, 8):
        part = draw_mix(data, (32, 32), 1, 5, np.arange(first, first + 8))
        np.testing.assert_array_equal(part.own, own[first : first + 8])
        np.testing.assert_array_equal(part.boxes, boxes[first : first + 8])
    for other in (draw_mix(data, (32, 32), 2, 5, np.arange(40)), draw_mix(data, (32, 32), 1, 6, np.arange(40))):
        assert (other.own != own).any() and (other.boxes != boxes).any()
