"""tools/npz_to_ds.py: a Google file becomes a directory that vitds and plain DeepSpeed load."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import ROOT, last_json, run_ranks
from weights.reference import gen_npz

import vitds
from vitds.model.registry import get_spec, num_parameters
from vitds.weights_header import read_header

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    return path


def convert(*arguments):
    command = [sys.executable, "tools/npz_to_ds.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_directory_has_the_shape_of_a_runs_checkpoints(file, tmp_path):
    out_dir = tmp_path / "deep" / "tiny"
    done = convert(file, out_dir)
    assert done.returncode == 0, done.stderr
    for found in (
        TINY,
        "48 px",
        "10, head kept",
        f"{num_parameters(get_spec(TINY), 48, 10):,}",
        f"--pretrained {out_dir}",
    ):
        assert found in done.stdout
    assert sorted(path.name for path in out_dir.iterdir()) == ["global_step0", "latest"]
    assert (out_dir / "latest").read_text().strip() == "global_step0"
    from_file, from_directory = (vitds.create_model("auto", weights=path) for path in (file, out_dir))
    for name, tensor in from_file.state_dict().items():
        assert torch.equal(tensor, from_directory.state_dict()[name])


@pytest.mark.ranks
def test_plain_deepspeed_loads_it_module_only_at_stages_0_to_2(file, tmp_path):
    assert convert(file, tmp_path / "tiny").returncode == 0
    torch.save(vitds.create_model("auto", weights=file).state_dict(), tmp_path / "expected.pt")
    command = ["tests/workers/plain_deepspeed_load.py", str(tmp_path / "tiny"), TINY, "48", "10"]
    output = run_ranks([*command, str(tmp_path / "expected.pt")], 1)[0]
    assert last_json(output) == {"0": True, "1": True, "2": True}


def test_size_and_classes_change_when_asked_for(file, tmp_path):
    done = convert(file, tmp_path / "tiny", "--model", TINY, "--num-classes", 7, "--image-size", "64x48")
    assert done.returncode == 0, done.stderr
    header = read_header(tmp_path / "tiny")
    assert (header.image_size, header.num_classes, header.pre_logits) == ((64, 48), 7, None)
    assert "head new, zero (the file has 10)" in done.stdout
    assert "resized from 48" in done.stdout


def test_preprocessing_that_the_file_lacks_is_stated_and_recorded(file, tmp_path):
    assert read_header(file).data is None
    stated = ["--set", "data.mean=[0.485,0.456,0.406]", "--set", "data.eval_crop=center"]
    assert convert(file, tmp_path / "tiny", *stated).returncode == 0
    assert read_header(tmp_path / "tiny").data == {
        "mean": [0.485, 0.456, 0.406],
        "std": 0.5,
        "eval_crop": "center",
    }


def test_what_is_wrong_is_said_before_anything_is_written(file, tmp_path):
    out_dir = tmp_path / "out"
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "page").write_text("<!DOCTYPE html><title>404</title>")
    for code, message, arguments in [
        (4, "does not exist", [tmp_path / "none.npz", out_dir]),
        (4, "a pointer of Git LFS", [tmp_path / "pointer", out_dir]),
        (4, "a web page", [tmp_path / "page", out_dir]),
        (4, f"--model auto, {TINY} is taken", [file, out_dir, "--model", "ViT-B_16"]),
        (4, "not ViT-B_16", [file, out_dir, "--model", "ViT-B_16"]),
        (2, 'did you mean "ViT-B_16"', [file, out_dir, "--model", "ViT-B16"]),
        (2, "not divisible", [file, out_dir, "--image-size", 50]),
        (2, "less than 1", [file, out_dir, "--num-classes", 0]),
        (2, "exists and is not empty", [file, Path(file).parent]),
        (2, 'did you mean "--num-classes"', [file, out_dir, "--num_class", 3]),
        (2, 'did you mean "data.mean"', [file, out_dir, "--set", "data.maen=0.5"]),
        (2, '"data.std" must be above 0', [file, out_dir, "--set", "data.std=0"]),
    ]:
        done = convert(*arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not out_dir.exists()
