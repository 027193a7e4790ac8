"""3-Augment and colour jitter: pixels are torchvision's and close to PIL's, and draws come as often as meant."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import v2

from vitds.data.augment import draws, num_draws
from vitds.data.color import JITTER_DRAWS, THREE_AUGMENT_DRAWS, color_jitter, three_augment
from vitds.run_config import DataConfig

GREY, SOLARISED, BLURRED = 0.1, 0.5, 0.9


def photo(height=64, width=80, seed=0):
    """Smooth colours with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [110 + 60 * np.sin(rows / (9 + c)) * np.cos(columns / (13 - c)) for c in range(3)]
    return torch.from_numpy(np.clip(np.stack(waves) + rng.normal(0, 6, (3, height, width)), 0, 255).astype(np.uint8))


def with_pil(image, function):
    return torch.from_numpy(np.array(function(Image.fromarray(image.permute(1, 2, 0).numpy())))).permute(2, 0, 1)


def of_many(data, num=3000):
    """The numbers of many images, without those of crop and flip."""
    ids = np.arange(num)
    return draws(5, np.zeros_like(ids), ids, np.zeros_like(ids), num_draws(data))


@pytest.mark.parametrize(
    "which, function, difference",
    [
        (GREY, lambda image: ImageOps.grayscale(image).convert("RGB"), 1),
        (SOLARISED, ImageOps.solarize, 0),
        (BLURRED, lambda image: image.filter(ImageFilter.GaussianBlur(1.05)), 2),  # PIL's is three box filters
    ],
)
def test_three_augment_is_deit_iii_s_on_pil_images(which, function, difference):
    image = photo()
    ours = three_augment(image, np.array([which, 0.5]))
    theirs = with_pil(image, function)
    inner = (slice(None), slice(4, -4), slice(4, -4))  # PIL repeats the edge, torchvision mirrors it
    assert (ours[inner].int() - theirs[inner].int()).abs().max() <= difference
    assert (ours != image).float().mean() > 0.25


@pytest.mark.parametrize("draw, sigma", [(0.0, 0.1), (0.5, 1.05), (0.999999, 2.0)])
def test_the_blur_is_torchvision_s(draw, sigma):
    image, wide = photo(), 2 * int(np.ceil(3 * sigma)) + 5
    ours = three_augment(image, np.array([BLURRED, draw]))
    expected = v2.functional.gaussian_blur(image, [wide, wide], [sigma, sigma])
    assert (ours.int() - expected.int()).abs().max() <= 1  # ours is cut off at three deviations


def test_each_of_the_three_is_drawn_as_often_and_the_blur_s_width_evenly():
    numbers = of_many(DataConfig(three_augment=True))
    assert numbers.shape == (3000, THREE_AUGMENT_DRAWS)
    image = photo(5, 6)
    seen = [three_augment(image, row) for row in numbers]
    grey = sum(torch.equal(one[0], one[1]) for one in seen)
    solarised = sum(torch.equal(one, v2.functional.solarize(image, 128)) for one in seen)
    for count in (grey, solarised, 3000 - grey - solarised):
        assert abs(count - 1000) < 5 * np.sqrt(1000 * 2 / 3)
    assert stats.kstest(numbers[numbers[:, 0] > 2 / 3, 1], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("strength", [0.3, 1.5])
def test_jitter_is_torchvision_s_color_jitter_of_the_same_parameters(strength):
    image = photo()
    reference = v2.ColorJitter(strength, strength, strength)
    lowest, highest = reference.brightness
    for row in of_many(DataConfig(color_jitter=strength), 60):
        order = list(itertools.permutations(range(3)))[int(row[0] * 6)]
        factors = lowest + (highest - lowest) * row[1:]
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        params = dict(zip(names, [*factors.tolist(), None], strict=True), fn_idx=order)
        assert torch.equal(color_jitter(image, row, strength), reference.transform(image, params))


def test_every_order_and_every_factor_of_a_jitter_is_drawn_as_often():
    numbers = of_many(DataConfig(color_jitter=0.4))
    assert numbers.shape == (3000, JITTER_DRAWS)
    assert abs(np.bincount((numbers[:, 0] * 6).astype(int)) - 500).max() < 5 * np.sqrt(500)
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08


def test_a_jitter_stays_within_its_bounds():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)  # of a grey image contrast and saturation change nothing
    seen = {int(color_jitter(image, row, 0.3)[0, 0, 0]) for row in of_many(DataConfig(color_jitter=0.3))}
    assert 68 <= min(seen) < 72 and 128 < max(seen) <= 130  # each of the three may round down


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 3)])
def test_any_size_is_taken_and_the_input_left_alone(height, width):
    image = photo(height, width)
    before = image.clone()
    for which in (GREY, SOLARISED, BLURRED):
        output = three_augment(image, np.array([which, 0.999]))
        assert output.shape == image.shape and output.dtype == torch.uint8
    color_jitter(image, np.array([0.0, 0.0, 0.99, 0.99]), 0.9)
    assert torch.equal(image, before)
