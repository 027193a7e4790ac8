import zlib

import numpy as np
import torch

from vitds.data.augment import augment, draws, num_draws
from vitds.data.color import color_jitter, three_augment
from vitds.data.crop import NUM_DRAWS
from vitds.data.erase import erase
from vitds.data.randaugment import randaugment
from vitds.run_config import DataConfig

SIZE = (24, 32)


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def numbers_of(sample_id: int, seed: int = 0, epoch: int = 0, copy: int = 0) -> np.ndarray:
    return draws(seed, np.array([epoch]), np.array([sample_id]), np.array([copy]), 60)[0]


def test_draws_depend_on_seed_epoch_sample_and_copy_and_on_nothing_else():
    together = draws(7, np.full(20, 3), np.arange(20), np.zeros(20, int), 60)
    np.testing.assert_array_equal(together[11], numbers_of(11, seed=7, epoch=3))
    others = [numbers_of(11, 8, 3), numbers_of(11, 7, 4), numbers_of(12, 7, 3), numbers_of(11, 7, 3, copy=1)]
    assert all((other != together[11]).all() for other in others)


def test_the_numbers_of_runs_that_began_before_stay_what_they_were():
    """A run resumed with a newer vitds goes on with the crops, flips and operations of the older one."""
    numbers = draws(
        42,
        np.arange(6) // 2,
        np.arange(6) ** 5,
        np.zeros(6, int),
        NUM_DRAWS + num_draws(DataConfig(randaugment_layers=2)),
    )
    assert numbers.shape == (6, 49) and num_draws(DataConfig()) == 0 and NUM_DRAWS == 41
    assert zlib.crc32((numbers * 2**53).astype("<u8").tobytes()) == 1161811079


def test_operations_follow_each_other_and_each_takes_its_own_numbers():
    on = {"randaugment_layers": 1, "three_augment": True, "color_jitter": 0.3, "erase": 0.9}
    data, image = DataConfig(**on), photo(*SIZE)
    assert num_draws(data) == 4 + 2 + 4 + 42
    for sample_id in range(20):
        numbers = draws(0, np.zeros(1, int), np.array([sample_id]), np.zeros(1, int), num_draws(data))[0]
        expected = color_jitter(three_augment(randaugment(image, numbers[:4], 10), numbers[4:6]), numbers[6:10], 0.3)
        assert torch.equal(augment(image, numbers, data), erase(expected, numbers[10:], 0.9, 0.5, 0.5))
    for key, value in on.items():  # each is off by itself
        alone = DataConfig(**{key: value})
        assert not torch.equal(augment(image, numbers[: num_draws(alone)], alone), image)
    assert augment(image, numbers[:0], DataConfig()) is image


def test_two_copies_of_a_sample_are_augmented_apart():
    data, image = DataConfig(three_augment=True, color_jitter=0.3), photo(*SIZE)
    first, second = draws(0, np.zeros(2, int), np.full(2, 7), np.arange(2), num_draws(data))
    assert not np.isin(first, second).any()
    assert not torch.equal(augment(image, first, data), augment(image, second, data))
