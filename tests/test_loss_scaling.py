"""fp16 with static and dynamic loss scales: DeepSpeed's real scaler, on a GPU, and on a CPU behind a patched check."""

import json
import math
from itertools import pairwise

import pytest
import torch
from rank_processes import last_json, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

ON_CPU = "tests/workers/fp16_on_cpu.py"
DYNAMIC = {"initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 3}
STAGES = (1, 2, 3)  # in this order: stage 3 patches torch in its process
CASES = {f"dynamic {s}": {"stage": s, "fp16": DYNAMIC, "overflow_at": [2], "steps": 7} for s in STAGES}
CASES |= {f"static {s}": {"stage": s, "fp16": {"loss_scale": 8}, "overflow_at": [2], "steps": 5} for s in STAGES}
CASES |= {
    "floor": {
        "stage": 2,
        "fp16": {"initial_scale_power": 2, "hysteresis": 1},
        "overflow_at": [1, 2, 3, 4],
        "steps": 7,
    },
    "default hysteresis": {
        "stage": 1,
        "fp16": {"initial_scale_power": 6},
        "overflow_at": [1, 2, 3],
        "steps": 5,
    },
}


@pytest.fixture(scope="module")
def told():
    """What the engine said after each step, by case."""
    ordered = dict(sorted(CASES.items(), key=lambda case: case[1]["stage"]))
    return last_json(run_ranks([ON_CPU, "tests/workers/loss_scaling.py", json.dumps(ordered)], 1)[0])


def column(steps, name):
    return [step[name] for step in steps]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_step_and_halves_the_scale(stage, told):
    steps = told[f"dynamic {stage}"]
    assert column(steps, "applied") == [True, True, False, True, True, True, True]
    assert column(steps, "scale") == [64, 64, 32, 32, 32, 32, 64], "and it doubles again after three good steps"
    assert column(steps, "skipped") == [0, 0, 1, 1, 1, 1, 1]
    assert column(steps, "grad_norm")[2] == math.inf
    assert all(0 < norm < 100 for norm in column(steps, "grad_norm")[:2] + column(steps, "grad_norm")[3:])
    assert set(column(steps, "dtype")) == {"torch.float16"}


@pytest.mark.ranks
@pytest.mark.parametrize("case", [f"{kind} {stage}" for kind in ("dynamic", "static") for stage in STAGES])
def test_a_skipped_step_changes_neither_weights_nor_learning_rate_and_training_goes_on(case, told):
    losses, rates = column(told[case], "loss"), column(told[case], "lr")
    assert losses[3] == losses[2]
    assert losses[3:] == sorted(losses[3:], reverse=True)
    assert len(set(losses[3:])) == len(losses[3:])
    assert rates[:5] == pytest.approx([1e-3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 3, 1e-3 / 4])


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_a_static_scale_skips_and_stays(stage, told):
    steps = told[f"static {stage}"]
    assert column(steps, "applied") == [True, True, False, True, True]
    assert column(steps, "scale") == [8] * 5
    assert column(steps, "skipped") == [0, 0, 1, 1, 1]


@pytest.mark.ranks
def test_by_default_the_first_overflow_leaves_the_scale(told):
    assert column(told["default hysteresis"], "scale") == [64, 64, 32, 16, 16]
    assert column(told["default hysteresis"], "skipped") == [0, 1, 2, 3, 3]


@pytest.mark.ranks
def test_an_overflow_at_the_floor_is_told_apart(told):
    assert column(told["floor"], "scale") == [4, 2, 1, 1, 1, 1, 1]
    assert column(told["floor"], "at_floor") == [False, False, False, True, True, False, False]
    assert not any(column(told["dynamic 1"], "at_floor"))


# So high a scale that the first gradients overflow by themselves.
HIGH = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}


def check_natural_overflow(lines):
    """The first steps are skipped, each with half the scale of the one before; then training goes on."""
    train = [line for line in lines if line["split"] == "train"]
    skipped = column(train, "skipped_steps")
    num_skipped = next(number for number, line in enumerate(train) if line["skipped_steps"] < line["step"])
    assert num_skipped >= 3 and skipped[:num_skipped] == list(range(1, num_skipped + 1))
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(skipped)) and skipped[-1] < len(train) - 1
    assert column(train, "loss_scale") == [2.0 ** (24 - line["skipped_steps"]) for line in train]
    assert column(train, "grad_norm")[0] is None, "infinite, and so null in the file"
    assert train[num_skipped]["lr"] == 0.0, "the schedule waits for the first applied step"
    assert train[num_skipped + 1]["lr"] > 0.0
    assert train[-1]["loss"] != train[0]["loss"]


AUTOCAST = {"enabled": True, "dtype": "float16"}


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_under_float16_autocast_skips_resumes_and_goes_on_at_another_stage(digits, tmp_path):
    keys = {"fp16": HIGH | {"enabled": False}, "torch_autocast": AUTOCAST}
    config, other = config_file(tmp_path, 2, **keys), config_file(tmp_path, 1, **keys)
    unbroken, stopped = (train_command(config, digits, tmp_path, name) for name in ("unbroken", "stopped"))
    moved = train_command(other, digits, tmp_path, "moved")
    with WarmRanks(1) as ranks:
        assert "fp32 under float16 autocast" in ranks.run(unbroken).output
        check_natural_overflow(metrics(tmp_path / "unbroken"))
        ranks.run([*stopped, "--stop-at-step", "2"], exit_code=75)
        fp32 = [*stopped, "--set", "torch_autocast.enabled=false"]
        assert "torch_autocast.enabled: True in the checkpoint, False now" in ranks.run(fp32, exit_code=4).output
        ranks.run(stopped)
        ranks.run([*moved, "--stop-at-step", "2"], exit_code=75)
        ranks.run(train_command(config, digits, tmp_path, "moved"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "stopped", 20), weights(tmp_path / "unbroken", 20))
    scales = [line.get("loss_scale") for line in metrics(tmp_path / "moved")]
    assert scales == [line.get("loss_scale") for line in metrics(tmp_path / "unbroken")], "the scale moves along"


@pytest.mark.ranks
def test_a_run_in_fp16_skips_resumes_and_ends_at_the_floor(digits, tmp_path):
    config = config_file(tmp_path, 2, fp16=HIGH)
    unbroken, stopped = (train_command(config, digits, tmp_path, name) for name in ("unbroken", "stopped"))
    with WarmRanks(1) as ranks:
        if not torch.cuda.is_available():
            output = ranks.run(unbroken, exit_code=2).output
            assert "fp16" in output
            assert "bf16" in output, "what to use instead"
        ranks.run([ON_CPU, *unbroken])
        check_natural_overflow(metrics(tmp_path / "unbroken"))
        # Stopped amid the overflows: the scale and the count of skipped steps are part of the checkpoint.
        ranks.run([ON_CPU, *stopped, "--stop-at-step", "2"], exit_code=75)
        ranks.run([ON_CPU, *stopped])
        assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
        assert_same_weights(weights(tmp_path / "stopped", 20), weights(tmp_path / "unbroken", 20))

        floor = [*train_command(config, digits, tmp_path, "floor"), "--set", "fp16.min_loss_scale=8388608"]
        output = ranks.run([ON_CPU, *floor], exit_code=6).output
        assert "diverged  the loss scale is at its floor, and the gradients of step 2 still overflow" in output
        assert "lower the learning rate" in output
        assert "Traceback" not in output


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fp16", [HIGH, {"enabled": True, "loss_scale": 128}], ids=["dynamic", "static"])
def test_a_run_in_fp16_on_a_gpu(stage, fp16, digits, tmp_path):
    config = config_file(tmp_path, stage, fp16=fp16)
    run_ranks(train_command(config, digits, tmp_path, "run"), 1)
    lines = metrics(tmp_path / "run")
    if "loss_scale" in fp16:
        assert {line["loss_scale"] for line in lines if line["split"] == "train"} == {128}
        assert all(math.isfinite(line["loss"]) for line in lines)
    else:
        check_natural_overflow(lines)
