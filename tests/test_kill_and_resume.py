"""A run of 20 steps equals 10 steps, SIGKILL of every rank, and 10 more: losses and weights, bit for bit."""

import signal
import time

import pytest
from rank_processes import run_ranks, start_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

# Stage 3 is last, for it patches torch in warm ranks; stage 0 does not do bf16.
CASES = [(1, stage, "fp32") for stage in (0, 1, 2, 3)]
CASES += [(2, 0, "fp32"), *((2, stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]


def kill_after_first_save(command, world_size, run_dir, timeout_s=300):
    """SIGKILL every rank as soon as the checkpoint of step 10 is committed."""
    processes = start_ranks(command, world_size)
    deadline = time.monotonic() + timeout_s
    try:
        while not (run_dir / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, "no checkpoint in time"
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
            time.sleep(0.002)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate()


@pytest.fixture(scope="module")
def ranks(request):
    """Ranks that stay warm, for the unbroken runs."""
    with WarmRanks(request.param) as ranks:
        yield ranks


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, stage, precision", CASES, indirect=["ranks"])
def test_killed_and_resumed_equals_unbroken(digits, tmp_path, ranks, stage, precision):
    world_size = len(ranks.processes)
    config = config_file(tmp_path, stage, bf16={"enabled": precision == "bf16"})
    ranks.run(train_command(config, digits, tmp_path, "unbroken"))
    killed = train_command(config, digits, tmp_path, "killed")
    kill_after_first_save(killed, world_size, tmp_path / "killed")
    assert not (tmp_path / "killed/checkpoints/global_step20").exists(), "the kill came too late to show anything"

    output = run_ranks(killed, world_size)[0]

    assert "resumed at step 10 of 20" in output
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "unbroken")
    assert [line["step"] for line in metrics(tmp_path / "killed") if line["split"] == "train"] == list(range(1, 21))
    assert_same_weights(weights(tmp_path / "killed", 20), weights(tmp_path / "unbroken", 20))
