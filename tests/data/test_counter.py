import numpy as np

from vitds.data.counter import Stream, mix, random_bits, uniform


def test_the_finalizer_is_splitmix64():
    # The first outputs of Vigna's splitmix64.c seeded with 0 are mix(0), mix(golden), mix(2 golden).
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64)
    assert [hex(number) for number in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_draws_are_frozen():
    # A checkpoint continues the same stream under a later version of vitds: these numbers never change.
    assert random_bits(Stream.ORDER, 0, 1, 2).item() == 16486662716584252074
    assert uniform(Stream.AUGMENT, 42, 0, np.arange(3)).tolist() == [
        0.2238971367265804,
        0.9460211270162416,
        0.0038749488815004174,
    ]


def test_uniform_numbers_are_uniform_and_uncorrelated_along_each_counter():
    by_last = uniform(Stream.AUGMENT, 0, np.arange(50_000))
    by_first = uniform(Stream.AUGMENT, np.arange(50_000), 0)
    for numbers in (by_last, by_first):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 160  # chi-squared, 99 degrees of freedom
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(by_last, by_first)[0, 1]) < 0.02


def test_counters_broadcast_and_negative_seeds_are_fine():
    grid = random_bits(-1, np.arange(3)[:, None], np.arange(4))
    assert grid.shape == (3, 4) and len(set(grid.ravel().tolist())) == 12
    assert grid[2, 3] == random_bits(-1, 2, 3)
