"""tools/replay.py: a step of a real run of two ranks, made again by one process and proved by its pixel hash."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_sets import write_pixels
from PIL import Image
from rank_processes import ROOT, run_ranks
from run_directory import config_file, metrics, train_command

from vitds.data.reader import ShardReader

pytestmark = pytest.mark.ranks
AUGMENTED = {"randaugment_layers": 1, "color_jitter": 0.3, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    data = write_pixels(folder / "data")
    config = config_file(folder, 1, vitds={"num_steps": 6, "log_every": 2, "data": AUGMENTED})
    run_ranks(train_command(config, data, folder, "run"), 2)
    return folder / "run"


def replay(*arguments):
    command = [sys.executable, "tools/replay.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_pixels_are_those_that_training_hashed(run):
    done = replay(run, "--step", 4, "--pixels")
    assert done.returncode == 0, done.stderr
    logged = next(line["pixel_hash"] for line in metrics(run) if line["step"] == 4)
    assert f"pixel hash {logged}, as training logged it" in done.stdout
    out = run / "replay" / "step-4"
    rows = list(csv.DictReader((out / "samples.csv").open()))
    reader = ShardReader(run.parent / "data", "train")
    assert [int(row["position"]) for row in rows] == list(range(48, 64))
    assert all((row["shard"], row["key"]) == reader.where(int(row["sample_id"])) for row in rows)
    assert any("/" in row["target"] for row in rows)  # mixed
    images = np.load(out / "images.npy")
    assert images.shape == (16, 3, 16, 16) and images.dtype == np.float32 and np.abs(images).max() <= 1
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 500


def test_a_step_without_a_line_has_nothing_to_be_compared_with(run, tmp_path):
    done = replay(run, "--step", 3, "--out", tmp_path / "out")
    assert done.returncode == 0 and "training logged none here (log_every 2)" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.csv", "sheet.png"}


def test_the_weights_that_a_run_began_with_may_be_gone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.resolved.json"
    config = json.loads(path.read_text())
    config["vitds"] |= {"pretrained": str(tmp_path / "gone.npz"), "resume": str(tmp_path / "gone")}
    path.write_text(json.dumps(config))
    done = replay(tmp_path / "run", "--step", 2)
    assert done.returncode == 0 and "as training logged it" in done.stdout, done.stderr


def test_other_data_are_noticed(run, tmp_path):
    write_pixels(tmp_path / "other", num_train=54)
    done = replay(run, "--step", 2, "--data", tmp_path / "other", "--out", tmp_path / "out")
    assert done.returncode == 3 and "these are not the pixels it saw" in done.stdout


@pytest.mark.parametrize("arguments, message", [((".", "--step", 7), "holds no run"), (("--stepp", 7), "--step")])
def test_mistakes_are_named(arguments, message):
    done = replay(*arguments)
    assert done.returncode in (2, 4) and message in done.stderr and "Traceback" not in done.stderr


def test_a_step_after_the_last_is_refused(run):
    done = replay(run, "--step", 7)
    assert done.returncode == 2 and "the run has 6 steps" in done.stderr
