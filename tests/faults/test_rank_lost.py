"""A rank is killed or stopped anywhere in a real run: the others end at once, name it, and the same command goes on."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from counts import record
from forked_ranks import ForkedRanks
from run_directory import config_file, metrics, train_command

pytestmark = pytest.mark.ranks

STEPS = 120
LIMIT_S = 120  # only catches a run that never ends; what was measured, at best under 5 s for a death, is recorded
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
    settings = {"num_steps": STEPS, "save_every": 10, "hang_timeout_s": 5} | PHASES[phase]
    batch = {"train_batch_size": 4 * ranks.world_size, "gradient_accumulation_steps": 1}
    command = train_command(config_file(tmp_path, 2, **batch, vitds=settings), digits, tmp_path, "run")
    log, said = tmp_path / "run/metrics.jsonl", tmp_path / "said.txt"

    ranks.start(command, said)
    pids = list(ranks.pids)
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 15, timeout_s=300)
    os.kill(pids[victim], getattr(signal, name))
    began = time.monotonic()
    wait_until(lambda: all(has_ended(pid) for pid in pids if pid != pids[victim]))
    lasted_s = time.monotonic() - began
    os.kill(pids[victim], signal.SIGKILL)
    codes = ranks.wait()
    del codes[victim]
    words, others = said.read_text(), ranks.world_size - 1
    assert codes == [7] * others, words
    named = re.findall(rf"(?:rank {victim} )?{HOW[name]}(?: rank {victim}, last seen in)? (\w+)", words)
    assert len(named) == others and words.count("stacks of rank ") == others, words
    seen_in = f"{name} of one of {ranks.world_size} ranks, most of the time in {phase}"
    print(f"{seen_in}: rank {victim} in {named[0]}, the others ended after {lasted_s:.1f} s")
    for pid in pids:  # data workers, which are in the process group of their rank
        wait_until(lambda pid=pid: subprocess.run(["pgrep", "-g", str(pid)], capture_output=True).returncode == 1)

    ranks.run([*command, "--set", "eval_every=1000"], said)
    assert "resumed at step " in said.read_text()
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    record(seen_in, "a signal to it", 1, 1, f"the others ended after {lasted_s:.1f} s")
