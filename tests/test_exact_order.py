"""Global batches have the same samples on 1, 2 and 3 real ranks, killed and started again on other numbers of them."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from data_sets import damage, write_pixels
from rank_processes import ROOT, free_port
from run_directory import config_file, metrics, train_command
from warm_ranks import WarmRanks

from vitds.checkpoint import committed_checkpoints, step_of
from vitds.feed import train_loader
from vitds.preflight import plan_run

NUM_STEPS = 30
EVERYTHING = ("--set", "data.weights=[0.7,0.3]", "--set", "data.shuffle_window=2", "--set", "data.repeats=2")


class RecordingRanks(WarmRanks):
    """Ranks whose runs leave a record of the sample ids of every step."""

    def __init__(self, world_size: int, records: Path) -> None:
        super().__init__(world_size, "tests/workers/recording_ranks.py", RECORDS=str(records))

    def kill_after_step(self, run_dir: Path, step: int) -> None:
        """SIGKILL every rank once the checkpoint of a step is committed."""
        deadline = time.monotonic() + 200
        while not (run_dir / "checkpoints" / f"global_step{step}").exists():
            assert time.monotonic() < deadline, "no checkpoint in time"
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.002)
        for process in self.processes:
            process.kill()


def seen(records: Path, run: str, world_size: int) -> dict[int, list[int]]:
    """The ids of each global batch that a job took, from the records of all its ranks; the last may be in pieces."""
    parts = defaultdict(dict)
    for path in records.glob(f"{run}.{world_size}.*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                part = json.loads(line)
                parts[part["step"]][part["index"]] = part["ids"]
    batches = {step: [i for _, ids in sorted(of_step.items()) for i in ids] for step, of_step in parts.items()}
    return {step: ids for step, ids in batches.items() if len(ids) == 12}


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = committed_checkpoints(run_dir / "checkpoints")
    return step_of(found[0]) if found else 0


def expected(command: list[str]) -> dict[int, list[int]]:
    """The ids of every global batch, from one loader without workers in this process."""
    plan = plan_run([*command[1:], "--workers", "0", "--gradient-accumulation-steps", "1"], {})
    loader = train_loader(plan, "cpu", 0)
    return {step: micro_batch.ids.tolist() for step, micro_batch in enumerate(loader, start=1)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def two_ranks(records):
    with RecordingRanks(2, records) as ranks:
        yield ranks


@pytest.mark.ranks
def test_bad_samples_of_different_ranks_add_up(two_ranks, tmp_path):
    config = config_file(tmp_path, 0, train_batch_size=12, vitds={"log_every": 2, "max_bad_samples": 0.1, "workers": 0})
    data = write_pixels(tmp_path / "data", num_train=13)
    command = train_command(config, data, tmp_path, "run")
    planned = expected(command)[1]
    for sample_id in (planned[0], planned[6]):  # one for each rank, each of which may meet one
        damage(data, "train", sample_id)
    two_ranks.start(command)
    outputs = two_ranks.finish_all(exit_code=3)
    assert "step 2/20" not in outputs[0], outputs[0]
    assert "2 bad of 13 samples, allowed share 0.1" in outputs[0], outputs[0]
    assert [output.count("replaced a bad sample") for output in outputs] == [1, 1]


@pytest.mark.ranks
def test_real_ranks_see_the_same_samples_through_kills_and_on_other_numbers_of_ranks(two_ranks, records, tmp_path):
    few = write_pixels(tmp_path / "few", num_train=13)  # 2 shards, for as many as 3 ranks with 2 workers each
    first, second = (write_pixels(tmp_path / name, num_train=size) for name, size in (("first", 13), ("second", 37)))
    for directory, sample_id in ((first, 4), (second, 20)):
        damage(directory, "train", sample_id)
    changes = {"num_steps": NUM_STEPS, "save_every": 4, "workers": 2, "max_bad_samples": 0.05}
    config = config_file(tmp_path, 0, train_batch_size=12, vitds=changes)
    mixed = train_command(config, f"{first},{second}", tmp_path, "mixed", *EVERYTHING)
    of_few, of_mixed = expected(train_command(config, few, tmp_path, "few")), expected(mixed)

    last_saved = 0
    for world_size in (3, 2, 1):
        with two_ranks if world_size == 2 else RecordingRanks(world_size, records) as ranks:
            if world_size > 1:
                ranks.run(train_command(config, few, tmp_path, f"few-{world_size}"))
                assert seen(records, f"few-{world_size}", world_size) == of_few
                ranks.start(mixed)
                ranks.kill_after_step(tmp_path / "mixed", last_saved + 4)
            else:
                output = ranks.run(mixed).output
        steps = seen(records, "mixed", world_size)
        assert steps == {step: of_mixed[step] for step in steps}
        assert min(steps) == last_saved + 1, "nothing before the checkpoint is taken again"
        last_saved = newest_step(tmp_path / "mixed")
        assert world_size == 1 or last_saved < NUM_STEPS, "the kill came too late to show anything"
    assert max(steps) == NUM_STEPS
    assert [line["step"] for line in metrics(tmp_path / "mixed") if line["split"] == "train"] == [*of_mixed]
    assert "2 of 50 training samples are bad" in output and "replaced a bad sample" not in output  # known by then


@pytest.mark.slow
@pytest.mark.ranks
def test_the_launcher_s_ranks_see_the_same_samples_through_kills(tmp_path):
    first, second = (write_pixels(tmp_path / name, num_train=size) for name, size in (("first", 13), ("second", 37)))
    config = config_file(tmp_path, 0, train_batch_size=12, vitds={"num_steps": 40, "save_every": 2, "workers": 2})
    flags = ("--sampling", "balanced", "--set", "data.weights=[0.7,0.3]")
    command = train_command(config, f"{first},{second}", tmp_path, "run", *flags)
    due, last_saved = expected(command), 0
    for number, world_size in enumerate((3, 1, 2, 3, 1)):
        records = tmp_path / f"records-{last_saved}"
        records.mkdir()
        launcher = launch(["tests/workers/recording_ranks.py", *command[1:]], world_size, records)
        while launcher.poll() is None and newest_step(tmp_path / "run") < min(last_saved + 6, 40):
            time.sleep(0.01)
        if number < 4:
            assert launcher.poll() is None, launcher.communicate()[0]
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()
        output = launcher.communicate(timeout=100)[0]
        steps = seen(records, "run", world_size)
        assert steps and steps == {step: due[step] for step in steps}, output
        assert min(steps) == last_saved + 1
        last_saved = newest_step(tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "train"] == list(range(1, 41))


def launch(command: list[str], world_size: int, records: Path) -> subprocess.Popen:
    """Start ranks on the CPU as a user does, with the `deepspeed` command."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(world_size)}
    environment |= {"RECORDS": str(records), "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}
    launcher = ["deepspeed", "-q", "--num_gpus", str(world_size), "--master_port", str(free_port())]
    return subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
