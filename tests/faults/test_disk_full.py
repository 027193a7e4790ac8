"""A disk that is full or read-only during a save: training goes on, what was committed stays, and the bill is named."""

import re
import subprocess
from pathlib import Path

import pytest
from counts import counted, record
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.checkpoint import committed_checkpoints
from vitds.manifest import damage, read_manifest

STEPS = {"num_steps": 6, "save_every": 2, "keep_last": 1, "workers": 0}
# The disk's size in checkpoints: from none that fits, through one but not two, to room for all.
LEVELS = [0.1 + 0.11 * number for number in range(20)]


def may_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "vitds-test", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="mounting a small file system is not allowed here")


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def reference(one_rank, digits, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    one_rank.run(train_command(config_file(directory, 1, vitds=STEPS), digits, directory, "run"))
    return directory / "run"


def seen_by(rank: WarmRanks, directory: Path) -> Path:
    return Path(f"/proc/{rank.processes[0].pid}/root{directory}")


def check_level(one_rank, reference, digits, tmp_path, level):
    """One run on a disk of so many checkpoints' size, and the same command again once there is room."""
    size_bytes = sum(path.stat().st_size for path in (reference / "checkpoints").rglob("*") if path.is_file())
    disk = tmp_path / "disk"
    command = train_command(config_file(tmp_path, 1, vitds=STEPS), digits, disk, "run")
    one_rank.start(["tests/workers/own_mount.py", disk, f"size={int(level * size_bytes)}", *command])
    answer = one_rank._answer(one_rank.processes[0], 300)
    output, run = answer["output"], seen_by(one_rank, disk) / "run"
    assert answer["exit_code"] in (0, 4), output
    failed = re.findall(
        r"could not be written: .*No space left on device\n.*needs about [\d,]+ bytes, [\d,]+ bytes are free",
        output,
    )
    assert bool(failed) == (answer["exit_code"] == 4), output
    assert metrics(run) == metrics(reference), output
    committed = committed_checkpoints(run / "checkpoints")
    for directory in committed:
        assert not damage(directory, read_manifest(directory))
    left = {path.name for path in (run / "checkpoints").iterdir()} - {directory.name for directory in committed}
    assert left <= {"latest", "best", "zero_to_fp32.py", "zero_to_torch.py"}, "temporary files are removed"
    if answer["exit_code"]:
        assert "the last checkpoint could not be saved" in output
        output = one_rank.run(["tests/workers/own_mount.py", disk, "remount,size=1g", *command]).output
        start = f"resumed at step {committed[0].name[11:]}" if committed else "starts at step 0"
        assert start in output, output
        assert metrics(run) == metrics(reference)
    assert_same_weights(weights(run, 6), weights(reference, 6))
    return answer["exit_code"], len(committed)


@pytest.mark.parametrize("level", [0.6, 1.6, 2.4])
def test_a_full_disk_costs_no_step(one_rank, reference, digits, tmp_path, level):
    expected = {0.6: (4, 0), 1.6: (4, 1), 2.4: (0, 1)}
    assert check_level(one_rank, reference, digits, tmp_path, level) == expected[level]


@pytest.mark.slow
def test_a_disk_full_at_twenty_levels(one_rank, reference, digits, tmp_path):
    outcomes, failures = [], []
    for number, level in enumerate(LEVELS):
        (tmp_path / str(number)).mkdir()
        try:
            outcomes.append(check_level(one_rank, reference, digits, tmp_path / str(number), level))
        except AssertionError as error:
            failures.append(f"{level}: {error}")
    codes = [code for code, _ in outcomes]
    detail = f"{codes.count(4)} ended with exit 4 and resumed, {sum(kept for _, kept in outcomes)} kept a checkpoint"
    record("disk full during a save", "tmpfs of 20 sizes", len(outcomes), len(LEVELS), detail)
    assert not failures, "\n".join(failures)
    assert {0, 4} == set(codes)


@counted("read-only disk during a save", "tmpfs mounted read-only over checkpoints/")
def test_a_read_only_disk_costs_no_step(one_rank, reference, digits, tmp_path):
    command = train_command(config_file(tmp_path, 1, vitds=STEPS), digits, tmp_path, "run")
    options = ["tests/workers/own_mount.py", tmp_path / "run/checkpoints", "ro"]
    output = one_rank.run([*options, *command], exit_code=4).output
    assert output.count("Read-only file system") == 3 and "the last checkpoint could not be saved" in output
    assert metrics(tmp_path / "run") == metrics(reference)
