"""A rank is killed or stopped anywhere in a real run: the others end at once, name it, and the same command goes on."""

import re
import signal
import subprocess
import time

import pytest
from rank_processes import run_ranks, start_ranks
from run_directory import config_file, metrics, train_command

pytestmark = pytest.mark.ranks

STEPS = 120
LIMIT_S = {"SIGKILL": 30, "SIGSTOP": 120}  # only catch a run that never ends; what was measured is printed
# What makes a phase take most of a step, so that a signal at any time most likely falls into it.
PHASES = {
    "training": {},
    "save": {"save_every": 1},
    "evaluate": {"eval_every": 1, "eval_batch_size": 8, "workers": 0},
    "data": {"workers": 0, "data": {"randaugment_layers": 4}},
}


def processes_of(run: str) -> list[str]:
    """Processes, data workers included, whose command names a run's directory."""
    return subprocess.run(["pgrep", "-f", re.escape(run)], capture_output=True, text=True).stdout.split()


def lose(command, run_dir, world_size, victim, name, num_lines):
    """Send a signal to one rank as soon as the log has so many lines; what the others said, and after how long."""
    processes = start_ranks(command, world_size)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        deadline = time.monotonic() + 300
        path = run_dir / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < num_lines:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.005)
        processes[victim].send_signal(getattr(signal, name))
        began = time.monotonic()
        outputs = [process.communicate(timeout=LIMIT_S[name])[0] for process in others]
        lasted_s = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
        processes[victim].communicate()
    assert [process.returncode for process in others] == [7] * len(others), outputs
    return outputs, lasted_s


CASES = [pytest.param(2, 1, "SIGKILL", "training"), pytest.param(2, 0, "SIGSTOP", "training")]
CASES += [
    pytest.param(world_size, victim, name, phase, marks=pytest.mark.slow)
    for phase in PHASES
    for world_size in (2, 3)
    for victim in range(world_size)
    for name in LIMIT_S
]


@pytest.mark.parametrize(("world_size", "victim", "name", "phase"), CASES)
def test_a_lost_rank_is_named_and_the_same_command_goes_on(digits, tmp_path, world_size, victim, name, phase):
    settings = {"num_steps": STEPS, "save_every": 10, "hang_timeout_s": 5} | PHASES[phase]
    batch = {"train_batch_size": 4 * world_size, "gradient_accumulation_steps": 1}
    command = train_command(config_file(tmp_path, 2, **batch, vitds=settings), digits, tmp_path, "run")
    outputs, lasted_s = lose(command, tmp_path / "run", world_size, victim, name, num_lines=15)

    lost = f"rank {victim} died, last seen in" if name == "SIGKILL" else f"no answer for 5 s from rank {victim}, last"
    for output in outputs:
        assert lost in output and "stacks of rank" in output and "in main" in output, output
    seen_in = re.search(r"last seen in (\w+)", outputs[0])[1]
    print(f"{name} of rank {victim} of {world_size} in {seen_in}: the others ended after {lasted_s:.1f} s")
    deadline = time.monotonic() + 30
    while (left := processes_of(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []

    assert "resumed at step " in run_ranks([*command, "--set", "eval_every=1000"], world_size)[0]
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))
