"""launch/speedrun.sh: what it starts, what it reads off the runs, and that SPEEDRUN.md tells of the recipe as it is."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest
from rank_processes import ROOT
from tiny_dataset import write_dataset

from vitds.flops import forward_flops
from vitds.model.registry import num_parameters
from vitds.preflight import plan_run

pytestmark = pytest.mark.ranks

PAGE = " ".join((ROOT / "SPEEDRUN.md").read_text().split())
SHORT = ["--model", "custom:width=16,depth=2,heads=2,mlp=32,patch=4", "--image-size", "16", "--num-steps", "3"]


def speedrun(*flags, **variables):
    """Run the script as a user does, on the CPU."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "launch/speedrun.sh", *flags]
    environment = clean | active | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_every_seed_is_timed_and_the_last_evaluation_of_the_average_counts(digits, tmp_path):
    (tmp_path / "speedrun-seed1").mkdir()  # somebody's run: it is left alone
    flags = [*SHORT, "--micro-batch-size", "16", "--train-batch-size", "16", "--warmup-steps", "1", "--workers", "0"]
    flags += ["--eval-every", "2", "--set", "bf16.enabled=false"]  # which takes longer on most CPUs
    done = speedrun(*flags, SEEDS=2, DATASET=digits, OUTPUT_DIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any((tmp_path / "speedrun-seed1").iterdir())
    tops = []
    for seed in (1, 2):
        run = tmp_path / f"speedrun-2-seed{seed}"
        assert json.loads((run / "config.resolved.json").read_text())["vitds"]["seed"] == seed
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tops.append([line["ema_top1"] for line in lines if line["split"] == "val"][-1])
        printed = re.search(rf"^seed {seed}  {tops[-1]:.2%}  ([\d.]+) s  [\d,]+ images a second", done.stdout, re.M)
        lasted_s = (run / "exit.json").stat().st_mtime - (run / "env.json").stat().st_mtime
        assert float(printed[1]) > lasted_s  # from before Python started to after its end
    mean, lowest, highest = statistics.mean(tops), min(tops), max(tops)
    assert re.search(rf"^mean of 2  {mean:.2%}  [\d.]+ s  .*{lowest:.2%} - {highest:.2%}, ", done.stdout, re.M)


def test_what_is_no_number_of_runs_is_refused():
    done = speedrun(SEEDS="five")
    assert (done.returncode, done.stderr) == (2, "usage error  SEEDS=five: it is a number of runs, 1 or more\n")


def test_the_page_tells_of_the_recipe_as_it_is(tmp_path):
    data = write_dataset(tmp_path / "data", tuple("0123456789"), (5000,) * 10, (1000,) * 10)
    config = str(ROOT / "ds_configs/cifar10_speedrun.json")
    plan = plan_run(
        ["--deepspeed_config", config, "--data", str(data), "--output-dir", str(tmp_path)], {"WORLD_SIZE": "1"}
    )
    spec, run = plan.spec, plan.run
    assert (spec.resnet, spec.patch_size, spec.pooling, run.pretrained) == (None, 4, "gap", None)
    assert (run.eval_every, run.save_every, plan.zero_stage, plan.dtype) == (None, None, 1, "bf16")
    num_images = plan.num_steps * plan.batch.global_batch
    assert 0 <= num_images - 120 * 50_000 < plan.batch.global_batch
    flops = 3 * forward_flops(spec, plan.image_size, 10)
    for said in (
        f"width {spec.width}, {spec.depth} of them, {spec.heads} heads",
        f"{num_parameters(spec, 32, 10) / 1e6:.1f} M parameters",
        f"120 epochs of batches of {plan.batch.global_batch}, AdamW at {plan.optimizer.params['lr']:g}",
        f"weight decay {plan.optimizer.params['weight_decay']} on {run.weight_decay_on}",
        f"{plan.schedule.warmup_steps} steps of warmup",
        f"RandAugment ({run.data.randaugment_layers} operations at {run.data.randaugment_magnitude:g})",
        f"mixup {run.data.mixup_alpha:.1f} or cutmix {run.data.cutmix_alpha:.1f}",
        f"smoothing {run.label_smoothing}, drop path {run.drop_path}",
        f"average of the weights over about {1 / (1 - run.ema_decay):,.0f} steps",
        f"are {round(num_images / (9 * 60), -2):,.0f} a second",
        f"{flops / 1e9:.1f} GFLOP an image, so {flops * num_images / (9 * 60) / 1e12:.0f} TFLOP/s",
    ):
        assert said in PAGE, said
