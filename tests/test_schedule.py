"""The learning rates of the seed's origin, to 1e-12, as a LambdaLR on a real optimizer."""

import math

import pytest
import torch

from vitds.schedule import DECAY_TYPES, lr_factor

PEAK = 0.03


def origin(decay_type, warmup, total, step):
    """The formulas of jeonsworld/ViT-pytorch utils/scheduler.py, written out anew."""
    if step < warmup:
        return step / max(1.0, warmup)
    span = max(1.0, total - warmup)
    if decay_type == "linear":
        return max(0.0, (total - step) / span)
    if decay_type == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * (step - warmup) / span)))
    return 1.0


def rates(decay_type, warmup, total):
    """The rate that each of `total` steps trains with."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(decay_type, warmup, total))
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (1, 10), (3, 8), (500, 10_000), (10, 10)])
def test_rates_are_those_of_the_origin(decay_type, warmup, total):
    expected = [PEAK * origin(decay_type, warmup, total, step) for step in range(total)]
    assert rates(decay_type, warmup, total) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_warmup_rises_from_zero_to_the_peak_and_decay_falls_from_it():
    assert rates("linear", 4, 8) == pytest.approx([PEAK * f for f in (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)])
    cosine = rates("cosine", 4, 8)
    assert cosine[4] == PEAK
    assert cosine[6] == pytest.approx(PEAK / 2)
    assert rates("constant", 4, 8)[4:] == [PEAK] * 4


@pytest.mark.parametrize("decay_type", ["linear", "cosine"])
def test_the_factor_is_zero_at_the_end(decay_type):
    assert lr_factor(decay_type, 3, 8)(8) == pytest.approx(0.0, abs=1e-15)
