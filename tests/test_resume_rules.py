"""Going on: from which checkpoint, what is refused and left as it was, and how a run is stopped."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks, start_ranks
from run_directory import TINY, assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.checkpoint import save_weights
from vitds.data.decode import jpeg_decoder_name
from vitds.manifest import read_manifest
from vitds.schedule import lr_factor

pytestmark = pytest.mark.ranks

PILLOW_ON_RANK_0 = """
import os, runpy, sys
if os.environ["RANK"] == "0":
    os.environ["VITDS_JPEG"] = "pillow"
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STEPS = {"vitds": {"num_steps": 12, "save_every": 4, "log_every": 1}}


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_ranks():
    with WarmRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def runs(one_rank, digits, tmp_path_factory) -> Path:
    """Two runs of one rank: `unbroken`, 12 steps, and `stopped` after step 8."""
    directory = tmp_path_factory.mktemp("runs")
    config = config_file(directory, 1, **STEPS)
    one_rank.run(train_command(config, digits, directory, "unbroken"))
    answer = one_rank.run(train_command(config, digits, directory, "stopped", "--stop-at-step", "8"), exit_code=75)
    assert "stopped at step 8, checkpoint saved; the same command goes on from here (exit 75)" in answer.output
    assert checkpoints(directory / "stopped") == ["global_step4", "global_step8"]
    assert (directory / "unbroken/checkpoints/best").read_text() == "global_step12"
    return directory


@pytest.fixture
def command(runs, digits, tmp_path):
    """A copy of the stopped run in a directory of the test's own, and the command that goes on from it."""
    shutil.copytree(runs / "stopped", tmp_path / "stopped")

    def of(name, *flags, stage=1, **changes):
        return train_command(config_file(tmp_path, stage, **STEPS | changes), digits, tmp_path, name, *flags)

    return of


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("global_step*"))


def contents(directory):
    """What a directory holds, but for who has it."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def optimizer_file(run_dir, step):
    return run_dir / f"checkpoints/global_step{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt"


def assert_same_run(one, other, step=12):
    assert metrics(one) == metrics(other)
    assert_same_weights(weights(one, step), weights(other, step))


def test_the_same_command_ends_as_if_it_had_never_been_stopped(one_rank, runs, command, tmp_path):
    output = one_rank.run(command("stopped")).output
    assert "resumed at step 8 of 12" in output
    assert "passed over" not in output
    assert_same_run(tmp_path / "stopped", runs / "unbroken")
    commands = (tmp_path / "stopped/command.txt").read_text().splitlines()
    assert len(commands) == 2
    assert "--stop-at-step 8" in commands[0]
    assert "--stop-at-step" not in commands[1]


def test_a_finished_run_is_refused_with_the_two_ways_out(one_rank, runs, digits):
    finished = runs / "unbroken"
    before = contents(finished)
    answer = one_rank.run(train_command(runs / "stage1.json", digits, runs, "unbroken"), exit_code=2)
    assert "this run is finished (12 steps)" in answer.output and "--extend-to 24 makes it longer" in answer.output
    assert f"--name NEW --pretrained {finished}/checkpoints/global_step12" in answer.output
    assert f"or move {finished} away" in answer.output
    assert contents(finished) == before


def test_a_run_killed_behind_its_last_commit_ends_as_if_it_had_not_been(one_rank, runs, digits, tmp_path):
    shutil.copytree(runs / "unbroken", tmp_path / "killed")
    before = contents(tmp_path / "killed")
    command = train_command(runs / "stage1.json", digits, tmp_path, "killed")
    (tmp_path / "killed/checkpoints/best").write_bytes(b"\xff\xfe")
    (tmp_path / "killed/exit.json").write_text('{"exit_code": null}')
    output = one_rank.run(command).output
    assert "done: 12 steps" in output
    after = contents(tmp_path / "killed")
    for name in ("checkpoints/best", "metrics.jsonl"):
        assert after[Path(name)] == before[Path(name)]
    assert json.loads(after[Path("exit.json")])["exit_code"] == 0
    assert checkpoints(tmp_path / "killed") == checkpoints(runs / "unbroken")
    assert "this run is finished" in one_rank.run(command, exit_code=2).output


def test_resume_never_refuses_a_run_with_checkpoints_and_starts_a_new_one(one_rank, command, tmp_path):
    before = contents(tmp_path / "stopped")
    output = one_rank.run(command("stopped", "--resume", "never"), exit_code=2).output
    assert "--resume never, and this run has checkpoints" in output
    assert "--name NEW" in output
    assert contents(tmp_path / "stopped") == before
    output = one_rank.run(command("new", "--resume", "never", "--stop-at-step", "1"), exit_code=75).output
    assert "starts at step 0 of 12, 0 samples seen" in output


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(one_rank, runs, command, tmp_path):
    damaged = optimizer_file(tmp_path / "stopped", 8)
    flip(damaged)
    output = one_rank.run(command("stopped")).output
    assert f"passed over a damaged checkpoint  {damaged}: content differs" in output
    assert "resumed at step 4 of 12" in output
    assert_same_run(tmp_path / "stopped", runs / "unbroken")


@pytest.mark.parametrize("damage", ["flipped and truncated", "only latest is left"])
def test_where_nothing_verifies_the_run_ends_and_nothing_is_changed(one_rank, command, tmp_path, damage):
    run_dir = tmp_path / "stopped"
    if damage == "only latest is left":
        for name in checkpoints(run_dir):
            shutil.rmtree(run_dir / "checkpoints" / name)
    else:
        flip(optimizer_file(run_dir, 8))
        model_file = run_dir / "checkpoints/global_step4/mp_rank_00_model_states.pt"
        model_file.write_bytes(model_file.read_bytes()[:-1])
    before = contents(run_dir)
    output = one_rank.run(command("stopped"), exit_code=4).output
    assert "checkpoints were committed here, and none of them verifies" in output
    if damage != "only latest is left":
        assert str(optimizer_file(run_dir, 8)) in output
        assert str(model_file) in output
    assert contents(run_dir) == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_loss_log(one_rank, command, tmp_path):
    run_dir, moved = tmp_path / "stopped", tmp_path / "elsewhere"
    (run_dir / "checkpoints").rename(moved)
    before = contents(run_dir)
    output = one_rank.run(command("stopped"), exit_code=4).output
    assert "this run had checkpoints, and they are gone" in output and f"{run_dir}/checkpoints" in output
    (run_dir / "checkpoints").rmdir()  # as every start makes it
    assert contents(run_dir) == before
    assert "this run has checkpoints" in one_rank.run(command("stopped", "--resume", "never"), exit_code=2).output
    assert "resumed at step 8 of 12" in one_rank.run(command("stopped", "--resume", moved)).output


def test_resume_path_that_is_missing_empty_or_damaged_is_an_error(one_rank, command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-run/checkpoints").mkdir(parents=True)
    run_dir = tmp_path / "stopped"
    flip(optimizer_file(run_dir, 8))
    (run_dir / "checkpoints/global_step4/MANIFEST.json").unlink()
    before = contents(run_dir)
    cases = {
        tmp_path / "nowhere": "no such directory",
        tmp_path / "empty": "holds no checkpoint",
        tmp_path / "a-run": "holds no checkpoint",
        run_dir: "none of them verifies",
        run_dir / "checkpoints": "none of them verifies",
        run_dir / "checkpoints/global_step8": "the checkpoint is damaged",
        run_dir / "checkpoints/global_step4": "holds no checkpoint",
        run_dir / "checkpoints/global_step6": "no such directory",
    }
    for number, (path, message) in enumerate(cases.items()):
        name = f"from-{number}"
        output = one_rank.run(command(name, "--resume", path), exit_code=4).output
        assert message in output, path
        assert str(path) in output
        assert not (tmp_path / name / "metrics.jsonl").exists(), "training began all the same"
    assert contents(run_dir) == before


def test_weights_are_not_a_run_to_resume(one_rank, command, tmp_path):
    info = {"model": TINY, "image_size": [16, 16], "num_classes": 10, "pre_logits": None}
    save_weights(tmp_path / "weights", {"head.bias": torch.zeros(10)}, info)
    output = one_rank.run(command("new", "--resume", tmp_path / "weights"), exit_code=4).output
    assert "holds weights, not a run" in output
    assert "--pretrained" in output


def test_resume_path_goes_on_under_another_name_and_then_from_its_own_checkpoints(one_rank, runs, command, tmp_path):
    path = tmp_path / "stopped/checkpoints/global_step4"
    branch = command("branch", "--resume", path)
    output = one_rank.run([*branch, "--stop-at-step", "6"], exit_code=75).output
    assert "resumed at step 4 of 12" in output
    assert "resumed at step 6 of 12" in one_rank.run(branch).output
    assert metrics(tmp_path / "branch") == metrics(runs / "unbroken")[4:]
    assert_same_weights(weights(tmp_path / "branch", 12), weights(runs / "unbroken", 12))
    assert checkpoints(tmp_path / "stopped") == ["global_step4", "global_step8"]


@pytest.mark.parametrize("form", ["stopped", "stopped/checkpoints", "stopped/checkpoints/global_step8"])
def test_resume_path_names_a_run_its_checkpoints_or_one_of_them(one_rank, command, tmp_path, form):
    output = one_rank.run(command("new", "--resume", tmp_path / form, "--stop-at-step", "9"), exit_code=75).output
    assert "resumed at step 8 of 12" in output


def test_a_damaged_newest_checkpoint_of_another_run_is_named_too(one_rank, command, tmp_path):
    damaged = optimizer_file(tmp_path / "stopped", 8)
    flip(damaged)
    flags = ["--resume", tmp_path / "stopped", "--stop-at-step", "5"]
    output = one_rank.run(command("new", *flags), exit_code=75).output
    assert f"passed over a damaged checkpoint  {damaged}: content differs" in output
    assert "resumed at step 4 of 12" in output


def test_there_is_nothing_to_go_on_to_from_the_end_of_another_run(one_rank, runs, command, tmp_path):
    output = one_rank.run(command("new", "--resume", runs / "unbroken"), exit_code=2).output
    assert "this run is finished (12 steps)" in output
    assert f"--pretrained {runs}/unbroken/checkpoints/global_step12" in output
    assert not (tmp_path / "new/metrics.jsonl").exists()


def test_at_stage_0_another_number_of_ranks_goes_on_with_the_same_samples(one_rank, two_ranks, runs, command, tmp_path):
    """Two ranks of one micro-batch each see what one rank saw in two, so losses agree up to rounding."""
    one_rank.run(command("elastic", "--stop-at-step", "8", stage=0), exit_code=75)
    two_ranks.run(command("elastic", stage=0, gradient_accumulation_steps=1))
    losses = [[line["loss"] for line in metrics(path)] for path in (tmp_path / "elastic", runs / "unbroken")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_does_not_go_back_behind_its_own_newest_checkpoint(one_rank, command, tmp_path):
    before = contents(tmp_path / "stopped")
    older = tmp_path / "stopped/checkpoints/global_step4"
    output = one_rank.run(command("stopped", "--resume", older), exit_code=4).output
    assert "the run has a newer checkpoint, global_step8" in output
    assert "give a new --name" in output
    assert contents(tmp_path / "stopped") == before


def test_a_command_that_means_another_run_is_refused_with_the_differences(one_rank, command, tmp_path):
    before = contents(tmp_path / "stopped")
    flags = ["--seed", "7", "--set", "optimizer.params.lr=0.002", "--set", "data.flip=0", "--num-steps", "14"]
    flags += ["--sampling", "balanced", "--set", "data.repeats=2"]
    output = one_rank.run(command("stopped", *flags), exit_code=4).output
    assert "the command differs from the run that it would resume" in output
    for line in (
        "optimizer.params.lr: 0.001 in the checkpoint, 0.002 now",
        "vitds.data.flip: 0.5 in the checkpoint, 0.0 now",
        "vitds.data.repeats: 1 in the checkpoint, 2 now",
        "vitds.data.sampling: 'natural' in the checkpoint, 'balanced' now",
        "vitds.num_steps: 12 in the checkpoint, 14 now",
        "vitds.seed: 42 in the checkpoint, 7 now",
        f"--pretrained {tmp_path}/stopped/checkpoints/global_step8 --name NEW",
    ):
        assert line in output, output
    assert contents(tmp_path / "stopped") == before


def test_other_data_are_refused(one_rank, command, digits, tmp_path):
    smaller = tmp_path / "smaller"
    shutil.copytree(digits, smaller)
    facts = json.loads((smaller / "_info.json").read_text())
    train = facts["splits"]["train"]
    train["num_samples"] -= 1
    train["class_counts"][0] -= 1
    (smaller / "_info.json").write_text(json.dumps(facts))
    output = one_rank.run([*command("stopped"), "--data", smaller], exit_code=4).output
    assert "the data differ from those of the checkpoint: num_train" in output


def test_what_changes_no_result_may_change(one_rank, runs, command, tmp_path):
    flags = ["--workers", "0", "--save-every", "100", "--keep-last", "1", "--eval-batch-size", "50"]
    flags += ["--set", "memory_breakdown=false", "--set", "log_level=error", "--set", "disable_python_gc=true"]
    flags += ["--set", "timers.throughput.enabled=false", "--set", "zero_optimization.zero_hpz_partition_size=1"]
    one_rank.run(command("stopped", *flags, "--activation-checkpointing", "full"))
    assert [line["loss"] for line in metrics(tmp_path / "stopped") if line["split"] == "train"] == pytest.approx(
        [line["loss"] for line in metrics(runs / "unbroken") if line["split"] == "train"], rel=1e-6
    )
    assert checkpoints(tmp_path / "stopped") == ["global_step12"]


@pytest.mark.skipif(jpeg_decoder_name() == "pillow", reason="no other decoder is there")
def test_ranks_that_decode_differently_are_warned_of_and_a_change_of_the_decoder_is_said(one_rank, command, tmp_path):
    start = command("decoders", "--stop-at-step", "4", stage=0)
    output = run_ranks(["-c", PILLOW_ON_RANK_0, *start], 2, exit_code=75)[0]
    names = ", ".join(sorted({"pillow", jpeg_decoder_name()}))
    assert f"warning  the ranks decode JPEGs with {names}: damaged ones may be replaced on some ranks" in output
    assert read_manifest(tmp_path / "decoders/checkpoints/global_step4").info["jpeg_decoder"] == "pillow"
    output = one_rank.run(command("decoders", "--stop-at-step", "5", stage=0), exit_code=75).output
    assert f"changed since the checkpoint  JPEG decoder: pillow in the checkpoint, {jpeg_decoder_name()} now" in output
    assert "the ranks decode JPEGs with" not in output
    assert "JPEG decoder:" not in one_rank.run(command("decoders", "--stop-at-step", "6", stage=0), exit_code=75).output


def test_another_precision_is_refused_with_advice(one_rank, command, tmp_path):
    before = contents(tmp_path / "stopped")
    output = one_rank.run(command("stopped", bf16={"enabled": True}), exit_code=4).output
    assert "bf16" in output
    assert "--pretrained" in output
    assert contents(tmp_path / "stopped") == before


def test_another_length_rate_or_batch_is_refused_with_the_ways_out(one_rank, command, tmp_path):
    before = contents(tmp_path / "stopped")
    checkpoint = tmp_path / "stopped/checkpoints/global_step8"
    for flags, told in (
        (["--num-steps", "20"], "vitds.num_steps: 12 in the checkpoint, 20 now"),
        (["--set", "optimizer.params.lr=0.5"], "optimizer.params.lr: 0.001 in the checkpoint, 0.5 now"),
        (["--train-batch-size", "8"], "train_batch_size: 16 in the checkpoint, 8 now"),
    ):
        output = one_rank.run([*command("stopped"), *flags], exit_code=4).output
        assert told in output
        assert f"--extend-to {20 if '20' in flags else 'N'} changes its length alone" in output
        assert f"--pretrained {checkpoint} --name NEW starts a new run from its weights" in output
    for flags, told in (
        (["--extend-to", "10"], "--extend-to 10 would shorten a run of 12 steps"),
        (["--extend-to", "20", "--name", "none"], "there is no checkpoint to go on from"),
    ):
        assert told in one_rank.run([*command("stopped"), *flags], exit_code=2).output
    assert contents(tmp_path / "stopped") == before


def test_a_run_is_made_longer_finished_or_not_and_then_resumed_as_any_other(one_rank, runs, command, tmp_path):
    shutil.copytree(runs / "unbroken", tmp_path / "unbroken")
    for name, last, start in (("stopped", 8, 8), ("unbroken", 12, 12)):
        before = metrics(tmp_path / name)
        longer = command(name, "--extend-to", "20")
        output = one_rank.run([*longer, "--stop-at-step", "14"], exit_code=75).output
        assert f"resumed at step {start} of 20" in output
        assert f"step {start}/20  new segment: 12 -> 20 steps" in output
        assert "resumed at step 14 of 20" in (output := one_rank.run(longer).output)
        assert "segment" not in output
        assert "this run is finished (20 steps)" in one_rank.run(longer, exit_code=2).output
        lines = metrics(tmp_path / name)
        assert lines[: len(before)] == before
        segment, *after = lines[len(before) :]
        assert segment == {
            "step": last,
            "samples_seen": last * 16,
            "split": "segment",
            "num_steps": 20,
            "num_steps_before": 12,
        }
        assert [line["step"] for line in after if line["split"] == "train"] == list(range(last + 1, 21))
        schedule = lr_factor("cosine", 5, 20)
        for line in after:
            assert line["split"] == "val" or line["lr"] == 1e-3 * schedule(line["step"] - 1)
        resolved = json.loads((tmp_path / name / "config.resolved.json").read_text())
        assert resolved["vitds"]["num_steps"] == resolved["scheduler"]["params"]["total_num_steps"] == 20


def test_a_schedule_of_deepspeeds_is_computed_anew_from_the_first_step_of_a_longer_run(one_rank, digits, tmp_path):
    params = {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "warmup_type": "linear", "total_num_steps": "auto"}
    config = config_file(tmp_path, 1, **STEPS, scheduler={"type": "WarmupDecayLR", "params": params})
    of_20 = ["--num-steps", "20", "--stop-at-step", "10"]
    one_rank.run(train_command(config, digits, tmp_path, "of-20", *of_20), exit_code=75)
    short = train_command(config, digits, tmp_path, "short")
    one_rank.run([*short, "--stop-at-step", "8"], exit_code=75)
    one_rank.run([*short, "--extend-to", "20", "--stop-at-step", "10"], exit_code=75)
    rates = [
        [line["lr"] for line in metrics(tmp_path / name) if line["split"] == "train"] for name in ("short", "of-20")
    ]
    assert rates[0][8:] == rates[1][8:]


def test_a_new_segment_is_written_once_however_often_its_start_is_tried(one_rank, command, tmp_path):
    """Stopped before a checkpoint of the longer run is there, the next start extends again."""
    longer = command("stopped", "--extend-to", "20", "--stop-at-step", "10")
    full_disk = ["tests/workers/full_disk.py", "0", "50000"]
    one_rank.run([*full_disk, *longer, "--workers", "0"], exit_code=4)
    assert checkpoints(tmp_path / "stopped") == ["global_step4", "global_step8"]
    assert "new segment" in one_rank.run(longer, exit_code=75).output
    assert [line["step"] for line in metrics(tmp_path / "stopped") if line["split"] == "segment"] == [8]


def test_a_save_that_fails_lets_training_go_on(one_rank, runs, command, tmp_path):
    full_disk = ["tests/workers/full_disk.py", "0", "50000"]
    output = one_rank.run([*full_disk, *command("new", "--workers", "0")]).output
    assert "the checkpoint of step 4 could not be written: rank 0" in output
    assert "the checkpoints committed before are untouched" in output
    assert checkpoints(tmp_path / "new") == ["global_step12", "global_step8"]
    assert_same_run(tmp_path / "new", runs / "unbroken")


def test_a_last_save_that_fails_ends_with_an_error_and_the_same_command_mends_it(one_rank, runs, command, tmp_path):
    full_disk = ["tests/workers/full_disk.py", "0", "50000"]
    output = one_rank.run([*full_disk, *command("stopped", "--workers", "0")], exit_code=4).output
    assert "the last checkpoint could not be saved" in output
    assert checkpoints(tmp_path / "stopped") == ["global_step4", "global_step8"]
    assert "resumed at step 8" in one_rank.run(command("stopped")).output
    assert_same_run(tmp_path / "stopped", runs / "unbroken")


@pytest.mark.parametrize(("rank", "max_bytes"), [(1, 50_000), (0, 20_000)])
def test_a_disk_that_is_full_on_one_rank_commits_nothing_on_any(two_ranks, command, tmp_path, rank, max_bytes):
    """On rank 0 not even DeepSpeed's own recovery script (some 38 kB) fits."""
    full_disk = ["tests/workers/full_disk.py", rank, max_bytes]
    short = command("full", "--num-steps", "6", "--workers", "0")  # the limit holds for shared memory too
    output = two_ranks.run([*full_disk, *short, "--save-every", "100"], exit_code=4).output
    assert f"the checkpoint of step 6 could not be written: rank {rank}" in output
    assert checkpoints(tmp_path / "full") == []
    assert [line["step"] for line in metrics(tmp_path / "full")] == [1, 2, 3, 4, 5, 6, 6]
    assert "starts at step 0" in two_ranks.run(short).output


def wait_for_step(run_dir, step, processes, timeout_s=300):
    """Wait until metrics.jsonl has the line of `step`."""
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, "no such step in time"
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.002)


def standing_still_before_its_first_save(command, run_dir):
    """A process that was stopped behind its first step; on a busy machine it may be met too late, and starts anew."""
    for _ in range(5):
        shutil.rmtree(run_dir, ignore_errors=True)
        (process,) = start_ranks(command, 1)
        wait_for_step(run_dir, 1, [process])
        process.send_signal(signal.SIGSTOP)
        if not (run_dir / "checkpoints/latest").exists():
            break
        process.kill()
        process.communicate()
    return process


def test_one_process_a_run_directory_and_a_kill_before_the_first_save(one_rank, runs, command, tmp_path):
    alone = command("killed", "--save-every", "100")
    process = standing_still_before_its_first_save(alone, tmp_path / "killed")  # it keeps its lock
    try:
        output = one_rank.run(alone, exit_code=4).output
        assert "another process trains in it" in output
        assert "choose another --name" in output
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "killed/checkpoints/latest").exists(), "the kill came too late to show anything"
    with open(tmp_path / "killed/metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "samp')

    assert "starts at step 0 of 12, 0 samples seen" in one_rank.run(command("killed")).output
    assert_same_run(tmp_path / "killed", runs / "unbroken")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks, command, tmp_path):
    """SIGTERM to rank 1 of two real processes, SIGINT to rank 0 of two warm ones; then the run goes on to its end."""
    run_dir = tmp_path / "signals"
    flags = ["--num-steps", "80", "--save-every", "100"]
    processes = start_ranks(command("signals", *flags), 2)
    try:
        wait_for_step(run_dir, 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], "\n".join(outputs)
    first = metrics(run_dir)[-1]["step"]
    assert 2 <= first < 60
    assert f"stopped at step {first}, checkpoint saved; the same command goes on from here (exit 75)" in outputs[0]
    assert outputs[1] == ""
    assert checkpoints(run_dir) == [f"global_step{first}"]

    two_ranks.start(command("signals", *flags))
    wait_for_step(run_dir, first + 1, two_ranks.processes)
    two_ranks.processes[0].send_signal(signal.SIGINT)
    output = two_ranks.finish(exit_code=130).output
    second = metrics(run_dir)[-1]["step"]
    assert first < second < 80
    assert f"resumed at step {first} of 80" in output
    assert f"stopped at step {second}, checkpoint saved; the same command goes on from here (exit 130)" in output

    two_ranks.run(command("signals", *flags))
    two_ranks.run(command("unbroken", *flags))
    assert_same_run(run_dir, tmp_path / "unbroken", step=80)
