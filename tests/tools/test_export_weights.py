"""tools/export_weights.py: from every kind of checkpoint, in little memory, whole or not at all."""

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from rank_processes import ROOT

from vitds.manifest import Manifest, hash_file, write_manifest
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.weights.ds_file import model_states

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"
SUFFIXES = {"safetensors": ".safetensors", "timm": "", "hf": "", "npz": ".npz"}
INFO = {
    "model": TINY, "image_size": [32, 32], "num_classes": 3, "pre_logits": None, "classes": ["cat", "dog", "тигр"],
    "mean": 0.4, "std": 0.25, "config": {"vitds": {"data": {"eval_crop": "center", "crop_fraction": 0.9}}},
}  # fmt: skip
# The tool as it is, and what it took.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("PEAK_KB", peak, *({"torch", "deepspeed"} & sys.modules.keys()), file=sys.stderr)
"""


def export(*arguments, file_limit=None):
    def limit():
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-c", RUN, "tools/export_weights.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)


def peak_of(done):
    """Bytes, and what was imported, of a run that went well."""
    assert done.returncode == 0, done.stderr
    peak, imported = re.search(r"PEAK_KB (\d+)(.*)", done.stderr).groups()
    return 1024 * int(peak), imported.split()


def write_checkpoint(directory, state, stage, world_size, info):
    """A checkpoint as DeepSpeed lays it out; tests/weights/test_zero.py reads DeepSpeed's own."""
    directory.mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    states = model_states(state, info) | {"param_shapes": [shapes], "dp_world_size": world_size}
    if stage == 3:
        states["module"] = {}
        parts = {name: math.ceil(tensor.numel() / world_size) for name, tensor in state.items()}
        padded = {
            name: torch.nn.functional.pad(tensor.reshape(-1), (0, parts[name] * world_size - tensor.numel()))
            for name, tensor in state.items()
        }
    else:
        flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % world_size))
        states["module"] = {name: tensor.bfloat16() if stage else tensor for name, tensor in state.items()}
    for rank in range(world_size if stage else 0):
        if stage == 3:
            mine = [padded[name][rank * part : (rank + 1) * part] for name, part in parts.items()]
            middle = len(mine) // 2
            shard = {"fp32_flat_groups": [torch.cat(mine[:middle]), torch.cat(mine[middle:])]}
            torch.save(states, directory / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:
            shard = {"single_partition_of_fp32_groups": [flat.chunk(world_size)[rank].clone()]}
        shard |= {"partition_count": world_size}
        shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] = {"state": {}}
        content = {"optimizer_state_dict": shard}
        torch.save(content, directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if stage < 3:
        torch.save(states, directory / "mp_rank_00_model_states.pt")
    write_manifest(directory, Manifest({path.name: hash_file(path) for path in directory.glob("*.pt")}, info))


def state_of(name, image_size, num_classes):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(name), (image_size, image_size), num_classes)
    return {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def tiny():
    return state_of(TINY, 32, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A run directory with two checkpoints, the newest of stage 3 on two ranks."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    write_checkpoint(directory / "checkpoints/global_step1", tiny, 0, 1, INFO)
    write_checkpoint(directory / "checkpoints/global_step2", tiny, 3, 2, INFO)
    (directory / "checkpoints/latest").write_text("global_step2")
    return directory


@pytest.mark.parametrize(
    ("stage", "world_size"), [(0, 1), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
)
def test_any_stage_and_world_size(stage, world_size, tiny, tmp_path):
    write_checkpoint(tmp_path / "global_step7", tiny, stage, world_size, INFO)
    done = export(tmp_path / "global_step7", tmp_path / "out.safetensors", "--format", "safetensors")
    _, imported = peak_of(done)
    assert imported == [], "neither torch nor deepspeed"
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == tiny.keys()
    assert all(np.array_equal(found[name], tiny[name].numpy()) for name in tiny)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/global_step1", "checkpoints/global_step2"])
def test_a_run_its_checkpoints_or_one_of_them(place, run, tmp_path):
    done = export(run / place, tmp_path / "out", "--format", "timm")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["label_names"] == INFO["classes"]
    expected = {"mean": [0.4] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "crop_mode": "center"}
    assert config["pretrained_cfg"] | expected == config["pretrained_cfg"]
    for line in (
        f'timm.create_model("local-dir:{tmp_path}/out", pretrained=True)',
        f'transformers.AutoModelForImageClassification.from_pretrained("{tmp_path}/out")',
        'GELU is the tanh approximation: act_layer "gelu_tanh" in config.json',
        "timm readers resize positions otherwise (bicubic, these weights are bilinear)",
    ):
        assert line in done.stdout


@pytest.mark.parametrize("target", SUFFIXES)
def test_memory_is_that_of_a_few_arrays(target, run, tmp_path):
    peak, _ = peak_of(export(run, tmp_path / f"out{SUFFIXES[target]}", "--format", target))
    assert peak < 120e6, "without weights to speak of: far below the 300 MB that are promised"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (2, 2), (3, 3)])
def test_memory_does_not_grow_with_the_model(stage, world_size, tmp_path):
    state = state_of("ViT-B_16", 224, 1000)
    info = INFO | {"model": "ViT-B_16", "image_size": [224, 224], "num_classes": 1000, "classes": None}
    write_checkpoint(tmp_path / "global_step1", state, stage, world_size, info)
    weights_bytes = 4 * sum(tensor.numel() for tensor in state.values())
    for target, suffix in SUFFIXES.items():
        peak, _ = peak_of(export(tmp_path / "global_step1", tmp_path / f"{target}{suffix}", "--format", target))
        assert peak < 150e6 < 1.3 * weights_bytes + 300e6, target


@pytest.mark.slow
@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_programs_cost_what_their_libraries_do(target, suffix, tmp_path):
    pytest.importorskip("onnxscript")
    info = INFO | {"num_classes": 1000, "classes": None, "image_size": [224, 224]}
    peaks = []
    for name in ("ViT-Ti_16", "ViT-B_16", "ViT-L_16"):
        state = state_of(name, 224, 1000)
        write_checkpoint(tmp_path / name / "global_step1", state, 3, 2, info | {"model": name})
        out = tmp_path / f"{name}{suffix}"
        peaks.append(peak_of(export(tmp_path / name / "global_step1", out, "--format", target))[0])
    assert peaks[1] < peaks[0] + 100e6, "80 million parameters more, 324 MB"
    assert peaks[2] < 1.3 * 4 * sum(tensor.numel() for tensor in state.values()) + 300e6, "in smaller ones it is torch"


@pytest.mark.parametrize("target", SUFFIXES)
def test_a_full_disk_leaves_nothing(target, run, tmp_path):
    done = export(run, tmp_path / "deep" / f"out{SUFFIXES[target]}", "--format", target, file_limit=50_000)
    assert done.returncode == 4, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "nothing was left behind" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nor the directory that was made for it"


def test_what_is_wrong_is_said_before_anything_is_written(run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    for code, message, arguments in [
        (4, "does not exist", [tmp_path / "none", out, "--format", "timm"]),
        (2, 'did you mean "torch-export"', [run, out, "--format", "torch_export"]),
        (2, "required: --format", [run, out]),
        (2, "exists", [run, tmp_path / "there", "--format", "hf"]),
        (2, "name it out.npz", [run, out, "--format", "npz"]),
        (2, "not divisible", [run, out, "--format", "hf", "--image-size", 33]),
        (2, "neither S nor HxW", [run, out, "--format", "hf", "--image-size", "32,32"]),
        (4, "not ViT-B_16", [run, out, "--format", "hf", "--model", "ViT-B_16"]),
    ]:
        done = export(*arguments)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_help_needs_no_torch():
    done = export("--help")
    assert peak_of(done)[1] == []
    assert "--format" in done.stdout
    assert Path(ROOT / "tools/export_weights.py").read_text().count("import torch") == 0
