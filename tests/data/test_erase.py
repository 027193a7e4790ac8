"""Random erasing: torchvision's boxes on our numbers, and noise that counters fix."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2._augment as torchvision_s
from scipy import stats

from vitds.data.augment import draws, num_draws
from vitds.data.erase import ERASE_DRAWS, erase, erased_box
from vitds.run_config import DataConfig

NUMBERS = draws(3, np.zeros(2000, int), np.arange(2000), np.zeros(2000, int), num_draws(DataConfig(erase=0.5)))


class FixedDraws:
    """Stands in for `torch` inside RandomErasing.make_params: the same arithmetic, in float64, on our numbers."""

    float32 = torch.float32

    def __init__(self, numbers):
        self.attempts = iter(numbers[2:].reshape(10, 4).tolist())
        self.is_ratio = False

    def exp(self, value):
        return torch.exp(value)

    def tensor(self, values):
        return torch.tensor(values)

    def empty(self, _):
        return SimpleNamespace(uniform_=self.uniform_)

    def uniform_(self, low, high):
        if not self.is_ratio:
            self.attempt = iter(next(self.attempts))
        self.is_ratio = not self.is_ratio
        return torch.as_tensor(low + (high - low) * next(self.attempt), dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor(int(low + next(self.attempt) * (high - low)))


@pytest.mark.parametrize("height, width", [(224, 224), (40, 400), (3, 3), (1, 1)])
def test_boxes_are_those_of_torchvision_on_the_same_numbers(monkeypatch, height, width):
    reference = torchvision_s.RandomErasing()
    reference._log_ratio = torch.log(torch.tensor(reference.ratio, dtype=torch.float64))
    image, boxes = torch.empty(3, height, width), set()
    for numbers in NUMBERS[:300]:
        with monkeypatch.context() as patch:
            patch.setattr(torchvision_s, "torch", FixedDraws(numbers))
            expected = reference.make_params([image])
        box = erased_box(height, width, numbers[2:])
        assert box == (tuple(expected[name] for name in "ijhw") if expected["v"] is not None else None)
        boxes.add(box)
    assert len(boxes) > 250 or height < 100


def test_a_box_is_erased_as_often_as_asked_and_nothing_beside_it_changes():
    image = torch.full((3, 32, 40), 255, dtype=torch.uint8)
    num_erased = 0
    for numbers in NUMBERS:
        seen = erase(image, numbers, 0.25, 0.5, 0.1)
        assert seen.shape == image.shape and seen.dtype == torch.uint8
        if numbers[0] >= 0.25:
            assert seen is image
            continue
        num_erased += 1
        top, left, height, width = erased_box(32, 40, numbers[2:])
        changed = torch.zeros(32, 40, dtype=torch.bool)
        changed[top : top + height, left : left + width] = True
        assert torch.equal((seen != 255).any(0), changed)
        assert 0.01 < height * width / (32 * 40) < 0.36
    assert abs(num_erased - 500) < 5 * np.sqrt(500 * 0.75)
    assert (image == 255).all()


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (0.5, 0.1)])
def test_the_model_is_given_normal_noise(mean, std):
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    numbers = next(row for row in NUMBERS if erased_box(224, 224, row[2:])[2] > 100)
    top, left, height, width = erased_box(224, 224, numbers[2:])
    seen = erase(image, numbers, 1.0, mean, std)[:, top : top + height, left : left + width].double() / 255
    for channel, centre, spread in zip(seen, np.resize(mean, 3), np.resize(std, 3), strict=True):
        normal = ((channel - centre) / spread).flatten()
        inside = normal[(channel.flatten() > 0) & (channel.flatten() < 1)]  # uint8 cuts the tails off
        cut = stats.truncnorm(-centre / spread, (1 - centre) / spread)
        assert (
            stats.kstest(
                inside + np.random.default_rng(0).uniform(-0.5, 0.5, len(inside)) / 255 / spread, cut.cdf
            ).pvalue
            > 1e-3
        )
    assert abs(np.corrcoef(seen.flatten(1).numpy()) - np.eye(3)).max() < 0.05


def test_noise_is_a_function_of_the_numbers_alone():
    image = torch.zeros(3, 50, 60, dtype=torch.uint8)
    numbers, other = NUMBERS[0].copy(), NUMBERS[0].copy()
    other[1] = NUMBERS[1][1]
    assert torch.equal(erase(image, numbers, 1.0, 0.5, 0.5), erase(image, numbers, 1.0, 0.5, 0.5))
    first, second = (erase(image, row, 1.0, 0.5, 0.5) for row in (numbers, other))
    inside = (first != 0) & (second != 0)
    assert (first[inside] == second[inside]).float().mean() < 0.1
    assert len(numbers) == ERASE_DRAWS
