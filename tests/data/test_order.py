from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from vitds.data.order import eval_batch, micro_batch_positions, num_eval_rounds, rank_positions, sample_at


@dataclass
class Batch:
    global_batch: int
    micro_batch: int
    accumulation_steps: int
    world_size: int


def ids_of_rank(batch: Batch, rank: int, steps: range, seed: int, num_samples: int) -> list[int]:
    micro_batches = [
        micro_batch_positions(batch, rank, step, index) for step in steps for index in range(batch.accumulation_steps)
    ]
    return [i for positions in micro_batches for i in sample_at(positions, seed, num_samples)[1].tolist()]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 257, 1797, 4096, 5000])
def test_every_epoch_is_a_permutation(num_samples):
    epochs, ids = sample_at(np.arange(4 * num_samples), seed=3, num_samples=num_samples)
    for epoch in range(4):
        part = slice(epoch * num_samples, (epoch + 1) * num_samples)
        assert (epochs[part] == epoch).all()
        assert sorted(ids[part]) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    orders = [tuple(sample_at(np.arange(100) + 100 * epoch, seed, 100)[1]) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25


def test_permutations_of_four_are_equally_likely():
    counts = Counter(tuple(sample_at(np.arange(4), seed, 4)[1]) for seed in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 55  # chi-squared, 23 degrees of freedom


def test_neighbours_in_the_stream_are_not_neighbours_in_the_data():
    _, ids = sample_at(np.arange(10_000), 0, 10_000)
    assert abs(np.corrcoef(ids[1:], ids[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05


def test_any_world_size_and_accumulation_gives_the_same_global_batches():
    random = np.random.default_rng(0)
    for _ in range(30):
        world_size, accumulation, micro = random.integers(1, 25), random.integers(1, 5), random.integers(1, 6)
        batch = Batch(int(world_size * accumulation * micro), int(micro), int(accumulation), int(world_size))
        num_samples, seed = int(random.integers(1, 300)), int(random.integers(0, 100))
        first = int(random.integers(0, 50))
        for step in range(first, first + 3):
            alone = Batch(batch.global_batch, batch.global_batch, 1, 1)
            whole = ids_of_rank(alone, 0, range(step, step + 1), seed, num_samples)
            by_rank = [
                ids_of_rank(batch, rank, range(step, step + 1), seed, num_samples) for rank in range(batch.world_size)
            ]
            assert [i for ids in by_rank for i in ids] == whole


def test_nothing_is_dropped_padded_or_repeated_when_the_batch_does_not_divide_the_data():
    batch, num_samples = Batch(24, 4, 3, 2), 107  # 107 steps of 24 are 24 epochs
    ids = [i for rank in range(2) for i in ids_of_rank(batch, rank, range(107), 0, num_samples)]
    assert set(Counter(ids).values()) == {24}


def test_data_smaller_than_a_batch_trains():
    epochs, ids = sample_at(rank_positions(Batch(16, 16, 1, 1), 0, 0), 0, 5)
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3]
    assert sorted(ids[:5]) == sorted(ids[5:10]) == list(range(5))


def test_starting_anywhere_needs_nothing_from_before():
    far = 10**12
    _, ids = sample_at(range(far, far + 1000), 0, 1_281_167)
    one_by_one = [sample_at([position], 0, 1_281_167)[1].item() for position in range(far, far + 1000, 97)]
    assert ids[::97].tolist() == one_by_one


def test_the_order_is_frozen():
    # A checkpoint continues the same stream under a later version of vitds: these numbers never change.
    assert sample_at(range(6, 14), seed=42, num_samples=10)[1].tolist() == [8, 6, 4, 5, 5, 4, 1, 9]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_samples", [1, 5, 12, 29, 100])
def test_evaluation_counts_each_sample_once_and_keeps_ranks_in_step(world_size, num_samples):
    rounds = num_eval_rounds(num_samples, 4, world_size)
    batches = [
        eval_batch(num_samples, 4, world_size, rank, number) for number in range(rounds) for rank in range(world_size)
    ]
    assert [i for _, ids in batches for i in ids] == list(range(num_samples))
    assert [index for index, _ in batches] == list(range(rounds * world_size))
    per_rank = [sum(bool(ids) for _, ids in batches[rank::world_size]) for rank in range(world_size)]
    assert max(per_rank) - min(per_rank) <= 1
