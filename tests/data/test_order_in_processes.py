"""Random runs in real rank processes with real workers: killed at any point, and started again on other ranks."""

import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import write_pixels

from vitds.data.loader import TrainLoader
from vitds.data.mixture import open_split
from vitds.data.order import build_order
from vitds.ds_config import Batch
from vitds.run_config import DataConfig
from vitds.world import World

SIZES = (13, 37, 5)  # samples of three data sets, in shards of 8
NUM_CASES = [pytest.param(number, marks=[] if number < 3 else pytest.mark.slow) for number in range(50)]
HANG_S = 300


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return [str(write_pixels(folder / str(size), num_train=size, num_val=1)) for size in SIZES]


@dataclass
class Run:
    """A run as it might be, but for its ranks and workers."""

    path: str
    data: DataConfig
    global_batch: int
    seed: int

    def expected(self, steps: range) -> dict[int, list[int]]:
        """The sample ids of each step, straight from the order."""
        order = build_order(self.data, self.seed, self.global_batch, open_split(self.path, "train").indexes)
        size = self.global_batch
        return {step: order.at(range(step * size, (step + 1) * size)).ids.tolist() for step in steps}


def random_run(random: np.random.Generator, directories: list[str]) -> Run:
    chosen = random.permutation(directories)[: random.integers(1, 4)].tolist()
    weights = tuple(random.uniform(0.1, 1, len(chosen))) if len(chosen) > 1 and random.random() < 0.7 else ()
    sampling, window = [("natural", 0), ("natural", int(random.integers(1, 4))), ("balanced", 0)][random.integers(3)]
    repeats = int(random.choice([1, 1, 2, 3]))
    data = DataConfig(sampling=sampling, shuffle_window=window, weights=weights, repeats=repeats)
    global_batch = repeats * int(random.choice([1, 2, 6, 12, 24]))
    return Run(",".join(chosen), data, global_batch, int(random.integers(2**40)))


def random_batch(random: np.random.Generator, global_batch: int) -> Batch:
    """Any number of ranks, 1 to 24, and any accumulation that give this global batch."""
    world_size = int(random.choice([size for size in range(1, 25) if global_batch % size == 0]))
    per_rank = global_batch // world_size
    accumulation = int(random.choice([number for number in range(1, 5) if per_rank % number == 0]))
    return Batch(global_batch, per_rank // accumulation, accumulation, world_size)


def be_a_rank(run: Run, batch: Batch, rank: int, steps: range, workers: int, record: Path) -> None:
    """Go through the steps as a training loop would, and write down every micro-batch."""
    dataset = open_split(run.path, "train")
    order = build_order(run.data, run.seed, run.global_batch, dataset.indexes)
    loader = TrainLoader(
        dataset, order, run.data, (4, 4), 5, batch, World(rank, rank, batch.world_size), run.seed,
        steps.start * run.global_batch, steps.stop, workers, "cpu", torch.float32,
    )  # fmt: skip
    with open(record, "a", buffering=1) as file:
        for number, micro_batch in enumerate(loader):
            step = steps.start + number // batch.accumulation_steps
            file.write(json.dumps([step, micro_batch.index, micro_batch.ids.tolist()]) + "\n")
    os._exit(0)  # not through the exit handlers of the tests


def start(run: Run, batch: Batch, steps: range, workers: int, folder: Path) -> list:
    fork = multiprocessing.get_context("fork").Process
    folder.mkdir()
    ranks = [
        fork(target=be_a_rank, args=(run, batch, rank, steps, workers, folder / f"{rank}.jsonl"))
        for rank in range(batch.world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def end(ranks: list, kill: bool) -> None:
    for rank in ranks:
        if kill:
            rank.kill()
        rank.join(HANG_S)
        assert rank.exitcode is not None, "hangs"
        assert kill or rank.exitcode == 0


def seen(folder: Path) -> dict[int, dict[int, list[int]]]:
    """The ids of each micro-batch by step and place, as far as they were written whole."""
    found: dict[int, dict[int, list[int]]] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, index, ids = json.loads(line)
                assert index not in found.setdefault(step, {})
                found[step][index] = ids
    return found


def check(run: Run, batch: Batch, folder: Path, first_step: int) -> int:
    """Every micro-batch that was seen is the one that was due; returns how many steps were seen whole, from the first.

    A rank does not run ahead of the others in a training loop. Here it may, which is only harder on the order.
    """
    found = seen(folder)
    expected = run.expected(range(first_step, max(found, default=first_step) + 1))
    for step, parts in found.items():
        for index, ids in parts.items():
            assert ids == expected[step][index * batch.micro_batch : (index + 1) * batch.micro_batch]
    num_parts = batch.world_size * batch.accumulation_steps
    whole = first_step
    while len(found.get(whole, {})) == num_parts:
        whole += 1
    return whole - first_step


@pytest.mark.ranks
@pytest.mark.parametrize("number", NUM_CASES)
def test_killed_anywhere_and_restarted_on_any_ranks_sees_the_same_global_batches(number, directories, tmp_path):
    random = np.random.default_rng(number)
    run = random_run(random, directories)
    batch, first_step = random_batch(random, run.global_batch), int(random.choice([0, 0, 10**6]))
    killed = start(run, batch, range(first_step, first_step + 10_000), int(random.integers(0, 3)), tmp_path / "killed")
    enough = int(random.integers(0, 5000))
    deadline = time.monotonic() + HANG_S
    while sum(path.stat().st_size for path in (tmp_path / "killed").iterdir()) < enough:
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in killed)
        time.sleep(0.01)
    end(killed, kill=True)
    num_whole = check(run, batch, tmp_path / "killed", first_step)

    again = first_step + int(random.integers(0, num_whole + 1))  # the last checkpoint, wherever it was
    other, num_steps = random_batch(random, run.global_batch), int(random.integers(1, 8))
    end(start(run, other, range(again, again + num_steps), int(random.integers(0, 3)), tmp_path / "again"), kill=False)
    assert check(run, other, tmp_path / "again", again) == num_steps
    assert min(seen(tmp_path / "again")) == again, "nothing is replayed"
