"""FP16_OPT_LEVEL O0 to O3: what launch/train_fp16.sh makes of its recipe, against a plain PyTorch loop.

On a CPU behind the patched check of fp16 (O2 and O3; O1 needs none): the engine, its scaler and its kernels are real.
"""

import itertools
import json
import math
import re
import shlex

import pytest
from rank_processes import ROOT, last_json, run_ranks

from vitds import ds_config
from vitds.document import read_document
from vitds.flags import apply_edits, parse_command_line

STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
CASES = [(level, stage) for stage in STAGES for level in ("O0", "O1", "O2", "O3") if stage > 0 or level == "O0"]
FP32, FP16 = ["torch.float32"], ["torch.float16"]
DTYPES = {  # parameters, their gradients, masters, the masters' gradients
    "O0": (FP32, FP32, FP32, FP32),
    "O1": (FP32, FP32, FP32, FP32),
    "O2": (FP16, FP16, FP32, FP32),
    "O3": (FP16, FP16, FP32, FP32),  # with SGD; for Adam see the last test
}
CLIP = 0.5  # below the norm of every step
# The loss scale grows within 20 steps, and overflows by itself.
DYNAMIC = ("--set", "fp16.initial_scale_power=17", "--set", "fp16.hysteresis=1", "--set", "fp16.loss_scale_window=3")
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05}}


def flags_of(level: str) -> list[str]:
    """What the script puts before its arguments."""
    script = (ROOT / "launch/train_fp16.sh").read_text()
    (line,) = re.findall(rf"^    {level}\) (.*) ;;$", script, re.MULTILINE)
    return shlex.split(line.removeprefix("set -- "))[:-1] if line.startswith("set -- ") else []


def config_of(
    level: str, stage: int, world_size: int, more: tuple[str, ...] = (), optimizer: dict | None = None
) -> dict:
    """What DeepSpeed is given at a level, for a small batch; `optimizer` in place of the recipe's."""
    document = read_document(str(ROOT / f"ds_configs/cifar10_vit_b16_{'fp32' if level == 'O0' else 'fp16'}.json"))
    sizes = ["--train-batch-size", "16", "--gradient-accumulation-steps", "2"]
    where = ["--set", f"zero_optimization.stage={stage}"]
    apply_edits(document, parse_command_line([*flags_of(level), *sizes, *where, *more]).edits)
    document.values["optimizer"] = optimizer or document.values["optimizer"]
    document.values["train_micro_batch_size_per_gpu"] = "auto"
    ds_config.check_keys(document)
    ds_config.check_combinations(document)
    plan = ds_config.optimizer_plan(document)
    batch = ds_config.solve_batch(document, world_size)
    return ds_config.deepspeed_dict(
        document, batch, optimizer_type=plan and plan.type, own_schedule=True, num_parameters=10**6
    )


def told_of(
    cases: list[tuple[str, int]], world_size: int, steps: int = 20, more: tuple[str, ...] = (), optimizer=None
) -> dict[tuple[str, int], dict]:
    """What the worker says of each case."""
    orders = {
        f"{level} {stage}": {
            "config": config_of(level, stage, world_size, more, optimizer),
            "optimizer": None if optimizer else "SGD",
            "clip": CLIP,
            "steps": steps,
        }
        for level, stage in cases
    }
    command = ["tests/workers/fp16_on_cpu.py", "tests/workers/precision_levels.py", json.dumps(orders)]
    told = last_json(run_ranks(command, world_size, timeout_s=3000)[0])
    return {case: told[" ".join(map(str, case))] for case in cases}


def types(told: dict) -> tuple:
    return tuple(told["dtypes"][name] for name in ("parameters", "gradients", "masters", "master gradients"))


def check(told: dict, level: str) -> None:
    """20 steps: types, losses, norms before clipping and what was applied are those of a plain loop."""
    assert types(told) == DTYPES[level]
    applied = [step for step in told["steps"] if step["applied"]]
    assert told["finite"] and len(applied) >= 12
    for number, step in enumerate(applied):
        # What is rounded to float16 turns a difference in the last bit of a master into one of 1/2000, steps later;
        # gradients in float16 are added up in another order than the plain loop's from the start.
        is_early = number < 3
        rel = {"O0": 1e-4, "O1": 1e-4 if is_early else 2e-2}.get(level, 5e-3 if is_early else 5e-2)
        for name, expected in step["plain"].items():
            assert step["engine"][name] == pytest.approx(expected, rel=rel, abs=1e-6), (number, name)
        assert step["plain"]["norm"] > CLIP and step["engine"]["clipped"] == pytest.approx(CLIP, rel=1e-4)


def test_what_a_level_is():
    ds = {level: config_of(level, 1, 1) for level in ("O0", "O1", "O2", "O3")}
    assert "fp16" not in ds["O0"]
    assert ds["O1"]["torch_autocast"] == {"enabled": True, "dtype": "float16"}
    assert [ds[level]["fp16"]["enabled"] for level in ("O1", "O2", "O3")] == [False, True, True]
    assert [ds[level]["fp16"]["loss_scale"] for level in ("O1", "O2", "O3")] == [0, 0, 1]
    assert [ds[level]["fp16"]["initial_scale_power"] for level in ("O1", "O2")] == [16, 20]


# Of O0 and O3, tests/test_engine.py and tests/test_loss_scaling.py have the essence in every pass.
@pytest.fixture(scope="module")
def told():
    return told_of([("O2", 2), ("O1", 3)], 1, more=DYNAMIC)


@pytest.mark.ranks
@pytest.mark.parametrize("case", [("O2", 2), ("O1", 3)])
def test_a_level_is_a_plain_loop_also_when_its_loss_scale_grows(case, told):
    check(told[case], case[0])
    scales = [step["scale"] for step in told[case]["steps"]]
    assert any(after > before for before, after in itertools.pairwise(scales))


@pytest.mark.slow
@pytest.mark.ranks
def test_every_level_at_every_stage_on_two_ranks():
    for (level, _), of_case in told_of(CASES, 2).items():
        check(of_case, level)


@pytest.mark.gpu
@pytest.mark.ranks
def test_every_level_at_every_stage_on_a_gpu():
    for (level, _), of_case in told_of(CASES, 1).items():
        check(of_case, level)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def test_no_master_is_ever_not_finite_in_hundreds_of_steps_of_dynamic_scaling(stage, where):
    (of_case,) = told_of([("O2", stage)], 1, steps=250, more=DYNAMIC).values()
    applied = [step for step in of_case["steps"] if step["applied"]]
    assert of_case["finite"], "what is not finite once stays so"
    assert 150 < len(applied) < 250, "the scale overflowed again and again"
    assert all(math.isfinite(step["engine"]["loss"]) for step in applied)
    assert applied[-1]["engine"]["loss"] < 0.7 * applied[0]["engine"]["loss"]


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_o3_of_an_offloaded_adam_has_masters_in_16_bits(stage):
    """DeepSpeed compiles its CPU Adam for this one."""
    offload = ("--set", "zero_optimization.offload_optimizer.device=cpu")
    (of_case,) = told_of([("O3", stage)], 1, more=offload, optimizer=ADAM).values()
    assert types(of_case) == (FP16, FP16, FP16, FP16)
    assert of_case["finite"] and any(step["applied"] for step in of_case["steps"])
