import numpy as np
import pytest
import torch
from scipy import stats

from vitds.data.mixup import mixup, mixup_coefficients


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


def test_neighbours_are_blended_and_their_targets_alike():
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 2, 1, 1])
    mixed, targets = mixup(images, labels, torch.tensor([0.75, 0.1], dtype=torch.float64), 3)
    torch.testing.assert_close(mixed[0], 0.75 * images[0] + 0.25 * images[1])
    torch.testing.assert_close(mixed[1], 0.75 * images[1] + 0.25 * images[0])
    torch.testing.assert_close(mixed[3], 0.1 * images[3] + 0.9 * images[2])
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 1, 0], [0, 1, 0]]))
