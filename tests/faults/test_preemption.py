"""Real runs under `deepspeed` and launch/train.sh get signals or lose their launcher: all save, and nobody is left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from counts import counted
from data_sets import write_pixels
from rank_processes import ROOT, free_port
from run_directory import config_file, metrics, train_command

from vitds.process_tree import command_line, environment

pytestmark = pytest.mark.ranks

BIN = Path(sys.prefix) / "bin"
LIMIT_S = 240  # catches a hang


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    work = write_pixels(tmp_path_factory.mktemp("preemption") / "data").parent
    config_file(work, 1, vitds={"num_steps": 1_000_000, "save_every": 1_000_000, "workers": 1, "eval_every": None})
    return work


class Run:
    """A run of two ranks in a session of its own, so that each of its processes can be found."""

    def __init__(self, work: Path, name: str, starter: str, **environment: str) -> None:
        self.run_dir = work / name
        self._output = work / f"{name}.txt"
        ours = [work / "stage1.json", work / "data", work, name]
        command = {
            "deepspeed": [
                BIN / "deepspeed",
                "-q",
                "--master_port",
                free_port(),
                "--num_gpus",
                2,
                *train_command(*ours),
            ],
            "train.sh": ["bash", ROOT / "launch/train.sh", "--output-dir", work],
        }[starter]
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        clean |= {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
        clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "GPUS": "0,1", "NAME": name}
        clean |= {"DATASET": str(work / "data"), "CONFIG": str(work / "stage1.json")}
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT, env=clean | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    def alive(self) -> list[int]:
        """Processes of the session that are no zombies."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return sorted(found)

    def named(self, target: str) -> int:
        """The process that a signal is meant for; a negative number is a whole group."""
        if target in ("started", "group"):
            return self.process.pid if target == "started" else -self.process.pid
        words = {pid: command_line(pid) for pid in self.alive()}
        if target == "deepspeed":
            return next(pid for pid, line in words.items() if str(BIN / "deepspeed") in line[:2])
        if target == "launch.py":
            return next(pid for pid, line in words.items() if "deepspeed.launcher.launch" in line)
        rank = target.removeprefix("rank ")
        return next(pid for pid in words if environment(pid).get("LOCAL_RANK") == rank)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output[-3000:]
            time.sleep(0.02)

    def train_to(self, step: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and f'"step": {step},' in path.read_text())

    def signal(self, target: str, name: str) -> None:
        pid = self.named(target)
        (os.killpg if pid < 0 else os.kill)(abs(pid), getattr(signal, f"SIG{name}"))

    def pester(self, target: str, name: str) -> None:
        """The same signal again and again, all through the save, until nobody is left to hear it."""
        deadline = time.monotonic() + LIMIT_S
        with suppress(StopIteration, ProcessLookupError):
            while time.monotonic() < deadline:
                self.signal(target, name)
                time.sleep(0.01)

    def end(self) -> int:
        """Wait until the session is empty, and give the exit code of what was started."""
        try:
            code = self.process.wait(LIMIT_S)
            deadline = time.monotonic() + LIMIT_S
            while self.alive():
                assert time.monotonic() < deadline, [command_line(pid) for pid in self.alive()]
                time.sleep(0.05)
            return code
        finally:
            for pid in self.alive():
                os.kill(pid, signal.SIGKILL)

    def verdict(self) -> dict:
        return json.loads((self.run_dir / "exit.json").read_text())

    def assert_stopped_and_saved(self, code: int, num_lost: int = 0) -> None:
        step = metrics(self.run_dir)[-1]["step"]
        assert (self.verdict()["exit_code"], self.verdict()["step"]) == (code, step), self.output[-3000:]
        saved = [path.name for path in (self.run_dir / "checkpoints").glob("global_step*")]
        assert saved == [f"global_step{step}"], self.output[-3000:]
        assert f"stopped at step {step}, checkpoint saved" in self.output
        assert self.output.count("rank lost") == num_lost


SHORT = [("train.sh", "started", "TERM"), ("deepspeed", "started", "USR1"), ("deepspeed", "launch.py", "KILL")]
FULL = [("deepspeed", target, name) for target in ("started", "launch.py") for name in ("TERM", "USR1", "INT", "KILL")]
FULL += [("deepspeed", "rank 1", name) for name in ("TERM", "USR1", "INT")]
FULL += [("train.sh", "started", name) for name in ("TERM", "USR1", "INT")]
FULL += [("train.sh", target, name) for target in ("deepspeed", "launch.py") for name in ("TERM", "KILL")]
FULL += [(starter, "group", name) for starter in ("deepspeed", "train.sh") for name in ("INT", "TERM")]
CASES = SHORT + [pytest.param(*case, marks=pytest.mark.slow) for case in FULL if case not in SHORT]


@pytest.mark.parametrize(("starter", "target", "name"), CASES)
@counted("preemption of two ranks", "a signal to train.sh, `deepspeed`, launch.py, one rank or all processes")
def test_all_ranks_stop_at_one_step_and_save_and_no_process_is_left(work, starter, target, name):
    run = Run(work, f"{starter}-{target}-{name}".replace(" ", "-"), starter)
    try:
        run.train_to(3)
        groups = {os.getpgid(run.named(f"rank {rank}")) for rank in (0, 1)}
        assert groups == {run.process.pid}, "the ranks left their process group"
        run.signal(target, name)
        if name != "KILL" and target in ("started", "rank 1"):
            run.pester("rank 0", name)
    finally:
        code = run.end()
    # launch.py passes SIGINT on as SIGTERM, and so does the death of the `deepspeed` command.
    passed_on = (target == "started" and starter == "train.sh") or target in ("rank 1", "group")
    expected = 130 if name == "INT" and passed_on else 75
    if (starter, target, name) == ("deepspeed", "started", "INT"):
        expected = run.verdict()["exit_code"]  # 130 when the second signal came in time
    run.assert_stopped_and_saved(expected)
    if starter == "train.sh" or target == "rank 1":
        assert code == expected, run.output[-3000:]
    if starter == "train.sh":
        assert "Traceback" not in run.output, run.output[-3000:]


@pytest.mark.parametrize("delay_s", [0.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 4, 6, 8, 10))])
@pytest.mark.parametrize("starter", ["train.sh", pytest.param("deepspeed", marks=pytest.mark.slow)])
@counted("preemption of two ranks", "SIGTERM 0 to 10 s after the start, before or in training")
def test_a_signal_before_training_ends_cleanly(work, starter, delay_s):
    """Counted from the moment at which rank 1 is there; a run that has begun by then saves."""
    run = Run(work, f"early-{starter}-{delay_s}", starter)
    try:
        run.wait_for(lambda: any(environment(pid).get("LOCAL_RANK") == "1" for pid in run.alive()))
        time.sleep(delay_s)
        run.signal("started", "TERM")
    finally:
        code = run.end()
    assert "Traceback" not in run.output, run.output[-3000:]
    assert not list(run.run_dir.glob("checkpoints/.writing*"))
    if starter == "train.sh":
        assert code == 75 and "stopped " in run.output, run.output[-3000:]
    if "stopped at step" in run.output:
        run.assert_stopped_and_saved(75)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank 0", "rank 1"])
@counted("a rank dies under train.sh with RESTARTS=2", "SIGKILL of rank 0 or 1")
def test_a_lost_rank_is_restarted_from_the_last_checkpoint(work, target):
    run = Run(work, f"lost-{target}".replace(" ", "-"), "train.sh", RESTARTS="2")
    try:
        run.train_to(3)
        run.signal(target, "KILL")
        run.wait_for(lambda: "restart 1 of 2, from the last checkpoint" in run.output)
        run.wait_for(lambda: run.output.count("starts at step 0") == 2)
        run.train_to(3)
        run.signal("started", "TERM")
    finally:
        code = run.end()
    assert code == 75, run.output[-3000:]
    run.assert_stopped_and_saved(75, num_lost=1)
