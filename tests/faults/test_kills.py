"""SIGKILL of all ranks at random instants: the same command goes on, and ends as the run that nobody killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from counts import record
from forked_ranks import ForkedRanks
from rank_processes import ROOT, free_port
from run_directory import config_file, train_command
from run_state import check_store, fingerprint

pytestmark = pytest.mark.ranks

NUM_STEPS = 20
CASES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
BIN = Path(sys.prefix) / "bin"


class LaunchedRanks:
    """The same command under `deepspeed`; killed are the command, its launch.py, the ranks and their workers."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self, command, output):
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu"}
        launcher = [BIN / "deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port())]
        with open(output, "a") as stream:
            self._process = subprocess.Popen(
                [*launcher, *command],
                cwd=ROOT,
                env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self):
        """SIGKILL the whole process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return [self._process.wait()]

    def run(self, command, output, timeout_s=300):
        self.start(command, output)
        assert self._process.wait(timeout_s) == 0, output.read_text()[-6000:]


class Killer:
    """Kills one command again and again, at instants drawn from a fixed seed."""

    def __init__(self, ranks, command, run_dir, num_steps, seed):
        self.ranks, self.command, self.run_dir, self.num_steps = ranks, command, run_dir, num_steps
        self.output = run_dir.with_suffix(".txt")
        self.random = random.Random(str(seed))
        self.places = Counter()

    def kill_at(self, share):
        """Start the command and SIGKILL it: one time in four while it starts, else around `share` of its steps.

        Counts where the kill fell; one that came after the end counts for nothing.
        """
        before, began = self._metrics_file(), time.time()
        self.ranks.start(self.command, self.output)
        started = time.monotonic()
        if self.random.random() < 0.25:
            time.sleep(self.random.uniform(0, 4))
        else:
            while self._metrics_file() == before or self._num_lines() < share * self.num_steps:
                assert time.monotonic() < started + 200, self.output.read_text()[-6000:]
                time.sleep(0.005)
            time.sleep(self.random.uniform(0, 0.2))
        has_started = self._metrics_file() != before
        codes = self.ranks.kill()
        assert set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}:\n{self.output.read_text()[-6000:]}"
        if check_store(self.run_dir) == self.num_steps and set(codes) == {0}:
            return
        writing = (self.run_dir / "checkpoints").glob(".writing-*")
        in_save = any(path.stat().st_mtime >= began for path in writing)  # not left by an earlier kill
        self.places["start" if not has_started else "save" if in_save else "step"] += 1

    def kill_and_finish(self, num_kills):
        """Kill the command so many times as the run goes on, then run it to its end; how many kills it met."""
        for share in sorted(self.random.uniform(0, 0.95) for _ in range(num_kills)):
            if check_store(self.run_dir) < self.num_steps:
                self.kill_at(share)
        if check_store(self.run_dir) < self.num_steps:  # else the last kill came after the last save
            self.ranks.run(self.command, self.output)
        return self.places.total()

    def _metrics_file(self):
        with suppress(FileNotFoundError):
            return (self.run_dir / "metrics.jsonl").stat().st_ino
        return None

    def _num_lines(self):
        return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")


def config_of(directory, stage, precision, background, num_steps=NUM_STEPS, save_every=2):
    changes = {"num_steps": num_steps, "save_every": save_every, "save_in_background": background}
    return config_file(directory, stage, bf16={"enabled": precision == "bf16"}, vitds=changes)


@pytest.fixture(scope="module")
def two_ranks():
    with ForkedRanks(2) as ranks:
        yield ranks


def compare_all(ranks, two_ranks, digits, directory, case, background, num_kills, how, at_once=5):
    """Kill runs of one configuration so many times, `at_once` times each, and compare how they end."""
    config = config_of(directory, *case, background)
    two_ranks.run(train_command(config, digits, directory, "unkilled"), directory / "unkilled.txt")
    reference = fingerprint(directory / "unkilled", NUM_STEPS)
    places, survived = Counter(), 0
    while places.total() < num_kills:  # a kill that came after the end of its run counts for nothing
        number = len(list(directory.glob("killed-*.txt")))
        run_dir = directory / f"killed-{number}"
        command = train_command(config, digits, directory, run_dir.name)
        killer = Killer(ranks, command, run_dir, NUM_STEPS, (*case, background, number))
        met = killer.kill_and_finish(min(at_once, num_kills - places.total()))
        survived += met * (fingerprint(run_dir, NUM_STEPS) == reference)
        places += killer.places
    record("SIGKILL of all ranks at a random instant", how, survived, places.total())
    for place in ("start", "step", "save"):
        record(f"of these, in a {place}", how, places[place], places.total())
    assert survived == places.total() == num_kills, places


@pytest.mark.parametrize(("case", "background"), [((2, "fp32"), True), ((3, "bf16"), False)])
def test_killed_anywhere(two_ranks, digits, tmp_path, case, background):
    compare_all(two_ranks, two_ranks, digits, tmp_path, case, background, 2, "")


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_often(two_ranks, digits, tmp_path, case, background):
    """13 kills of each configuration, in three runs or more: 182."""
    how = f"ranks started directly; {'background' if background else 'waiting'} saves"
    compare_all(two_ranks, two_ranks, digits, tmp_path, case, background, 13, how)


@pytest.mark.slow
@pytest.mark.parametrize("case", [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_killed_under_the_launcher(two_ranks, digits, tmp_path, case):
    """Six kills of each configuration in a run: 24."""
    with LaunchedRanks() as launched:
        how = "the `deepspeed` command and all below it"
        compare_all(launched, two_ranks, digits, tmp_path, case, True, 6, how, at_once=6)


@pytest.mark.slow
def test_a_run_killed_100_times_sees_each_sample_as_often(digits, tmp_path):
    """What the training loop was given is written down by every rank in every life; no sample is lost or repeated."""
    num_steps, num_kills = 3000, 100  # on a busy machine a life of 0.2 s may be 30 steps
    config = config_of(tmp_path, 2, "fp32", True, num_steps, save_every=10)
    commands = {name: train_command(config, digits, tmp_path, name) for name in ("unkilled", "killed")}
    for command in commands.values():
        command[0] = "tests/workers/recording_ranks.py"
    with ForkedRanks(2, RECORDS=str(tmp_path)) as ranks:
        ranks.run(commands["unkilled"], tmp_path / "unkilled.txt")
        killer = Killer(ranks, commands["killed"], tmp_path / "killed", num_steps, "100")
        met = killer.kill_and_finish(num_kills)
    seen, expected = ids_by_micro_batch(tmp_path, "killed"), ids_by_micro_batch(tmp_path, "unkilled")
    times = Counter(sample for ids in seen.values() for sample in ids)
    equal = (
        fingerprint(tmp_path / "killed", num_steps) == fingerprint(tmp_path / "unkilled", num_steps)
        and seen == expected
        and times.total() == num_steps * 16
        and len(times) == 1437
        and max(times.values()) - min(times.values()) <= 1
    )
    detail = f"{times.total():,} samples: 0 lost, 0 repeated" if equal else "differs"
    record(
        "one run killed 100 times", "as above, ZeRO stage 2 in fp32, each sample written down", met * equal, met, detail
    )
    assert equal and met == num_kills, killer.places


def ids_by_micro_batch(directory, run):
    """(step, micro-batch) -> sample ids; a micro-batch that came again after a kill must have held the same."""
    seen = {}
    for rank in range(2):
        for text in (directory / f"{run}.2.{rank}.jsonl").read_text().splitlines():
            line = json.loads(text)
            assert seen.setdefault((line["step"], line["index"]), line["ids"]) == line["ids"]
    return seen
