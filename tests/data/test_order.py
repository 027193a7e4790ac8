import pickle
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from vitds.data.index import Index
from vitds.data.order import (
    MIXTURE_BLOCK,
    BalancedOrder,
    NaturalOrder,
    Planned,
    RepeatedOrder,
    WindowedOrder,
    block_slots,
    build_order,
    eval_batch,
    micro_batch_positions,
    num_eval_rounds,
    rank_positions,
    sample_at,
)
from vitds.errors import DataError
from vitds.run_config import DataConfig


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


def index_of(labels: np.ndarray, shard_lengths: list[int]) -> Index:
    """An index with these labels and shards, and nothing else of interest."""
    zeros = np.zeros(len(labels), dtype=np.int64)
    shard = np.repeat(np.arange(len(shard_lengths)), shard_lengths)
    names = [f"{number:06d}.tar" for number in range(len(shard_lengths))]
    return Index(names, shard, pa.array([""] * len(labels)), zeros, zeros, labels, zeros, zeros, zeros)


def random_index(random: np.random.Generator, most: int = 300) -> Index:
    """Up to `most` samples of up to 12 classes, some of them empty, in up to 9 shards, some of them empty."""
    num_samples = int(random.integers(1, most))
    cuts = np.sort(random.integers(0, num_samples + 1, int(random.integers(0, 9))))
    lengths = np.diff(np.concatenate([[0], cuts, [num_samples]])).tolist()
    labels = random.choice(random.integers(0, 40, int(random.integers(1, 12))), num_samples)
    return index_of(labels, lengths)


@dataclass
class Case:
    """A run as it might be."""

    data: DataConfig
    indexes: list[Index]
    batch: Batch
    seed: int
    first_step: int

    def order(self, batch: Batch):
        return build_order(self.data, self.seed, batch.global_batch, self.indexes)


def random_case(number: int) -> Case:
    random = np.random.default_rng(number)
    repeats = int(random.choice([1, 1, 2, 3]))
    world_size, accumulation, micro = (int(random.integers(1, most)) for most in (25, 5, 6))
    batch = Batch(repeats * world_size * accumulation * micro, repeats * micro, accumulation, world_size)
    indexes = [random_index(random) for _ in range(random.choice([1, 1, 2, 3]))]
    sampling, window = [("natural", 0), ("natural", int(random.integers(1, 12))), ("balanced", 0)][random.integers(3)]
    weights = tuple(random.uniform(0.1, 1, len(indexes))) if len(indexes) > 1 and random.random() < 0.7 else ()
    data = DataConfig(sampling=sampling, repeats=repeats, shuffle_window=window, weights=weights)
    far = int(random.choice([0, 0, 10**5]))
    return Case(data, indexes, batch, int(random.integers(2**63)), far + int(random.integers(50)))


def planned_by_ranks(case: Case, batch: Batch, steps: range) -> np.ndarray:
    """Epochs, ids and copies of whole global batches, put together from what each rank's micro-batches ask for.

    Shapes: -> (3, positions).
    """
    order = pickle.loads(pickle.dumps(case.order(batch)))  # as a worker gets it
    parts = [
        np.stack(order.at(micro_batch_positions(batch, rank, step, index)))
        for step in steps
        for rank in range(batch.world_size)
        for index in range(batch.accumulation_steps)
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("number", range(60))
def test_stopped_and_restarted_on_other_ranks_sees_the_same_global_batches(number):
    case = random_case(number)
    random = np.random.default_rng(1000 + number)
    batch, first = case.batch, case.first_step
    stop = first + int(random.integers(1, 4))
    end = stop + int(random.integers(1, 4))
    world_sizes = [size for size in range(1, 25) if batch.global_batch % size == 0]
    other_world = int(random.choice(world_sizes))
    other = Batch(batch.global_batch, batch.global_batch // other_world, 1, other_world)
    whole = np.stack(case.order(batch).at(np.arange(first * batch.global_batch, end * batch.global_batch)))
    assert (planned_by_ranks(case, batch, range(first, stop)) == whole[:, : (stop - first) * batch.global_batch]).all()
    assert (planned_by_ranks(case, other, range(stop, end)) == whole[:, (stop - first) * batch.global_batch :]).all()


@pytest.mark.parametrize("number", range(60))
def test_no_two_positions_are_augmented_alike_and_every_sample_comes_as_often_as_it_should(number):
    case = random_case(number)
    num_steps = -(-3 * sum(map(len, case.indexes)) // case.batch.global_batch) * case.data.repeats
    planned = case.order(case.batch).at(np.arange(num_steps * case.batch.global_batch))
    assert len(set(zip(*map(np.ndarray.tolist, planned), strict=True))) == len(planned.ids)
    assert (np.bincount(planned.copies) == len(planned.ids) // case.data.repeats).all()
    first_copies = Planned(*(column[planned.copies == 0] for column in planned))
    for part, ids in each_walk(case):
        epochs = first_copies.epochs[np.isin(first_copies.ids, ids)]
        walked = first_copies.ids[np.isin(first_copies.ids, ids)]
        assert (epochs == np.arange(len(epochs)) // len(ids)).all(), part  # passes follow each other, none is short
        for epoch in range(len(epochs) // len(ids)):
            assert sorted(walked[epochs == epoch]) == sorted(ids), part


def each_walk(case: Case):
    """What is walked in whole passes: a data set, a source of a mixture, or a class of either."""
    firsts = np.cumsum([0] + [len(index) for index in case.indexes])
    everything = [np.arange(firsts[-1])]
    sources = [np.arange(first, end) for first, end in pairwise(firsts)]
    labels = np.concatenate([index.label for index in case.indexes])
    for ids in sources if case.data.weights else everything:
        if case.data.sampling == "balanced":
            yield from ((f"class {label}", ids[labels[ids] == label]) for label in np.unique(labels[ids]))
        else:
            yield "epoch", ids


def test_every_round_has_every_class_once_in_an_order_of_its_own():
    labels = np.repeat([0, 2, 7, 8], [1, 50, 3, 1000])
    planned = BalancedOrder(3, labels).at(np.arange(4 * 600))
    rounds = labels[planned.ids].reshape(600, 4)
    assert (np.sort(rounds, axis=1) == [0, 2, 7, 8]).all()
    assert len(set(map(tuple, rounds.tolist()))) == 24
    assert (np.bincount(planned.ids[labels[planned.ids] == 2])[1:51] == 12).all()


def test_a_mixture_has_its_weights_in_every_block_and_each_source_walks_on():
    indexes = [index_of(np.zeros(size, dtype=np.int64), [size]) for size in (700, 31, 900)]
    order = build_order(DataConfig(weights=(0.5, 0.2, 0.300049)), 5, 64, indexes)
    planned = order.at(np.arange(5 * MIXTURE_BLOCK))
    sources = np.searchsorted([700, 731], planned.ids, side="right")
    counts = [np.bincount(block).tolist() for block in sources.reshape(5, MIXTURE_BLOCK)]
    assert counts == [list(block_slots((0.5, 0.2, 0.300049)))] * 5
    assert abs(np.corrcoef(sources[1:], sources[:-1])[0, 1]) < 0.02
    for source in range(3):
        own = planned.ids[sources == source] - order.sources[source].first_id
        assert (own == order.sources[source].order.at(np.arange(len(own))).ids).all()


@pytest.mark.parametrize(
    "weights, slots",
    [
        ((1, 1, 1), (3334, 3333, 3333)),
        ((0.7, 0.3), (7000, 3000)),
        ((9999, 1), (9999, 1)),
        ((2,), (10000,)),
        ((0.00012, 0.00028, 0.9996), (1, 3, 9996)),
    ],
)
def test_slots_are_shares_rounded_to_an_exact_sum(weights, slots):
    assert block_slots(weights) == slots and sum(slots) == MIXTURE_BLOCK


def test_sources_of_the_same_size_are_shuffled_each_in_its_own_way():
    indexes = [index_of(np.zeros(100, dtype=np.int64), [100])] * 2
    order = build_order(DataConfig(weights=(1, 1)), 5, 64, indexes)
    first, second = (source.order.at(np.arange(100)).ids for source in order.sources)
    assert (first == second).sum() < 10


def test_without_weights_directories_are_one_data_set():
    indexes = [index_of(np.zeros(size, dtype=np.int64), [size]) for size in (70, 31)]
    assert build_order(DataConfig(), 5, 64, indexes) == NaturalOrder(5, 101)
    assert build_order(DataConfig(shuffle_window=1), 5, 64, indexes) == WindowedOrder(5, (70, 31), 1)
    assert build_order(DataConfig(shuffle_window=2), 5, 64, indexes) == NaturalOrder(5, 101)  # holds all of them


@pytest.mark.parametrize("global_batch, repeats", [(12, 2), (12, 3), (24, 4), (60, 3)])
def test_a_batch_holds_copies_of_few_samples_and_never_pairs_a_sample_with_itself(global_batch, repeats):
    order = RepeatedOrder(NaturalOrder(1, 1000), global_batch, repeats)
    for step in range(6):
        planned = order.at(np.arange(step * global_batch, (step + 1) * global_batch))
        num_distinct = global_batch // repeats
        base = NaturalOrder(1, 1000).at(np.arange(step * num_distinct, (step + 1) * num_distinct)).ids
        for copy, ids in enumerate(planned.ids.reshape(repeats, -1)):
            assert (np.roll(ids, copy) == base).all()
        assert (planned.copies.reshape(repeats, -1).T == np.arange(repeats)).all()
        assert (planned.ids[::2] != planned.ids[1::2]).all()
        if num_distinct % 2 == 0:
            pairs = [set(map(frozenset, ids.reshape(-1, 2).tolist())) for ids in planned.ids.reshape(repeats, -1)]
            assert not pairs[0] & pairs[1]  # mixup finds other partners for the next copy


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
def test_a_window_reads_few_shards_at_a_time_and_tells_which(window):
    random = np.random.default_rng(window)
    lengths = tuple(random.integers(0, 30, 20).tolist())
    order = WindowedOrder(4, lengths, window)
    shard_of = np.repeat(np.arange(20), lengths)
    positions = np.arange(3 * order.num_samples)
    shards = shard_of[order.at(positions).ids]
    for position, shard in zip(positions.tolist(), shards.tolist(), strict=True):
        ahead = order.window_shards(position)
        assert shard in ahead[:window] and len(ahead) <= 2 * window
    repeated = RepeatedOrder(order, 12, 3)
    assert repeated.window_shards(120) == order.window_shards(40)
    for epoch in range(3):  # the windows of an epoch hold its shards once each
        inside = shards[epoch * order.num_samples :][: order.num_samples]
        spans = [np.flatnonzero(inside == shard) for shard in np.unique(inside)]
        assert max(span[-1] - span[0] for span in spans) <= window * max(lengths)
    assert NaturalOrder(4, 10).window_shards(0) == BalancedOrder(4, shard_of).window_shards(0) == []


def test_a_mixture_tells_the_shards_of_all_its_sources():
    indexes = [index_of(np.zeros(8 * size, dtype=np.int64), [8] * size) for size in (10, 20)]
    order = build_order(DataConfig(weights=(1, 2), shuffle_window=2), 0, 64, indexes)
    for position in (0, 123, 9_999, 123_456):
        shard = int(order.at([position]).ids[0]) // 8
        ahead = order.window_shards(position)
        assert shard in ahead and sum(number < 10 for number in ahead) == 4 == sum(number >= 10 for number in ahead)


def test_a_window_needs_an_index_in_the_order_of_its_shards():
    index = index_of(np.zeros(4, dtype=np.int64), [2, 2])
    index.shard[:] = [0, 1, 0, 1]
    with pytest.raises(DataError, match="not in their order"):
        build_order(DataConfig(shuffle_window=1), 0, 4, [index])


def test_a_replacement_keeps_the_character_of_the_order():
    indexes = [index_of(np.arange(30) % 3, [10, 0, 20]), index_of(np.arange(40) % 4, [20, 20])]
    assert NaturalOrder(0, 30).kin(7) == range(30)
    assert build_order(DataConfig(shuffle_window=2), 0, 8, indexes).kin(35) == range(30, 50)
    assert build_order(DataConfig(sampling="balanced"), 0, 8, indexes).kin(5) == [*range(2, 30, 3), *range(32, 70, 4)]
    assert build_order(DataConfig(sampling="balanced", weights=(1, 1), repeats=2), 0, 8, indexes).kin(32) == [
        *range(32, 70, 4)
    ]
    assert build_order(DataConfig(weights=(1, 1)), 0, 8, indexes).kin(32) == list(range(30, 70))


def test_starting_late_in_fourteen_million_samples_touches_nothing_before():
    labels = np.random.default_rng(0).integers(0, 21_843, 14_000_000)
    for order in (
        NaturalOrder(0, 14_000_000),
        BalancedOrder(0, labels),
        WindowedOrder(0, (1000,) * 14_000, 16),
        RepeatedOrder(NaturalOrder(0, 14_000_000), 4096, 4),
    ):
        tracemalloc.start()
        ids = order.at(np.arange(10**13, 10**13 + 64)).ids
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 4 * 2**20  # a pass over the samples before would take a hundred
        assert len(np.unique(ids)) == 64


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"shuffle_window": 2}, [5, 9, 11, 13, 8, 3, 2, 1]),
        ({"sampling": "balanced"}, [47, 49, 28, 38, 20, 63, 27, 44]),
        ({"weights": (0.7, 0.3)}, [63, 27, 69, 0, 68, 26, 20, 36]),
        ({"repeats": 2}, [9, 42, 45, 9, 10, 25, 49, 30]),
    ],
)
def test_the_other_orders_are_frozen_too(data, expected):
    indexes = [index_of(np.arange(30) % 3, [10, 5, 15]), index_of(np.arange(40) % 4, [20, 20])]
    order = build_order(DataConfig(**data), 42, 8, indexes)
    assert order.at(range(100_003, 100_011)).ids.tolist() == expected
