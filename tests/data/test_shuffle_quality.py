import numpy as np
import pytest

from vitds.data import shuffle_quality as module
from vitds.data.order import NaturalOrder, WindowedOrder
from vitds.data.shuffle_quality import shuffle_quality


def figures(num_samples, num_classes, shard_length, global_batch, windows):
    """For each window (0: all) the figures of one epoch, classes sorted, and the entropy where they are shuffled."""
    lengths = np.diff([*range(0, num_samples, shard_length), num_samples])
    shard = np.repeat(np.arange(len(lengths)), lengths)
    by_class = np.arange(num_samples) * num_classes // num_samples
    shuffled = np.random.default_rng(0).permutation(by_class)
    num_batches = num_samples // global_batch
    for window in windows:
        order = WindowedOrder(0, tuple(lengths.tolist()), window) if window else NaturalOrder(0, num_samples)
        in_order = shuffle_quality(order, by_class, shard, global_batch, num_batches)
        mixed = shuffle_quality(order, shuffled, shard, global_batch, num_batches)
        yield window, *in_order, mixed.class_entropy_bits


def test_a_window_keeps_the_mix_of_classes_of_shuffled_shards_and_bounds_what_is_read():
    rows = {window: rest for window, *rest in figures(20_000, 50, 200, 100, (0, 1, 4, 16))}
    whole = rows[0]
    for window in (1, 4, 16):
        shards, correlation, by_class, shuffled = rows[window]
        assert 0.9 * window <= shards <= window + 1.5
        assert abs(correlation - 1 / window) < 0.1
        assert by_class < 0.8 * whole[2] and abs(shuffled - whole[3]) < 0.02
    assert rows[1][2] < rows[4][2] < rows[16][2]
    assert whole[2] == pytest.approx(whole[3], abs=0.02) and abs(whole[1]) < 0.02


def test_figures_of_batches_that_are_known():
    class InTurn:
        def at(self, positions):
            return NaturalOrder(0, 8).at(positions)._replace(ids=np.arange(8)[np.asarray(positions)])

    labels = np.array([0, 1, 2, 3, 0, 0, 0, 0])
    assert shuffle_quality(InTurn(), labels, np.repeat([0, 1], 4), 4, 2) == (1.0, pytest.approx(1.0), 1.0)


@pytest.mark.slow
def test_the_table_is_what_is_measured():
    stated = {}
    for line in module.__doc__.splitlines():
        words = line.replace("(all)", "").replace("(remote data)", "").split()
        if len(words) == 5 and words[0].isdigit():
            stated[int(words[0])] = [float(word) for word in words[1:]]
    for window, *measured in figures(1_281_167, 1000, 1000, 1024, (0, 256, 64, 16, 4, 1)):
        assert measured == pytest.approx(stated[window], abs=0.051), window
    assert len(stated) == 6
