"""Bad input from the shell to the last message. The rows that need no torch are in test_preflight.py."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import ROOT, free_port, run_ranks
from run_directory import config_file, metrics, train_command

from vitds.data.reader import ShardReader


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the repository, as a single rank unless it is a launcher."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_folders(root, **classes_of_split):
    """Class folders of two images each."""
    for split, classes in classes_of_split.items():
        for seed, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            for number in range(2):
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def shard(source, out):
    return run(sys.executable, "tools/shard_imagenet.py", source, out)


def test_mending_one_mistake_after_another_goes_from_flags_to_json_to_model_to_data(tmp_path):
    """One command with every mistake at once: each message names the cheapest that is left to mend."""
    (tmp_path / "nothing").mkdir()
    good = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "vitds": {"num_steps": 3}}
    bad = good | {"train_bach_size": 8, "zero_optimization": {"stage": 4}}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    command = {
        "--deepspeed_config": tmp_path / "none.json",
        "--data": tmp_path / "nowhere",
        "--model": "ViT-B16",
        "--image-size": "230",
        "--pretrained": tmp_path / "none.npz",
        "--resume": tmp_path / "nothing",
        "--num-stepps": "3",
    }

    def message(exit_code, said):
        flags = [part for pair in command.items() for part in pair]
        done = run(sys.executable, "launch/train.py", *flags)
        assert done.returncode == exit_code and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""

    message(2, 'did you mean "--num-steps"?')
    del command["--num-stepps"]
    message(2, "no such configuration file")
    command["--deepspeed_config"] = tmp_path / "bad.json"
    message(2, 'did you mean "train_batch_size"?')
    (tmp_path / "bad.json").write_text(json.dumps(good | {"zero_optimization": {"stage": 4}}))
    message(2, "zero_optimization.stage")
    (tmp_path / "bad.json").write_text(json.dumps(good))
    message(2, 'did you mean "ViT-B_16"?')
    command["--model"] = "ViT-B_16"
    message(4, "none.npz")
    del command["--pretrained"]
    message(2, "224 or 240")
    command["--image-size"] = "224"
    message(3, "no such data directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "nothing"]


def test_a_training_split_without_images_writes_nothing(tmp_path):
    (tmp_path / "in/train/cat").mkdir(parents=True)
    done = shard(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 3 and "no images found" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_validation_class_that_training_lacks_writes_nothing(tmp_path):
    done = shard(write_folders(tmp_path / "in", train=["cat"], val=["cat", "eel"]), tmp_path / "out")
    assert done.returncode == 3 and "lacks: eel" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.ranks
def test_a_class_that_validation_lacks_is_named_and_moves_no_label(tmp_path):
    folders = write_folders(tmp_path / "in", train=["cat", "dog", "eel"], val=["cat", "eel"])
    done = shard(folders, tmp_path / "out")
    assert done.returncode == 0 and "no image of dog" in done.stdout, done.stderr
    labels = {sample.key: sample.label for sample in map(ShardReader(tmp_path / "out", "val").read, range(4))}
    assert labels == {"cat/0": 0, "cat/1": 0, "eel/0": 2, "eel/1": 2}

    short = ["--num-steps", "1", "--warmup-steps", "0", "--eval-every", "1"]
    config = config_file(tmp_path, 1, train_batch_size=4)
    output = run_ranks(train_command(config, tmp_path / "out", tmp_path, "run", *short), 1)[0]
    assert "validation has no image of dog" in output
    assert metrics(tmp_path / "run")[-1]["split"] == "val"


@pytest.mark.ranks
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does fp16")
def test_fp16_where_deepspeed_does_not_do_it_is_a_mistake_of_the_configuration(digits, tmp_path):
    config = config_file(tmp_path, 1, fp16={"enabled": True})
    output = run_ranks(train_command(config, digits, tmp_path, "run"), 1, exit_code=None)[0]
    if "done: 20 steps" not in output:  # some processors do
        assert "config error" in output and "use bf16" in output and "Traceback" not in output, output


@pytest.mark.ranks
def test_under_the_launcher_a_mistake_is_said_once(digits, tmp_path):
    command = train_command(config_file(tmp_path, 1), digits, tmp_path, "run", "--train-batch-size", "15")
    launcher = [f"{sys.prefix}/bin/deepspeed", "-q", "--num_gpus", "2", "--master_port", free_port(), *command]
    done = run(*launcher, LOCAL_SIZE="2", DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("batch sizes do not multiply out on 2 ranks") == 1, said
    assert "--train-batch-size 16 --micro-batch-size 4 --gradient-accumulation-steps 2" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.ranks
def test_a_refused_command_leaves_a_run_as_it_was(digits, tmp_path):
    config = config_file(tmp_path, 1)
    run_ranks(train_command(config, digits, tmp_path, "run", "--stop-at-step", "1"), 1, exit_code=75)
    (tmp_path / "nothing").mkdir()
    np.savez(tmp_path / "odd.npz", cls=np.zeros((1, 1, 32), np.float32))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for exit_code, flags in (
        (2, ["--num-steps", "0"]),
        (2, ["--model", "ViT-B16"]),
        (3, ["--data", tmp_path / "nowhere"]),
        (3, ["--num-classes", "9"]),
        (4, ["--resume", tmp_path / "nothing"]),
        (4, ["--pretrained", tmp_path / "odd.npz"]),
    ):
        done = run(sys.executable, *train_command(config, digits, tmp_path, "run", *map(str, flags)))
        assert done.returncode == exit_code and len(done.stderr.splitlines()) <= 8, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
