"""Runs from a URL equal runs from a disk, bit for bit, though the server stumbles and the run is killed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sets import write_pixels
from rank_processes import ROOT, run_ranks, start_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks
from web_server import Server, serving

from vitds.errors import DataError
from vitds.feed import train_loader
from vitds.preflight import plan_run

pytestmark = pytest.mark.ranks
WINDOW = ("--set", "data.shuffle_window=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("data") / "pixels", num_train=90)


@pytest.fixture
def server(dataset, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.root = dataset
    with serving(server) as server.address:
        yield server


def remote_flags(cache, dataset, num_shards):
    size = max(path.stat().st_size for path in dataset.glob("train/*.tar"))
    return [*WINDOW, "--set", f"data.cache_dir={cache}", "--set", f"data.cache_gib={num_shards * size / 2**30}"]


def processes():
    """Parent and state of every process by its id."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(status.parent.name)] = int(parent), state
    return found


def descendants(pid):
    """All processes that a process started, and those that these started."""
    parents = processes()
    found, new = set(), {pid}
    while new:
        new = {child for child, (parent, _) in parents.items() if parent in new} - found
        found |= new
    return found


def running(pids):
    """Those that are neither gone nor waiting to be buried."""
    return [pid for pid, (_, state) in processes().items() if pid in pids and state not in "ZX"]


def kill_after_first_save(command, world_size, run_dir, timeout_s=300):
    """SIGKILL every rank once a checkpoint is committed; gives the processes that they had started."""
    processes = start_ranks(command, world_size)
    deadline, started = time.monotonic() + timeout_s, set()
    try:
        while not (run_dir / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, "no checkpoint in time"
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
            time.sleep(0.002)
        for process in processes:  # it makes no step while its processes are looked for
            process.send_signal(signal.SIGSTOP)
        started = {child for process in processes for child in descendants(process.pid)}
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
    return started


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_and_its_evaluation_equal_those_from_a_disk(server, dataset, tmp_path, world_size):
    config = config_file(tmp_path, 1, vitds={"workers": 2, "num_steps": 40})
    remote = train_command(
        config, server.address, tmp_path, "remote", *remote_flags(tmp_path / "cache", dataset, num_shards=5)
    )
    server.drop_after, server.num_drops, server.is_reset = 3_000, 8, True
    started = kill_after_first_save(remote, world_size, tmp_path / "remote")
    assert not (tmp_path / "remote/checkpoints/global_step40").exists(), "the kill came too late to show anything"
    assert started and server.num_drops < 8, "no connection was reset"
    deadline = time.monotonic() + 60
    while running(started):  # workers and prefetching notice that their rank is gone
        assert time.monotonic() < deadline, running(started)
        time.sleep(0.05)
    server.num_drops, server.is_reset = 8, False  # and now closed, as if all had been said
    output = run_ranks(remote, world_size)[0]
    assert re.search(r"resumed at step \d0 of 40", output) and f"fetched to {tmp_path / 'cache'}" in output

    with WarmRanks(world_size) as ranks:
        ranks.run(train_command(config, dataset, tmp_path, "local", *WINDOW))
        for name, data in (("near", dataset), ("far", server.address)):
            command = ["launch/evaluate.py", "--weights", tmp_path / "local", "--data", data]
            ranks.run([*command, "--output", tmp_path / name, "--cache-dir", tmp_path / "cache"])
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    assert_same_weights(weights(tmp_path / "remote", 40), weights(tmp_path / "local", 40))
    near, far = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("near", "far"))
    assert near == far | {"data": str(dataset)}
    parquet = [(tmp_path / name / "predictions.parquet").read_bytes() for name in ("near", "far")]
    assert parquet[0] == parquet[1]


@pytest.mark.parametrize("problem", ["no server", "nothing there", "503"])
def test_a_server_that_has_no_data_is_said_before_torch_is_there(server, dataset, tmp_path, problem):
    address, said = {
        "no server": ("http://127.0.0.1:9/data", "Connection refused"),
        "nothing there": (f"{server.address}/elsewhere", "no dataset directory"),
        "503": (server.address, "503"),
    }[problem]
    server.status = 503 if problem == "503" else 200
    command = [sys.executable, *train_command(config_file(tmp_path, 1), address, tmp_path, "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and said in done.stderr and address in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_takes_windows_of_far_shards_and_a_cache_that_holds_them(server, dataset, tmp_path, monkeypatch):
    command = train_command(config_file(tmp_path, 1), server.address, tmp_path, "run")[1:]
    plan = plan_run(command, {})
    assert plan.run.data.shuffle_window == 16 and plan.resolved()["vitds"]["data"]["shuffle_window"] == 16
    assert plan_run([*command, "--data", str(dataset)], {}).run.data.shuffle_window == 0
    flags = remote_flags(tmp_path / "cache", dataset, num_shards=2)
    with pytest.raises(DataError, match="the cache is too small: 2 shards shuffled together") as caught:
        train_loader(plan_run([*command, *flags], {}), "cpu", 0)
    assert caught.value.exit_code == 3
