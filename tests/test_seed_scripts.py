"""launch/train.sh and launch/train_fp16.sh: one test per variable shows its effect on a real run."""

import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import ROOT
from tiny_dataset import write_dataset

from vitds.layouts.google import google_layout
from vitds.model.registry import get_spec

pytestmark = pytest.mark.ranks

TINY = "custom:width=16,depth=2,heads=2,mlp=32,patch=4"
ON_CPU = not torch.cuda.is_available()
SITE = {"PYTHONPATH": str(ROOT / "tests/workers/site")}


@dataclass
class Run:
    """What a script left behind: its exit code, what it printed, and the run's own files."""

    exit_code: int
    output: str
    directory: Path

    def __getattr__(self, name: str):
        return json.loads((self.directory / {"resolved": "config.resolved.json", "env": "env.json"}[name]).read_text())

    def lines(self, split: str) -> list[dict]:
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["split"] == split]


def run_script(script: str, output_dir: Path, *flags: str, cwd: Path = ROOT, **variables: object) -> Run:
    """Run a script from `cwd` with these variables and no others, every step logged, below `output_dir`."""
    said = re.findall("[A-Z_0-9]+", (ROOT / "launch/train.sh").read_text())
    inherited = {name: value for name, value in os.environ.items() if name not in said}
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            "bash",
            ROOT / "launch" / script,
            "--output-dir",
            str(output_dir),
            "--log-every",
            "1",
            "--workers",
            "0",
            *flags,
        ],
        cwd=cwd,
        env=inherited | active | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, output_dir / str(variables.get("NAME", "unnamed")))


def write_npz(path: Path, num_classes: int) -> Path:
    """Random weights of TINY at 16 px, head included, in Google's layout."""
    random = np.random.default_rng(0)
    layout = google_layout(get_spec(TINY), 17, num_classes, None)
    np.savez(path, **{array.key: random.normal(0, 0.5, array.shape).astype(np.float32) for array in layout})
    return path


# A run with every variable set, stopped at its second step, and one that goes on from it.


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def variables(digits, place) -> dict[str, object]:
    (place / "weights").mkdir()
    write_npz(place / f"weights/{TINY}.npz", num_classes=10)
    return {
        "DATASET": digits,
        "MODEL_TYPE": TINY,
        "IMG_SIZE": 16,
        "NAME": "set",
        "GPUS": "0,2" if ON_CPU else "0",
        "LOCAL_SIZE": 3,  # as many devices as DeepSpeed then counts on a CPU
        "TRAIN_BATCH_SIZE": 24,
        "GRAD_STEPS": 3,
        "EVAL_BATCH_SIZE": 100,
        "NUM_STEPS": 5,
        "WARMUP_STEPS": 2,
        "DECAY_TYPE": "linear",
        "PRETRAINED_DIR": place / "weights",
    }


@pytest.fixture(scope="module")
def stopped(variables, place) -> Run:
    run = run_script("train.sh", place, "--stop-at-step", "2", **variables)
    assert run.exit_code == 75, run.output
    return run


@pytest.fixture(scope="module")
def resumed(variables, place, stopped) -> Run:
    more = {"NAME": "resumed", "RESUME_PATH": stopped.directory / "checkpoints/global_step2"}
    run = run_script("train.sh", place, **variables | more)
    assert run.exit_code == 0, run.output
    return run


def test_dataset_is_a_dataset_directory(stopped, digits):
    assert stopped.resolved["vitds"]["data"]["path"] == str(digits)


def test_model_type(stopped):
    assert stopped.resolved["vitds"]["model"] == TINY


def test_img_size(stopped):
    assert stopped.resolved["vitds"]["image_size"] == [16, 16]


def test_name(stopped, place):
    assert (place / "set/checkpoints/latest").exists()


def test_gpus(stopped):
    assert int(stopped.env["world_size"]) == (2 if ON_CPU else 1)


def test_train_batch_size_is_the_global_one(stopped):
    assert [line["samples_seen"] for line in stopped.lines("train")] == [24, 48]


def test_grad_steps(stopped):
    assert stopped.resolved["gradient_accumulation_steps"] == 3
    assert stopped.resolved["train_micro_batch_size_per_gpu"] == (4 if ON_CPU else 8)


def test_eval_batch_size(resumed):
    assert resumed.resolved["vitds"]["eval_batch_size"] == 100
    assert resumed.lines("val")[0]["top1"] >= 0


def test_num_steps(resumed):
    assert resumed.lines("train")[-1]["step"] == 5 and resumed.resolved["vitds"]["num_steps"] == 5


def test_warmup_steps(stopped):
    assert [line["lr"] for line in stopped.lines("train")] == pytest.approx([0, 0.015])


def test_decay_type(resumed):
    assert [line["lr"] for line in resumed.lines("train")] == pytest.approx([0.03, 0.02, 0.01])  # cosine would bend


def test_resume_path(resumed):
    assert [line["step"] for line in resumed.lines("train")] == [3, 4, 5]


def test_pretrained_dir_holds_the_model_type(stopped, place):
    assert stopped.resolved["vitds"]["pretrained"] == str(place / f"weights/{TINY}.npz")
    assert abs(stopped.lines("train")[0]["loss"] - math.log(10)) > 0.01  # a new head is zero and guesses


def test_a_second_start_installs_nothing(resumed):
    assert "installing" not in resumed.output


# The words of DATASET, and the precisions of train_fp16.sh.


@pytest.fixture(scope="module")
def cifar10(place) -> Run:
    """train_fp16.sh as it stands on CIFAR-10, whose archive is a tiny one, with the recipe's own batch."""
    sums = write_cifar_archive(place / "archives")
    run = run_script(
        "train_fp16.sh", place, DATASET="cifar10", DATA_DIR=place / "archives", DATA_ROOT=place / "data", NAME="cifar",
        MODEL_TYPE=TINY, IMG_SIZE=16, NUM_STEPS=2, WARMUP_STEPS=1, VITDS_TEST_CIFAR=sums, **SITE,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    return run


@pytest.fixture(scope="module")
def imagenet(place) -> Run:
    """train_fp16.sh at O3 on class folders, from a weights file; every path as seen from another directory."""
    for split in ("train", "val"):
        for seed, name in enumerate(("cat", "dog")):
            (place / "folders" / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "folders" / split / name / "one.png")
    write_npz(place / "cats.npz", num_classes=2)
    run = run_script(
        "train_fp16.sh", place, cwd=place, DATASET="imagenet", DATA_DIR="folders", DATA_ROOT="data", NAME="imagenet",
        MODEL_TYPE=TINY, IMG_SIZE=16, NUM_STEPS=1, WARMUP_STEPS=0, TRAIN_BATCH_SIZE=4,
        FP16_OPT_LEVEL="O3", PRETRAINED_DIR="cats.npz", **SITE,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    return run


def write_cifar_archive(directory: Path) -> Path:
    """A CIFAR-10 archive of five training images and one test image; the path of a file with its md5 sums."""
    from torchvision.datasets import CIFAR10

    folder = directory / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": np.arange(3072, dtype=np.uint8).reshape(1, 3072), "labels": [3]}
    sums = {
        "train_list": [write(name, batch) for name, _ in CIFAR10.train_list],
        "test_list": [write(name, batch) for name, _ in CIFAR10.test_list],
        "meta": CIFAR10.meta | {"md5": write("batches.meta", {"label_names": [f"thing-{i}" for i in range(10)]})[1]},
    }
    archive = directory / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    sums["tgz_md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    (directory / "sums.json").write_text(json.dumps(sums))
    return directory / "sums.json"


def test_dataset_cifar10_is_sharded_by_itself(cifar10, place):
    assert cifar10.resolved["vitds"]["data"]["path"] == str(place / "data/cifar10")
    assert "train: 5 images" in cifar10.output and cifar10.resolved["vitds"]["num_classes"] == 10


def test_without_batch_variables_the_recipe_decides(cifar10):
    assert cifar10.resolved["train_batch_size"] == 512
    assert cifar10.resolved["train_micro_batch_size_per_gpu"] == 64


def test_dataset_imagenet_is_the_folder_of_data_dir(imagenet, place):
    assert imagenet.resolved["vitds"]["data"]["path"] == "data/imagenet" and (place / "data/imagenet").is_dir()
    assert json.loads((imagenet.directory / "classes.json").read_text()) == ["cat", "dog"]


def test_a_pretrained_dir_that_is_missing_is_said_before_anything_is_downloaded(tmp_path):
    run = run_script("train.sh", tmp_path, cwd=tmp_path, PRETRAINED_DIR="nowhere.npz", MODEL_TYPE="ViT-L_16")
    assert run.exit_code == 4 and "PRETRAINED_DIR=nowhere.npz: no such file or directory" in run.output
    assert "fetch_weights.py ViT-L_16" in run.output and not (tmp_path / "data").exists()


def test_pretrained_dir_is_a_file(imagenet):
    assert imagenet.resolved["vitds"]["pretrained"] == "cats.npz"
    assert abs(imagenet.lines("train")[0]["loss"] - math.log(2)) > 0.01


def test_fp16_opt_level_o2_scales_the_loss_dynamically(cifar10):
    assert cifar10.resolved["fp16"]["loss_scale"] == 0
    assert cifar10.lines("train")[0]["loss_scale"] == 2**20


def test_fp16_opt_level_o3_fixes_the_loss_scale_and_says_why_its_masters_are_fp32(imagenet):
    assert [line["loss_scale"] for line in imagenet.lines("train")] == [1]
    assert "fp16_master_weights_and_grads" not in imagenet.resolved["fp16"]
    assert '"fp16.fp16_master_weights_and_grads" has no effect, the masters stay fp32' in imagenet.output


@pytest.mark.parametrize(
    "level, flags, said",
    [
        ("O0", ["--set", "train_micro_batch_size_per_gpu=7"], "ds_configs/cifar10_vit_b16_fp32.json:2"),
        ("O1", ["--set", "zero_optimization.stage=0"], "torch_autocast in float16 at ZeRO stage 0"),
    ],
)
def test_fp16_opt_level_chooses_the_configuration(digits, tmp_path, level, flags, said):
    """What does not fit it is refused in its name."""
    run = run_script("train_fp16.sh", tmp_path, *flags, DATASET=digits, FP16_OPT_LEVEL=level)
    assert run.exit_code == 2 and said in run.output, run.output


def test_dataset_cifar100_that_is_sharded_already(tmp_path):
    write_dataset(tmp_path / "data/cifar100", classes=("fish", "bear"))
    run = run_script("train.sh", tmp_path, "--num-classes", "1", DATASET="cifar100", DATA_ROOT=tmp_path / "data")
    assert run.exit_code == 3 and f"{tmp_path}/data/cifar100" in run.output and "2 classes" in run.output, run.output


@pytest.mark.parametrize(
    "script, variables, said",
    [
        ("train.sh", {"DATASET": "imagenet"}, "DATASET=imagenet needs DATA_DIR"),
        ("train.sh", {"GPUS": "0-2"}, "GPUS=0-2: write numbers, such as 0,2"),
        ("train.sh", {"GPUS": "0,99", "LOCAL_SIZE": 3}, "GPUS=0,99: there is no GPU 99: DeepSpeed counts"),
        ("train_fp16.sh", {"FP16_OPT_LEVEL": "O4"}, "write O0, O1, O2 or O3"),
    ],
)
def test_what_the_scripts_refuse_themselves(tmp_path, script, variables, said):
    run = run_script(script, tmp_path, **variables)
    assert run.exit_code == 2 and said in run.output, run.output
