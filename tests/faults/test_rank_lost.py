"""A rank is killed or stopped anywhere in a real run: the others end at once, name it, and the same command goes on."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from counts import counted
from forked_ranks import ForkedRanks
from run_directory import config_file, metrics, train_command

pytestmark = pytest.mark.ranks

STEPS = 120
LIMIT_S = 120  # only catches a run that never ends; whether it was in time is recorded
IN_TIME_S = {"SIGKILL": 5, "SIGSTOP": 10}
HOW = {"SIGKILL": "died, last seen in", "SIGSTOP": "no answer for 5 s from"}
# What makes a phase take most of a step, so that a signal at any time most likely falls into it.
PHASES = {
    "training": {},
    "save": {"save_every": 1},
    "evaluate": {"eval_every": 1, "eval_batch_size": 8, "workers": 0},
    "data": {"workers": 0, "data": {"randaugment_layers": 4}},
}


@pytest.fixture(scope="module")
def ranks(request):
    with ForkedRanks(request.param) as ranks:
        yield ranks


def has_ended(pid: int) -> bool:
    """Whether a process waits to be waited for."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition, timeout_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def time_to_the_end_of_the_others(pids: list[int], victim: int | None) -> float:
    began = time.monotonic()
    wait_until(lambda: all(has_ended(pid) for rank, pid in enumerate(pids) if rank != victim))
    return time.monotonic() - began


def assert_goes_on(ranks: ForkedRanks, command: list[str], said: Path, run_dir: Path) -> None:
    ranks.run([*command, "--set", "eval_every=1000"], said)
    assert "resumed at step " in said.read_text()
    steps = [line["step"] for line in metrics(run_dir) if line["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))


CASES = [pytest.param(2, 1, "SIGKILL", "training"), pytest.param(2, 0, "SIGSTOP", "training")]
CASES += [
    pytest.param(world_size, victim, name, phase, marks=pytest.mark.slow)
    for world_size in (2, 3)
    for phase in PHASES
    for victim in range(world_size)
    for name in HOW
]


@pytest.mark.parametrize(("ranks", "victim", "name", "phase"), CASES, indirect=["ranks"])
def test_a_lost_rank_is_named_and_the_same_command_goes_on(digits, tmp_path, ranks, victim, name, phase):
    # Silence is told after 5 s with this too, and a disk that takes some seconds for a write is no hang.
    settings = {"num_steps": STEPS, "save_every": 10, "hang_timeout_s": 10} | PHASES[phase]
    batch = {"train_batch_size": 4 * ranks.world_size, "gradient_accumulation_steps": 1}
    command = train_command(config_file(tmp_path, 2, **batch, vitds=settings), digits, tmp_path, "run")
    log, said = tmp_path / "run/metrics.jsonl", tmp_path / "said.txt"

    fault = f"{name} of one of {ranks.world_size} ranks, most of the time in {phase}"
    with counted(fault, f"the others end within {IN_TIME_S[name]} s, and the same command goes on") as result:
        ranks.start(command, said)
        pids = list(ranks.pids)
        wait_until(lambda: log.exists() and log.read_text().count("\n") >= 15, timeout_s=300)
        os.kill(pids[victim], getattr(signal, name))
        result.within_s = time_to_the_end_of_the_others(pids, victim)
        result.in_time = result.within_s < IN_TIME_S[name]
        os.kill(pids[victim], signal.SIGKILL)
        codes = ranks.wait()
        del codes[victim]
        words, others = said.read_text(), ranks.world_size - 1
        assert codes == [7] * others, words
        named = re.findall(rf"(?:rank {victim} )?{HOW[name]}(?: rank {victim}, last seen in)? (\w+)", words)
        assert len(named) == others and words.count("stacks of rank ") == others, words
        for pid in pids:  # data workers, which are in the process group of their rank
            wait_until(lambda pid=pid: subprocess.run(["pgrep", "-g", str(pid)], capture_output=True).returncode == 1)
        assert_goes_on(ranks, command, said, tmp_path / "run")


# By phase, the step in which the main thread of a rank hangs; its watchdog lives on and says so.
HANGS = {"data": 20, "forward": 20, "backward": 20, "update": 20, "log": 20, "evaluate": 20}
HANG_CASES = [pytest.param(2, 1, "update", 5)]
HANG_CASES += [pytest.param(2, number % 2, phase, 5, marks=pytest.mark.slow) for number, phase in enumerate(HANGS)]
HANG_CASES += [pytest.param(3, 2, "backward", 60, marks=pytest.mark.slow)]  # the default


@pytest.mark.parametrize(("ranks", "victim", "phase", "timeout_s"), HANG_CASES, indirect=["ranks"])
def test_a_hanging_rank_is_named_with_its_line_and_the_same_command_goes_on(
    digits, tmp_path, ranks, victim, phase, timeout_s
):
    settings = {"num_steps": STEPS, "save_every": 10, "eval_every": 10, "hang_timeout_s": timeout_s}
    batch = {"train_batch_size": 4 * ranks.world_size, "gradient_accumulation_steps": 1}
    command = train_command(config_file(tmp_path, 2, **batch, vitds=settings), digits, tmp_path, "run")
    said = tmp_path / "said.txt"
    with counted("the main thread of a rank hangs", f"hang_timeout_s={timeout_s}: all end within it") as result:
        ranks.start(["tests/workers/hanging_rank.py", str(victim), phase, str(HANGS[phase]), *command], said)
        wait_until(lambda: said.exists() and "HANGS" in said.read_text(), timeout_s=300)
        pids = list(ranks.pids)
        result.within_s = time_to_the_end_of_the_others(pids, None)
        result.in_time = result.within_s <= timeout_s
        words = said.read_text()
        assert set(ranks.wait()) == {7}, words
        assert f"rank {victim} hangs in {phase} at step {HANGS[phase]} (" in words, words
        assert "hanging_rank.py" in words and words.count("stacks of rank ") == ranks.world_size, words
        assert_goes_on(ranks, command, said, tmp_path / "run")
