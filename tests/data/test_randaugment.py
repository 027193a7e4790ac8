"""RandAugment: operations are PIL's at big_vision's strength, and which are drawn follows from the counters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from vitds.data.augment import augment, draws, num_draws
from vitds.data.crop import NUM_DRAWS
from vitds.data.randaugment import DRAWS_PER_LAYER, OPERATIONS, randaugment
from vitds.run_config import DataConfig

SIDE = 112
PLUS, MINUS = 0.2, 0.8  # draws that mean a positive and a negative sign
NAMES = [operation.__name__.strip("_") for operation in OPERATIONS]


def photo(height=SIDE, width=SIDE, seed=0):
    """Smooth colours with noise: no two operations leave it alone."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [110 + 60 * np.sin(rows / (9 + c)) * np.cos(columns / (13 - c)) for c in range(3)]
    return np.clip(np.stack(waves) + rng.normal(0, 6, (3, height, width)), 0, 255).astype(np.uint8)


def apply(name, image, magnitude=10.0, sign=PLUS, row=0.5, column=0.5):
    which = (NAMES.index(name) + 0.5) / len(NAMES)
    return randaugment(torch.from_numpy(image), np.array([which, sign, row, column]), magnitude).numpy()


def with_pil(image, function):
    return np.asarray(function(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1)


def sheared(x, y):
    matrix = (1, x, 0, y, 1, 0)
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(128,) * 3)


PIL_S = {  # at magnitude 10: PIL's function, and the largest difference of a pixel
    "auto_contrast": (ImageOps.autocontrast, 1),
    "equalize": (ImageOps.equalize, 0),
    "invert": (ImageOps.invert, 0),
    "posterize": (lambda image: ImageOps.posterize(image, 4), 0),
    "solarize": (lambda image: image, 0),
    "color": (lambda image: ImageEnhance.Color(image).enhance(1.9), 2),
    "contrast": (lambda image: ImageEnhance.Contrast(image).enhance(1.9), 2),
    "brightness": (lambda image: ImageEnhance.Brightness(image).enhance(1.9), 1),
    "sharpness": (lambda image: ImageEnhance.Sharpness(image).enhance(1.9), 2),
}


@pytest.mark.parametrize("name", PIL_S)
def test_colours_are_pil_s(name):
    function, difference = PIL_S[name]
    image = photo()
    ours, theirs = apply(name, image).astype(int), with_pil(image, function).astype(int)
    assert abs(ours - theirs).max() <= difference
    assert name == "solarize" or (ours != image).mean() > 0.5


@pytest.mark.parametrize("sign", [PLUS, MINUS])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_shapes_are_pil_s_with_grey_where_nothing_was(name, sign):
    image, value = photo(), 1 if sign == PLUS else -1
    functions = {
        "rotate": lambda image: image.rotate(30 * value, fillcolor=(128,) * 3),
        "shear_x": sheared(0.3 * value, 0),
        "shear_y": sheared(0, 0.3 * value),
    }
    ours = apply(name, image, sign=sign)
    assert (ours != with_pil(image, functions[name])).any(axis=0).mean() < 0.02  # they round ties differently
    assert (ours == 128).all(axis=0).mean() > 0.05


@pytest.mark.parametrize("sign", [PLUS, MINUS])
@pytest.mark.parametrize("axis, name", [(2, "translate_x"), (1, "translate_y")])
def test_translation_is_a_shift_by_its_share_of_the_side(axis, name, sign):
    image = photo()
    pixels = 50 if sign == PLUS else -50  # 100 of 224
    expected = np.roll(image, pixels, axis)
    uncovered = np.arange(SIDE) < 50 if pixels > 0 else np.arange(SIDE) >= SIDE - 50
    expected[(slice(None),) * axis + (uncovered,)] = 128
    np.testing.assert_array_equal(apply(name, image, sign=sign), expected)


def test_cutout_is_a_grey_square_that_the_edge_may_cut():
    image = photo()
    expected = image.copy()
    expected[:, 36:76, 0:20] = 128  # 80 of 224, centred at row 56 and column 0
    np.testing.assert_array_equal(apply("cutout", image, row=0.5, column=0.0), expected)


def test_solarizing_follows_its_thresholds():
    image = photo()
    np.testing.assert_array_equal(apply("solarize", image, 5.0), np.where(image >= 128, 255 - image, image))
    brighter = np.minimum(image.astype(int) + 110, 255)
    np.testing.assert_array_equal(apply("solarize_add", image), np.where(image < 128, brighter, image))


def test_magnitude_scales_what_an_operation_does():
    image = photo()
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout"):
        np.testing.assert_array_equal(apply(name, image, 0.0), image)
        assert (apply(name, image, 20.0) == 128).sum() > (apply(name, image, 5.0) == 128).sum()
    assert apply("brightness", image, 5.0) == pytest.approx(image, abs=1)  # a factor of 1
    assert apply("posterize", image, 20.0) == pytest.approx(image)  # 8 bits


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (7, 3), (64, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_takes_every_size_and_leaves_its_input_alone(name, height, width):
    image = photo(height, width)
    before = image.copy()
    for magnitude in (0.0, 10.0, 30.0):
        output = apply(name, image, magnitude, sign=MINUS)
        assert output.shape == image.shape and output.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_every_operation_is_drawn_as_often_as_another():
    data = DataConfig(randaugment_layers=2)
    first = np.zeros(4000, int)
    numbers = draws(3, first, np.arange(4000), first, NUM_DRAWS + num_draws(data))[:, NUM_DRAWS:]
    which = (numbers.reshape(-1, DRAWS_PER_LAYER)[:, 0] * len(OPERATIONS)).astype(int)
    counts = np.bincount(which, minlength=16)
    assert len(counts) == len(OPERATIONS) == 16
    assert abs(counts - 500).max() < 5 * np.sqrt(500)
    layers = which.reshape(-1, 2)
    assert abs(np.corrcoef(layers.T)[0, 1]) < 0.06


def test_crops_and_flips_stay_what_they_are_without_it():
    epochs, ids = np.zeros(5, int), np.arange(5)
    first = np.zeros_like(ids)
    on = DataConfig(randaugment_layers=2, randaugment_magnitude=10)
    more = draws(1, epochs, ids, first, NUM_DRAWS + num_draws(on))
    np.testing.assert_array_equal(more[:, :NUM_DRAWS], draws(1, epochs, ids, first, NUM_DRAWS))
    image = torch.from_numpy(photo(24, 32))
    for row in more[:, NUM_DRAWS:]:
        assert torch.equal(augment(image, row, on), randaugment(image, row, 10))
        assert torch.equal(augment(image, row[:0], DataConfig()), image)
