"""A run of 20 steps equals 10 steps, SIGKILL of every rank, and 10 more: losses and weights, bit for bit.

Kills at random instants, inside a save and by the hundred are in tests/faults/.
"""

import shutil
import time

import pytest
from forked_ranks import ForkedRanks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights

# Stage 0 does not do bf16.
CASES = [(1, stage, "fp32") for stage in (0, 1, 2, 3)]
CASES += [(2, 0, "fp32"), *((2, stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
KEPT = {"layer_decay": 0.75, "ema_decay": 0.9, "eval_every": 10}  # of the runs on two ranks


def kill_after_first_save(ranks, command, run_dir, output, timeout_s=300):
    """SIGKILL every rank as soon as the checkpoint of step 10 is committed.

    On a busy machine the ranks may be at their end before this process looks again: then they start once more.
    """
    for _ in range(5):
        shutil.rmtree(run_dir, ignore_errors=True)
        deadline = time.monotonic() + timeout_s
        ranks.start(command, output)
        while not (run_dir / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, output.read_text()[-3000:]
            time.sleep(0.002)
        ranks.kill()
        if not (run_dir / "checkpoints/global_step20").exists():
            return


@pytest.fixture(scope="module")
def ranks(request):
    with ForkedRanks(request.param) as ranks:
        yield ranks


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, stage, precision", CASES, indirect=["ranks"])
def test_killed_and_resumed_equals_unbroken(digits, tmp_path, ranks, stage, precision):
    has_average = ranks.world_size > 1
    config = config_file(tmp_path, stage, bf16={"enabled": precision == "bf16"}, vitds=KEPT if has_average else {})
    ranks.run(train_command(config, digits, tmp_path, "unbroken"), tmp_path / "unbroken.txt")
    killed, output = train_command(config, digits, tmp_path, "killed"), tmp_path / "killed.txt"
    kill_after_first_save(ranks, killed, tmp_path / "killed", output)
    assert not (tmp_path / "killed/checkpoints/global_step20").exists(), "the kill came too late to show anything"

    ranks.run(killed, output)

    assert "resumed at step 10 of 20" in output.read_text()
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "unbroken")
    assert [line["step"] for line in metrics(tmp_path / "killed") if line["split"] == "train"] == list(range(1, 21))
    for state in ("master", "exp_avg_sq", *(["ema"] if has_average else [])):
        assert_same_weights(weights(tmp_path / "killed", 20, state), weights(tmp_path / "unbroken", 20, state))
    if has_average:
        last = metrics(tmp_path / "killed")[-1]
        assert last["ema_loss"] != last["loss"] and {"ema_top1", "ema_top5"} <= last.keys()
