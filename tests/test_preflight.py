"""Plans, and every mistake that is answered before torch: what is said, with which exit code, in which order."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_dataset import write_config, write_dataset

from vitds import preflight
from vitds.ds_config import Batch, SchedulePlan
from vitds.errors import CheckpointError, ConfigError, DataError, VitdsError, WeightError
from vitds.layouts.google import google_layout
from vitds.layouts.own import parameters
from vitds.manifest import Manifest, write_manifest
from vitds.memory_plan import USABLE, plan_memory
from vitds.model.registry import get_spec
from vitds.preflight import plan_run
from vitds.world import World

ROOT = Path(__file__).resolve().parent.parent
TINY = "custom:width=16,depth=2,heads=2,mlp=32,patch=4"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with data/ and my.json in it, where the test then is."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data")
    write_config(tmp_path / "my.json")
    return tmp_path


def plan(*argv, environ=None):
    return plan_run(["--deepspeed_config", "my.json", "--data", "data", *argv], environ or {})


def write_npz(path, **changes):
    """Weights of TINY with 3 classes at 16 px in Google's layout; `changes` adds, reshapes or (None) removes arrays."""
    arrays = {array.key: np.zeros(array.shape, np.float32) for array in google_layout(get_spec(TINY), 17, 3, None)}
    arrays |= {key.replace("__", "/"): value for key, value in changes.items()}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def test_a_plan_is_explicit(here):
    made = plan("--num_steps=40", "--set", "data.mixup_alpha=0.2", environ={"WORLD_SIZE": "2", "RANK": "1"})
    assert made.batch == Batch(8, 4, 1, 2)
    assert made.world == World(1, 0, 2, 2)
    assert made.schedule == SchedulePlan("cosine", 0, 40)
    assert made.run.image_size == (224, 224) and made.run.num_classes == 2 and made.run.num_steps == 40
    assert isinstance(made.run.workers, int) and made.run.activation_checkpointing == "none"
    assert made.run_dir == Path("runs/ViT-Ti_16-data")
    assert (made.num_train, made.num_val, made.classes) == (10, 4, ["cat", "dog"])
    assert (made.dtype, made.zero_stage, made.activation_checkpointing, made.checkpoint_on_cpu) == (
        "fp32",
        0,
        "none",
        False,
    )
    assert made.warnings == []


def test_a_plan_says_where_every_value_comes_from(here):
    sources = plan("--seed", "1").sources
    expected = {
        "vitds.seed": "flag --seed",
        "vitds.num_steps": "my.json:5",
        "train_batch_size": "my.json:2",
        "train_micro_batch_size_per_gpu": "derived",
        "vitds.num_classes": "data",
        "vitds.name": "derived",
        "vitds.log_every": "default",
        "optimizer.params.lr": "default",
    }
    assert {key: sources[key] for key in expected} == expected


def test_the_resolved_plan_is_a_configuration_that_gives_the_same_plan(here):
    write_config(
        here / "my.json",
        bf16={"enabled": True},
        zero_optimization={"stage": 2, "reduce_bucket_size": "auto"},
        optimizer={"type": "AdamW", "params": {"lr": 1e-3}},
        scheduler={"type": "linear", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}},
        activation_checkpointing={"cpu_checkpointing": True},
    )
    first = plan("--epochs", "3", "--name", "again")
    assert first.activation_checkpointing == "full" and first.checkpoint_on_cpu
    (here / "again.json").write_text(json.dumps(first.resolved()))
    second = plan_run(["--deepspeed_config", "again.json"], {})
    for name in ("run", "ds", "optimizer", "schedule", "batch", "activation_checkpointing", "checkpoint_on_cpu"):
        assert getattr(second, name) == getattr(first, name), name


def test_selective_recomputation_inside_of_compiled_blocks_cannot_move_anything_to_the_cpu(here):
    write_config(here / "my.json", vitds={"compile": True}, activation_checkpointing={"cpu_checkpointing": True})
    assert plan("--epochs", "3").checkpoint_on_cpu
    with pytest.raises(ConfigError, match="nothing can be moved to the CPU") as error:
        plan("--epochs", "3", "--activation-checkpointing", "selective")
    assert "my.json" in str(error.value) and "--compile false" in error.value.fix


@pytest.mark.parametrize(
    ("precision", "model", "said"),
    [
        ({}, "ViT-Ti_16", "fp8 is for runs in bf16, and this one is in fp32"),
        ({"fp16": {"enabled": True}}, "ViT-Ti_16", "this one is in fp16"),
        ({"bf16": {"enabled": True}}, "custom:width=24,depth=1,heads=2,mlp=64,patch=16", "multiples of 16"),
        ({"bf16": {"enabled": True}}, "custom:width=32,depth=1,heads=2,mlp=72,patch=16", "width 32 and mlp 72"),
        ({"bf16": {"enabled": True}}, "ViT-Ti_16", None),
    ],
)
def test_8_bits_are_for_bf16_and_multiples_of_16(precision, model, said, here):
    write_config(here / "my.json", vitds={"fp8": True, "model": model}, zero_optimization={"stage": 1}, **precision)
    if said is None:
        assert plan("--epochs", "3").run.fp8
        return
    with pytest.raises(ConfigError, match=said) as error:
        plan("--epochs", "3")
    assert "my.json" in str(error.value) and "--set fp8=false" in error.value.fix
    assert not plan("--epochs", "3", "--set", "fp8=false").run.fp8


def test_the_length_of_a_run(here):
    assert plan("--epochs", "2").run.num_steps == 3  # 20 samples in batches of 8
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 30, "warmup_num_steps": 3}}
    write_config(here / "my.json", vitds={"model": "ViT-Ti_16"}, scheduler=scheduler)
    made = plan()
    assert made.run.num_steps == 30 and made.schedule is None and "scheduler" in made.ds
    assert any("two steps at its lowest rate" in warning for warning in made.warnings)
    assert plan("--num-steps", "5").run.num_steps == 5
    write_config(here / "my.json", vitds={"model": "ViT-Ti_16"})
    with pytest.raises(ConfigError, match="length of the run is not given"):
        plan()
    with pytest.raises(ConfigError, match="after the last of 3 steps"):
        plan("--epochs", "2", "--stop-at-step", "4")
    assert plan("--epochs", "2", "--stop-at-step", "3").run.stop_at_step == 3


def test_a_run_that_goes_on_with_other_ranks_keeps_its_global_batch(here):
    """24 images a step of 2 ranks with 6 a micro-batch, however the file says so."""
    checkpoint = here / "runs/moved/checkpoints/global_step5"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("global_step5")
    sizes = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2}
    write_manifest(checkpoint, Manifest({}, {"world_size": 2, "config": sizes}))

    def batch(world_size, *argv, name="moved"):
        environ = {"WORLD_SIZE": str(world_size), "RANK": "0"}
        made = plan("--num-steps", "9", "--name", name, *argv, environ=environ).batch
        return made.global_batch, made.micro_batch, made.accumulation_steps

    for keys in ({"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2}, sizes):
        write_config(here / "my.json", **({"train_batch_size": None} | keys))
        found = {ranks: batch(ranks) for ranks in (1, 2, 3, 4, 8)}
        assert found == {1: (24, 6, 4), 2: (24, 6, 2), 3: (24, 4, 2), 4: (24, 6, 1), 8: (24, 3, 1)}
        with pytest.raises(ConfigError, match="5 ranks cannot share the run's global batch of 24") as refused:
            batch(5)
        assert "go on with 1 2 3 4 6 8 12 24 ranks" in refused.value.fix
    assert batch(8, "--set", "data.mixup_alpha=0.2", "--train-batch-size", "48", "--micro-batch-size", "2") == (
        48,
        2,
        3,
    )
    assert batch(4, "--set", "data.mixup_alpha=0.2") == (24, 6, 1)
    assert batch(3, "--set", "data.mixup_alpha=0.2") == (24, 4, 2)
    with pytest.raises(ConfigError, match="do not multiply out on 3 ranks"):
        batch(3, name="new")
    (checkpoint / "MANIFEST.json").write_text("{")
    with pytest.raises(ConfigError, match="do not multiply out on 3 ranks"):
        batch(3)


def test_a_stock_deepspeed_file_needs_no_vitds_section(here):
    (here / "my.json").write_text("""{
      "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
      "fp16": {"enabled": true, "loss_scale": 0}, "zero_optimization": {"stage": 2},
      "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}},
      "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 4}}}""")
    made = plan(environ={"WORLD_SIZE": "2", "RANK": "0"})
    assert (made.spec.name, made.dtype, made.run.num_steps, made.batch) == ("ViT-B_16", "fp16", 20, Batch(8, 2, 2, 2))
    assert made.ds["scheduler"]["params"] == {"total_num_steps": 20, "warmup_num_steps": 4}
    assert made.optimizer.params["lr"] == 3e-4


def test_activation_checkpointing_is_one_switch(here):
    assert plan("--activation-checkpointing", "3").activation_checkpointing == 3
    assert plan("--activation_checkpointing=selective").activation_checkpointing == "selective"
    write_config(here / "my.json", activation_checkpointing={"partition_activations": True})
    assert plan().activation_checkpointing == "full"
    assert "activation_checkpointing" not in plan().ds
    assert any("partition_activations" in warning for warning in plan().warnings)
    assert plan("--activation-checkpointing", "none").activation_checkpointing == "none"


def test_auto_recomputes_the_least_that_fits_the_gpu(here, monkeypatch):
    flags = ("--model", "ViT-H_14", "--image-size", "518", "--activation-checkpointing", "auto")
    assert plan(*flags).activation_checkpointing == "none", "no GPU"
    peaks = {}
    for mode in ("none", "selective", "full"):
        known = plan(*flags[:-1], mode)
        peaks[mode] = plan_memory(dataclasses.replace(known.memory, on_gpu=True)).peak
    for mode, peak in peaks.items():
        monkeypatch.setattr(preflight, "smallest_gpu_memory_bytes", lambda peak=peak: int(peak / USABLE) + 1)
        made = plan(*flags)
        assert made.activation_checkpointing == made.run.activation_checkpointing == mode


def test_the_memory_plan_knows_the_run(here):
    write_config(
        here / "my.json",
        bf16={"enabled": True},
        zero_optimization={"stage": 2, "reduce_bucket_size": 1000},
        optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        vitds={"model": "ViT-Ti_16", "num_steps": 5, "ema_decay": 0.9, "train": "last-2", "dropout": 0.1},
    )
    memory = plan(environ={"WORLD_SIZE": "2", "RANK": "1"}).memory
    assert (memory.dtype, memory.accumulation_dtype, memory.zero_stage, memory.world_size) == ("bf16", "fp32", 2, 2)
    assert (memory.optimizer_states, memory.reduce_bucket, memory.train, memory.dropout) == (2, 1000, "last-2", 0.1)
    assert memory.micro_batch == 4 and not memory.on_gpu


def test_what_the_weights_say_holds_where_nothing_else_is_said(here):
    write_config(here / "my.json", vitds={"num_steps": 5})
    write_npz(here / "tiny.npz")
    made = plan("--pretrained", "tiny.npz", "--model", TINY)
    assert made.run.image_size == (16, 16) and made.sources["vitds.image_size"] == "weights"
    assert made.run.num_classes == 2  # the data's, not the file's 3
    assert plan("--pretrained", "tiny.npz", "--model", TINY, "--image-size", "32x24").run.image_size == (32, 24)


def write_timm_directory(path, mean, std, interpolation):
    """Weights of TINY with 3 classes at 16 px as timm saves a model."""
    renamed = {
        name.replace("patch_embed.", "patch_embed.proj."): np.zeros(shape, np.float32)
        for name, shape in parameters(get_spec(TINY), 17, 3).items()
    }
    path.mkdir()
    save_file(renamed, path / "model.safetensors")
    evaluated = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": 0.9}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 2}, "pretrained_cfg": evaluated}
    (path / "config.json").write_text(json.dumps(config))


def test_weights_that_know_other_images_are_warned_about(here):
    write_timm_directory(here / "timm", [0.485, 0.456, 0.406], [0.5] * 3, "bilinear")
    made = plan("--pretrained", "timm", "--model", TINY)
    assert made.run.model == f"{TINY},gelu=erf,resize=bicubic"  # confirmed, and the weights' conventions kept
    (warning,) = [line for line in made.warnings if line.startswith("timm ")]
    assert "was evaluated with mean [0.485,0.456,0.406], this run has mean 0.5" in warning
    flag = warning.partition("--set '")[2].removesuffix("'")
    assert flag == "data.mean=[0.485,0.456,0.406]"
    assert plan("--pretrained", "timm", "--model", TINY, "--set", flag).warnings == []


def test_notes_of_the_weights_are_warnings(here):
    write_timm_directory(here / "timm", [0.5] * 3, [0.5] * 3, "bilinear")
    assert plan("--pretrained", "timm", "--model", "auto").warnings == []
    bare = shutil.move(here / "timm" / "model.safetensors", here / "w.safetensors")
    assert any(
        "states no preprocessing" in warning for warning in plan("--pretrained", str(bare), "--model", TINY).warnings
    )
    with pytest.raises(WeightError, match="not ViT-B_16"):
        plan("--pretrained", str(bare), "--model", "ViT-B_16")


def test_images_have_three_channels(here):
    with pytest.raises(ConfigError, match="images have 3 channels, and the model takes 1"):
        plan("--model", f"{TINY},channels=1", "--image-size", "16")


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixup_needs_an_even_micro_batch(here, name):
    mixup = ("--set", f"data.{name}_alpha=0.2", "--train-batch-size", "6")
    with pytest.raises(ConfigError, match=r"pairs, and the micro-batch is odd \(3\)") as error:
        plan(*mixup, environ={"WORLD_SIZE": "2", "RANK": "0"})
    assert error.value.where == f"--set data.{name}_alpha" and error.value.what.startswith(name)
    assert plan(*mixup).batch.micro_batch == 6


def test_mixed_targets_of_ones_need_the_binary_loss(here):
    ones = ("--set", "data.mixup_alpha=0.8", "--set", "data.mixed_targets=ones")
    with pytest.raises(ConfigError, match="softmax takes shares"):
        plan(*ones)
    assert plan(*ones, "--loss", "bce").run.data.mixed_targets == "ones"


def test_images_of_any_number_of_classes_need_a_loss_that_takes_them(here):
    write_dataset(here / "data", train=(5, 9), val=(2, 4), multi_label=True)
    with pytest.raises(ConfigError, match="any number of classes") as caught:
        plan()
    assert "--loss bce" in str(caught.value)
    found = plan("--loss", "bce", "--epochs", "2", "--num-classes", "3")
    assert (found.num_train, found.num_val, found.num_steps) == (9, 4, 3)


def test_class_weights_are_resolved_to_numbers(here):
    write_dataset(here / "data", train=(6, 2))
    assert plan().run.class_weights is None
    found = plan("--class-weights", "auto", "--num-classes", "3")
    assert found.run.class_weights == (8 / 12, 2.0, 1.0)
    assert found.sources["vitds.class_weights"] == "flag --class-weights"
    (here / "weights.json").write_text('{"dog": 4}')
    assert plan("--class-weights", "weights.json").run.class_weights == (1.0, 4.0)
    (here / "weights.json").write_text("[1]")
    with pytest.raises(ConfigError, match="1 class weights, and the head has 2 outputs"):
        plan("--class-weights", "weights.json")
    write_config(here / "again.json", vitds={"model": "ViT-Ti_16", "num_steps": 1, "class_weights": [1, 4]})
    assert plan_run(["--deepspeed_config", "again.json", "--data", "data"], {}).run.class_weights == (1.0, 4.0)
    assert any("weighs again" in line for line in plan("--class-weights", "auto", "--sampling", "balanced").warnings)


BAD_ORDER = {
    "repeats": (["--set", "data.repeats=3"], "global batch of 8 cannot hold each image 3 times", "1 2 4 8"),
    "window": (["--sampling", "balanced", "--set", "data.shuffle_window=4"], "balanced sampling draws from all", "0"),
    "weights": (["--set", "data.weights=[1,2]"], "2 weights for 1 directory: data", "a weight for each"),
    "few weights": (["--data", "data,more", "--set", "data.weights=[1]"], "1 weights for 2 directories", "--data"),
    "small": (["--data", "data,more", "--set", "data.weights=[1,0.00001]"], "more has a share of 1e-05", "leave"),
    "comma": (["--data", "data,"], "a directory without a name", "DIR,DIR"),
}


@pytest.mark.parametrize("case", BAD_ORDER)
def test_samples_that_cannot_be_drawn_so(here, case):
    write_dataset(here / "more")
    argv, what, fix = BAD_ORDER[case]
    with pytest.raises(ConfigError) as error:
        plan(*argv)
    assert what in error.value.what and fix in error.value.fix and error.value.where.startswith("--"), error.value


def test_balanced_sampling_needs_one_class_a_sample(here):
    write_dataset(here / "data", train=(5, 9), val=(2, 4), multi_label=True)
    with pytest.raises(ConfigError, match="any number of them") as error:
        plan("--sampling", "balanced", "--loss", "bce")
    assert error.value.where == "--sampling"


def test_a_mixture_is_one_data_set(here):
    write_dataset(here / "more", ("owl", "eel", "fox"), (3, 3, 3), (1, 1, 1))
    made = plan("--data", "data,more", "--set", "data.weights=[3,1]", "--epochs", "2")
    assert made.classes == ["cat", "dog", "owl", "eel", "fox"] and made.num_classes == 5
    assert (made.num_train, made.num_val, made.num_steps) == (19, 7, 5)
    assert made.run_dir == Path("runs/ViT-Ti_16-data+more") and made.run.data.shuffle_window == 0
    assert any("more shares 0 of its 3 classes" in warning for warning in made.warnings)
    with pytest.raises(DataError, match="no such data directory"):
        plan("--data", "data,mare")


def test_a_class_that_validation_lacks_is_a_warning_by_name(here):
    write_dataset(here / "data", ("cat", "dog", "eel"), (3, 3, 3), (2, 0, 2))
    assert any("validation has no image of dog" in warning for warning in plan().warnings)
    write_dataset(here / "data", val=None)
    assert plan().num_val == 0


BAD_DATA = {
    "missing": (["--data", "dota"], "no such data directory", "data"),
    "empty training split": (["--data", "empty"], "the training split is empty", "shard_imagenet"),
    "no training split": (["--data", "only_val"], "the training split is missing", "--split train"),
    "no data set": (["--data", "folder"], "is no dataset directory", "shard_imagenet"),
    "damaged": (["--data", "damaged"], "cannot be read", ""),
    "counts": (["--data", "counts"], "do not fit together", ""),
    "head": (["--num-classes", "1"], "2 classes and the head 1 outputs", "--num-classes 2"),
    "untrained class": (["--data", "untrained"], "1 class that training lacks: dog", ""),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(here, case):
    write_dataset(here / "empty", train=(0, 0))
    write_dataset(here / "untrained", train=(5, 0))
    write_dataset(here / "counts", train=(5, 0, 3))
    write_dataset(here / "only_val", train=())
    info = json.loads((here / "only_val/_info.json").read_text())
    del info["splits"]["train"]
    (here / "only_val/_info.json").write_text(json.dumps(info))
    (here / "folder/train/cat").mkdir(parents=True)
    write_dataset(here / "damaged").joinpath("_info.json").write_text("{")
    argv, what, fix = BAD_DATA[case]
    with pytest.raises(DataError) as error:
        plan(*argv)
    assert error.value.exit_code == 3
    assert what in str(error.value) and fix in error.value.fix


class Trap:
    """An object whose unpickling leaves a file behind, which the test below would find."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_resume_from_nothing(here):
    (here / "nothing").mkdir()
    (here / "pictures").mkdir()
    (here / "pictures/cat.png").touch()
    for path, what in (
        ("nothing", "nothing is empty"),
        ("missing", "data, my.json"),
        ("pictures", "pictures holds: cat.png"),
    ):
        with pytest.raises(CheckpointError) as error:
            plan("--resume", path)
        assert error.value.exit_code == 4 and what in str(error.value)
    (here / "run/checkpoints/global_step5").mkdir(parents=True)
    assert plan("--resume", "run").run.resume == "run"
    assert plan("--resume", "run/checkpoints").run.resume == "run/checkpoints"


def test_a_run_directory_that_cannot_be_written(here):
    (here / "runs").write_text("a file")
    with pytest.raises(CheckpointError, match="runs is no directory"):
        plan()


def test_mistakes_are_named_in_the_order_flags_json_model_data(here):
    """One mistake of every kind at once; mending them one by one brings up the next."""
    write_config(here / "my.json", train_bach_size=8, vitds={"model": "ViT-B16", "num_steps": 3})
    steps = (
        (["--num-step", "3", "--data", "nowhere", "--resume", "nothing"], "unknown flag"),
        (["--data", "nowhere", "--resume", "nothing"], "train_bach_size"),
    )
    for argv, message in steps:
        with pytest.raises(VitdsError, match=message):
            plan(*argv)
    write_config(here / "my.json", vitds={"model": "ViT-B16", "num_steps": 3})
    with pytest.raises(VitdsError, match='unknown model "ViT-B16"'):
        plan("--data", "nowhere", "--resume", "nothing")
    with pytest.raises(VitdsError, match="no such data directory"):
        plan("--data", "nowhere", "--resume", "nothing", "--model", "ViT-B_16")
    with pytest.raises(VitdsError, match="nothing to resume from"):
        plan("--resume", "nothing", "--model", "ViT-B_16")


def launch(*argv, rank="0"):
    """Run launch/train.py as a user does, and report whether torch was imported on the way."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"RANK": rank}
    command = [sys.executable, "-c", code, str(ROOT / "launch/train.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)


GOOD = ("--deepspeed_config", "my.json", "--data", "data")
FROM_THE_SHELL = {
    "flag misspelt": ((*GOOD, "--num-stepps", "3"), 2, 'did you mean "--num-steps"?'),
    "flag abbreviated": ((*GOOD, "--num", "3"), 2, "unknown flag --num"),
    "no configuration file": (("--data", "data"), 2, "--deepspeed_config is missing"),
    "configuration file missing": (("--deepspeed_config", "my.jsn", "--data", "data"), 2, "my.json"),
    "top-level key misspelt": (
        ("--deepspeed_config", "top.json", "--data", "data"),
        2,
        'top.json:7  unknown key "gradient_acumulation_steps"\n  did you mean "gradient_accumulation_steps"?',
    ),
    "nested key misspelt": (("--deepspeed_config", "nested.json", "--data", "data"), 2, 'did you mean "overlap_comm"?'),
    "batch sizes": ((*GOOD, "--micro-batch-size", "3"), 2, "--train-batch-size 8 --micro-batch-size 8"),
    "zero steps": ((*GOOD, "--num-steps", "0"), 2, "must be at least 1, not 0"),
    "model misspelt": ((*GOOD, "--model", "ViT-B16"), 2, 'did you mean "ViT-B_16"?'),
    "image size": ((*GOOD, "--image-size", "230"), 2, "224 or 240"),
    "no --data": (("--deepspeed_config", "my.json"), 2, "--data is missing"),
    "wrong data path": (("--deepspeed_config", "my.json", "--data", "dota"), 3, "no such data directory"),
    "head too small": ((*GOOD, "--num-classes", "1"), 3, "--num-classes 2"),
    "resume from an empty directory": ((*GOOD, "--resume", "nothing"), 4, "nothing is empty"),
    "empty training split": ((*GOOD, "--data", "empty"), 3, "the training split is empty"),
    "a class only validation has": ((*GOOD, "--data", "untrained"), 3, "1 class that training lacks: dog"),
    "weights lack an array": ((*GOOD, "--model", TINY, "--pretrained", "short.npz"), 4, "head/bias"),
    "weights have an extra array": ((*GOOD, "--model", TINY, "--pretrained", "long.npz"), 4, "extra/kernel"),
    "weights have a wrong shape": ((*GOOD, "--model", TINY, "--pretrained", "odd.npz"), 4, "cls"),
    "weights are pickled": ((*GOOD, "--model", TINY, "--pretrained", "pickled.npz"), 4, "head/bias"),
    "weights missing": ((*GOOD, "--pretrained", "none.npz"), 4, "none.npz"),
}


@pytest.mark.parametrize("case", FROM_THE_SHELL)
def test_bad_input_from_the_shell(here, case):
    (here / "nothing").mkdir()
    write_dataset(here / "empty", train=(0, 0))
    write_dataset(here / "untrained", train=(5, 0))
    write_npz(here / "short.npz", head__bias=None)
    write_npz(here / "long.npz", extra__kernel=np.zeros(3, np.float32))
    write_npz(here / "odd.npz", cls=np.zeros((1, 1, 5), np.float32))
    write_npz(here / "pickled.npz", head__bias=np.array([Trap()], dtype=object))
    write_config(here / "top.json", gradient_acumulation_steps=2)
    write_config(here / "nested.json", zero_optimization={"stage": 2, "overlap_com": True})
    argv, exit_code, message = FROM_THE_SHELL[case]
    before = sorted(path.name for path in here.rglob("*"))
    done = launch(*argv)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 6
    assert done.stdout.strip() == "False", "torch was imported"
    assert sorted(path.name for path in here.rglob("*")) == before, "something was written"


def test_only_rank_0_says_it(here):
    done = launch(*GOOD, "--num-steps", "0", rank="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_help_answers_at_once(here):
    times_s = []
    while not times_s or (times_s[-1] >= 3 and len(times_s) < 5):  # on a busy machine one start may take that long
        started = time.perf_counter()
        done = launch("--help")
        times_s.append(time.perf_counter() - started)
    assert times_s[-1] < 3, times_s  # 0.1 s on a quiet machine; torch alone would take longer
    assert done.returncode == 0 and done.stdout.strip().endswith("False")
    assert "--deepspeed_config FILE" in done.stdout
