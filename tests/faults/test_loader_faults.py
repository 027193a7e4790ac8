"""Data processes that are killed, stopped, slow or poisoned; a full /dev/shm; too few files: replaced, or named."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest
import torch
from counts import counted
from data_sets import write_pixels
from rank_processes import ROOT
from run_directory import config_file, metrics, train_command
from tar_shards import NUM_CLASSES, write_shards

from vitds.data import crop
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.order import build_order
from vitds.data.reader import ShardReader
from vitds.data.stream import StreamLoader, TarStream
from vitds.data.workers import PREFETCHED
from vitds.ds_config import Batch
from vitds.errors import DataUnavailable
from vitds.run_config import DataConfig
from vitds.world import World

SIZE = (8, 10)
BATCH = Batch(8, 4, 2, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("faults") / "out")


def train_loader(dataset, steps=9, workers=2, timeout_s=60.0):
    reader, data = ShardReader(dataset, "train"), DataConfig()
    order = build_order(data, 1, BATCH.global_batch, reader.indexes)
    place = (World(), 1, 0, steps, workers, "cpu", torch.float32)
    loader = TrainLoader(reader, order, data, SIZE, 5, BATCH, *place, hash_every=1)
    loader.worker_timeout_s, loader.lost = timeout_s, []
    loader.on_lost_worker = loader.lost.append
    return loader


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for ours, theirs in zip(batches, expected, strict=True):
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("images", "targets", "ids"))
        assert ours.pixel_hash == theirs.pixel_hash


earlier = set()


@pytest.fixture(autouse=True)
def only_processes_of_this_test():
    earlier.update(multiprocessing.active_children())


def data_processes():
    return [process for process in multiprocessing.active_children() if process not in earlier]


@pytest.mark.parametrize("num_kills", [6, pytest.param(100, marks=pytest.mark.slow)])
@counted("data processes die", "SIGKILL of 6 and 100 of them amid batches, or between")
def test_killed_processes_are_replaced_and_every_batch_comes_once_and_the_same(dataset, num_kills):
    random, steps = Random(num_kills), 4 * num_kills
    expected = list(train_loader(dataset, steps, workers=0))
    loader, batches = train_loader(dataset, steps, workers=3), []
    killed_at = set(random.sample(range(len(expected) - 3 * (PREFETCHED + 1)), num_kills))
    for place, micro_batch in enumerate(loader):
        batches.append(micro_batch)
        if place in killed_at:
            time.sleep(random.choice([0.0, 0.001, 0.01]))  # amid a batch, or with finished ones in the pipe
            os.kill(random.choice(data_processes()).pid, signal.SIGKILL)
    assert_same(batches, expected)
    assert 0 < len(loader.lost) <= num_kills, "one killed again before it was missed is replaced once"
    assert all("was killed by signal 9" in text for text in loader.lost)
    assert not data_processes()


@counted("data processes hang", "SIGSTOP of both")
def test_a_stopped_process_is_replaced_and_nothing_is_lost(dataset):
    loader, batches = train_loader(dataset, timeout_s=5.0), []  # a healthy one may take a second on a busy machine
    for place, micro_batch in enumerate(loader):
        batches.append(micro_batch)
        if place == 3:
            for process in data_processes():
                os.kill(process.pid, signal.SIGSTOP)
    assert_same(batches, list(train_loader(dataset, workers=0)))
    assert len(loader.lost) == 2
    assert all("gave no sign of life for 5 s" in text and "0000" in text for text in loader.lost)
    assert not data_processes()


def test_a_slow_process_is_waited_for_as_long_as_it_moves(dataset, monkeypatch):
    train_crop = crop.train_crop
    monkeypatch.setattr(crop, "train_crop", lambda *args: time.sleep(1.5) or train_crop(*args))
    loader = train_loader(dataset, steps=1, timeout_s=5.0)  # four samples take six
    assert len(list(loader)) == 2 and not loader.lost


@counted("data processes die", "a sample that kills its process each time is named")
def test_a_sample_that_kills_its_process_each_time_is_named(dataset, monkeypatch):
    loader = train_loader(dataset)
    fatal = list(train_loader(dataset, workers=0))[5].ids[1].item()
    read_whole = loader.dataset.read

    def read(sample_id):
        if sample_id == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_whole(sample_id)

    monkeypatch.setattr(loader.dataset, "read", read)
    with pytest.raises(DataUnavailable, match="data process 1 was killed by signal 9") as raised:
        list(loader)
    assert raised.value.where == " ".join(loader.dataset.where(fatal))
    assert "out of memory" in raised.value.fix and raised.value.on_one_rank and raised.value.exit_code == 3
    assert len(loader.lost) == 2, "it was tried three times"
    assert not data_processes()


@counted("data processes die", "SIGKILL of those of an evaluation")
def test_evaluation_replaces_its_processes_too(dataset, capfd):
    def loader(workers):
        return EvalLoader(
            ShardReader(dataset, "val"), DataConfig(), SIZE, 2, World(), workers, torch.device("cpu"), torch.float32
        )

    batches = []
    for place, micro_batch in enumerate(loader(2)):
        batches.append(micro_batch)
        if place == 0:
            for process in data_processes():
                os.kill(process.pid, signal.SIGKILL)
    assert_same(batches, list(loader(0)))
    assert "replaced" in capfd.readouterr().err


@counted("data processes die", "SIGKILL of that of a stream, which is named with its place")
def test_a_stream_cannot_go_on_without_its_process_and_says_where_it_was(tmp_path):
    stream = TarStream([str(tmp_path / "s-000.tar")], 40, NUM_CLASSES)
    write_shards(tmp_path, [40])
    loader = StreamLoader(
        stream, DataConfig(), SIZE, BATCH, World(), samples_seen=0, num_steps_end=50, workers=1, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    micro_batches = iter(loader)
    next(micro_batches)
    os.kill(data_processes()[0].pid, signal.SIGKILL)
    with pytest.raises(DataUnavailable, match="data process 0 was killed by signal 9") as raised:
        list(micro_batches)
    assert raised.value.where.startswith(str(tmp_path / "s-000.tar") + " i-")


def limited(shell, command):
    """Run a command with its machine's means cut short by a line of shell; in a mount namespace of its own."""
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{shell} && exec "$@"', "sh", sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


needs_namespaces = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs root, or the right to make a mount namespace",
)


@pytest.mark.ranks
@needs_namespaces
@counted("/dev/shm full", "tmpfs of 1 MiB, full")
def test_a_full_shared_memory_directory_does_not_matter(digits, tmp_path):
    """Where it is too small torch's data processes die of bus errors, or hang; batches of 1.5 MiB need none of it."""
    tiny = "custom:width=32,depth=1,heads=4,mlp=64,patch=32"
    keys = {"model": tiny, "image_size": 64, "num_steps": 5, "workers": 2, "eval_batch_size": 128}
    config = config_file(tmp_path, 0, train_batch_size=256, vitds=keys)
    fill = "mount -t tmpfs -o size=1m tmpfs /dev/shm && ! head -c 2m /dev/zero > /dev/shm/full"
    full = limited(fill, train_command(config, digits, tmp_path, "full"))
    assert full.returncode == 0, full.stdout + full.stderr
    assert [line["step"] for line in metrics(tmp_path / "full")] == [1, 2, 3, 4, 5, 5]


@pytest.mark.ranks
@counted("too many open files", "ulimit -n 60: said before step 0")
def test_too_few_files_are_said_before_step_0(digits, tmp_path):
    command = train_command(config_file(tmp_path, 0), digits, tmp_path, "run")
    shell = 'ulimit -n 60 && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "a process may open 60 files, and this one with 1 data processes needs" in done.stderr
    assert "ulimit -n 1024" in done.stderr and "Traceback" not in done.stderr
    assert "step 1/" not in done.stdout


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
    code = (
        "import resource as r; from vitds.data.workers import check_open_files\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); check_open_files(2)\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
