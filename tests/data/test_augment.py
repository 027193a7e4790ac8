import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import v2

from vitds.data.augment import (
    NUM_DRAWS,
    augment,
    draws,
    eval_box,
    eval_transform,
    num_draws,
    random_box,
    train_transform,
)
from vitds.data.color import color_jitter, three_augment
from vitds.data.erase import erase
from vitds.data.randaugment import randaugment
from vitds.run_config import DataConfig

SIZE = (24, 32)


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def numbers_of(sample_id: int, seed: int = 0, epoch: int = 0, copy: int = 0) -> np.ndarray:
    return draws(seed, np.array([epoch]), np.array([sample_id]), np.array([copy]))[0]


def test_draws_depend_on_seed_epoch_sample_and_copy_and_on_nothing_else():
    together = draws(7, np.full(20, 3), np.arange(20), np.zeros(20, int))
    np.testing.assert_array_equal(together[11], numbers_of(11, seed=7, epoch=3))
    others = [numbers_of(11, 8, 3), numbers_of(11, 7, 4), numbers_of(12, 7, 3), numbers_of(11, 7, 3, copy=1)]
    assert all((other != together[11]).all() for other in others)


def test_the_numbers_of_runs_that_began_before_stay_what_they_were():
    """A run resumed with a newer vitds goes on with the crops, flips and operations of the older one."""
    numbers = draws(
        42, np.arange(6) // 2, np.arange(6) ** 5, np.zeros(6, int), num_draws(DataConfig(randaugment_layers=2))
    )
    assert numbers.shape == (6, 49) and num_draws(DataConfig()) == NUM_DRAWS == 41
    assert zlib.crc32((numbers * 2**53).astype("<u8").tobytes()) == 1161811079


def test_operations_follow_each_other_and_each_takes_its_own_numbers():
    on = {"randaugment_layers": 1, "three_augment": True, "color_jitter": 0.3, "erase": 0.9}
    data, image = DataConfig(**on), photo(*SIZE)
    assert num_draws(data) - NUM_DRAWS == 4 + 2 + 4 + 42
    for sample_id in range(20):
        numbers = draws(0, np.zeros(1, int), np.array([sample_id]), np.zeros(1, int), num_draws(data))[0, NUM_DRAWS:]
        expected = color_jitter(three_augment(randaugment(image, numbers[:4], 10), numbers[4:6]), numbers[6:10], 0.3)
        assert torch.equal(augment(image, numbers, data), erase(expected, numbers[10:], 0.9, 0.5, 0.5))
    for key, value in on.items():  # each is off by itself
        alone = DataConfig(**{key: value})
        assert not torch.equal(augment(image, numbers[: num_draws(alone) - NUM_DRAWS], alone), image)
    assert augment(image, numbers[:0], DataConfig()) is image


def test_two_copies_of_a_sample_are_augmented_apart():
    data, image = DataConfig(three_augment=True, color_jitter=0.3), photo(60, 70)
    first, second = draws(0, np.zeros(2, int), np.full(2, 7), np.arange(2), num_draws(data))
    assert not np.isin(first, second).any()
    assert not torch.equal(train_transform(image, first, data, SIZE), train_transform(image, second, data, SIZE))


class FixedDraws:
    """Stands in for `torch` inside RandomResizedCrop.get_params: the same arithmetic, in float64, on our numbers."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.attempts = iter(numbers[:40].reshape(10, 4).tolist())
        self.log, self.exp = torch.log, torch.exp

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _):
        return SimpleNamespace(uniform_=self.uniform_)

    def uniform_(self, low, high):
        if not getattr(self, "is_ratio", False):
            self.attempt = iter(next(self.attempts))
        self.is_ratio = not getattr(self, "is_ratio", False)
        return self.tensor([low + (high - low) * next(self.attempt)])

    def randint(self, low, high, size):
        return torch.tensor([int(low + next(self.attempt) * (high - low))])


@pytest.mark.parametrize(
    "scale, ratio", [((0.05, 1.0), (0.75, 4 / 3)), ((0.3, 0.5), (1.0, 1.0)), ((0.9, 1.0), (2.0, 3.0))]
)
@pytest.mark.parametrize("height, width", [(375, 500), (40, 400), (400, 40), (1, 9)])
def test_boxes_are_those_of_torchvision_on_the_same_numbers(monkeypatch, height, width, scale, ratio):
    image = torch.empty(3, height, width)
    boxes = set()
    for sample_id in range(100):
        numbers = numbers_of(sample_id)
        with monkeypatch.context() as patch:
            patch.setattr(torchvision.transforms.transforms, "torch", FixedDraws(numbers))
            expected = torchvision.transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
        box = random_box(height, width, scale, ratio, numbers)
        assert box == tuple(expected)
        boxes.add(box)
    assert len(boxes) > 50 or (height, width) != (375, 500) or ratio == (2.0, 3.0)


@pytest.mark.parametrize("aspect", [1e-3, 1e3])
def test_a_box_is_never_thinner_than_a_pixel(aspect):
    _, _, height, width = random_box(24, 32, (1.0, 1.0), (aspect, aspect), numbers_of(0))
    assert (height, width) == ((24, 1) if aspect < 1 else (1, 32))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_random_crop_is_torchvision_s_resized_crop_of_its_box(interpolation):
    data, image = DataConfig(interpolation=interpolation, flip=0.5), photo(50, 61)
    flipped = 0
    for sample_id in range(20):
        numbers = numbers_of(sample_id)
        box = random_box(50, 61, data.crop_scale, data.crop_ratio, numbers)
        expected = v2.functional.resized_crop(
            image, *box, list(SIZE), v2.InterpolationMode(interpolation), antialias=True
        )
        if numbers[-1] < 0.5:
            expected, flipped = v2.functional.horizontal_flip(expected), flipped + 1
        assert torch.equal(train_transform(image, numbers, data, SIZE), expected)
    assert 0 < flipped < 20


def test_pad_moves_the_image_by_up_to_four_pixels():
    data, image = DataConfig(train_crop="pad", flip=0.0), photo(*SIZE)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = {
        padded[:, top : top + SIZE[0], left : left + SIZE[1]].numpy().tobytes(): (top, left)
        for top in range(9)
        for left in range(9)
    }
    seen = {windows[train_transform(image, numbers_of(i), data, SIZE).numpy().tobytes()] for i in range(400)}
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))


def test_no_crop_and_squash_are_one_plain_resize():
    image = photo(50, 61)
    expected = v2.functional.resize(image, list(SIZE), antialias=True)
    data = DataConfig(train_crop="none", flip=0.0, eval_crop="squash")
    assert torch.equal(train_transform(image, numbers_of(0), data, SIZE), expected)
    assert torch.equal(eval_transform(image, data, SIZE), expected)


@pytest.mark.parametrize("height, width", [(50, 61), (61, 50), (300, 41), (8, 8)])
def test_center_is_torchvision_s_resize_and_center_crop(height, width):
    image = photo(height, width)
    reference = v2.Compose([v2.Resize(int(24 / 0.875), antialias=True), v2.CenterCrop(24)])
    assert torch.equal(eval_transform(image, DataConfig(eval_crop="center"), (24, 24)), reference(image))
    assert eval_transform(image, DataConfig(eval_crop="center", crop_fraction=1.0), SIZE).shape == (3, *SIZE)


@pytest.mark.parametrize("height, width", [(500, 610), (610, 500), (1000, 96)])
@pytest.mark.parametrize("size", [(96, 96), (96, 128)])
def test_the_box_is_what_the_model_sees(height, width, size):
    """A ramp over rows and columns: the transform's corners show which part was kept."""
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    ramp = 250 * torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1), rows[:, None] + 0 * columns])
    for data in (DataConfig(), DataConfig(eval_crop="center"), DataConfig(eval_crop="center", crop_fraction=0.5)):
        seen = eval_transform(ramp.to(torch.uint8), data, size)
        top, left, box_h, box_w = eval_box(height, width, data, size)
        boxed = eval_transform(ramp[:, top : top + box_h, left : left + box_w].to(torch.uint8), DataConfig(), size)
        assert (seen.int() - boxed.int()).abs().max() <= 4
        assert data.eval_crop == "center" or (top, left, box_h, box_w) == (0, 0, height, width)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 200), (200, 1), (7, 5)])
@pytest.mark.parametrize("crop", ["random", "pad", "none"])
def test_any_image_reaches_any_size(height, width, crop):
    image = photo(height, width)
    for eval_crop in ("squash", "center"):
        data = DataConfig(train_crop=crop, eval_crop=eval_crop)
        for output in (train_transform(image, numbers_of(3), data, SIZE), eval_transform(image, data, SIZE)):
            assert output.shape == (3, *SIZE) and output.dtype == torch.uint8
