"""Layer-wise decay and the average of the weights are the textbook's at every stage; evaluating leaves no trace."""

import json

import pytest
import torch
from rank_processes import run_ranks
from run_directory import assert_same_weights

from vitds.ema import WeightAverage

STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
BF16 = {"bf16": {"enabled": True}}
IN_FP32 = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed has an optimizer of its own for it
OFFLOADED = {"stage": 3, "sub_group_size": 5000, "stage3_param_persistence_threshold": 100}
OFFLOADED |= {"offload_optimizer": {"device": "cpu"}}
RUNS = {"plain": {"stage": "plain"}, "plain last-1": {"stage": "plain", "train": "last-1"}}
RUNS |= {f"stage {stage}": {"stage": stage} for stage in (0, 1, 2)}
RUNS |= {f"stage {stage} evaluated": {"stage": stage, "evaluate_every": 1} for stage in (0, 1, 2)}
RUNS |= {"bf16": {"stage": 1, "config": IN_FP32}}
RUNS |= {"bf16 evaluated": {"stage": 1, "config": IN_FP32, "evaluate_every": 1}}
RUNS |= {"deepspeed's last-1": {"stage": 2, "optimizer": None, "train": "last-1"}}
RUNS |= {"stage 3": {"stage": 3}, "stage 3 evaluated": {"stage": 3, "evaluate_every": 1}}
RUNS |= {"bf16 stage 3": {"stage": 3, "config": BF16}}
RUNS |= {"bf16 stage 3 evaluated": {"stage": 3, "config": BF16, "evaluate_every": 1}}
RUNS |= {
    "offloaded evaluated": {
        "stage": 3,
        "evaluate_every": 2,
        "config": {"zero_optimization": OFFLOADED, "zero_force_ds_cpu_optimizer": False},
    }
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each run left, by its name."""
    out = tmp_path_factory.mktemp("runs")
    run_ranks(["tests/workers/layer_decay_and_average.py", str(out), json.dumps(RUNS)], 2)
    return {name: torch.load(out / f"{name}.pt") for name in RUNS}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*(f"stage {stage}" for stage in STAGES), "deepspeed's last-1", "offloaded evaluated"])
def test_weights_and_average_are_the_textbooks(runs, name):
    plain, found = runs["plain last-1" if "last-1" in name else "plain"], runs[name]
    assert largest_difference(plain["master"], plain["ema"]) > 1e-3, "an average that is the weights would show nothing"
    assert largest_difference(found["master"], plain["master"]) < 1e-6
    assert largest_difference(found["ema"], plain["ema"]) < 1e-6
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*(f"stage {stage}" for stage in STAGES), "bf16", "bf16 stage 3"])
def test_an_evaluation_of_the_average_leaves_no_trace(runs, name):
    quiet, evaluated = runs[name], runs[f"{name} evaluated"]
    assert evaluated["losses"] == quiet["losses"]
    for state in ("master", "ema"):
        assert_same_weights(evaluated[state], quiet[state])
    assert len(set(evaluated["figures"])) == len(evaluated["losses"])


@pytest.mark.ranks
def test_the_average_computes_what_its_weights_compute(runs):
    of_plain = runs["stage 0 evaluated"]["figures"]
    for name in ("stage 1", "stage 2", "stage 3"):
        assert runs[f"{name} evaluated"]["figures"] == pytest.approx(of_plain, rel=1e-6)
    for name in ("bf16", "bf16 stage 3"):
        assert runs[f"{name} evaluated"]["figures"] == pytest.approx(of_plain, rel=1e-3)


@pytest.mark.ranks
def test_the_rate_that_is_told_is_the_heads(runs):
    assert max(runs["stage 2"]["lr"]) == 3e-3
    assert runs["stage 2"]["num_groups"] == 2 * (3 + 2)
    assert runs["deepspeed's last-1"]["num_groups"] == 2 * 2


def test_the_average_starts_as_the_weights_before_the_first_update():
    weights = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    average = WeightAverage(optimizer, 0.75)
    average.swap()  # nothing was updated, so the average is the weights
    assert weights.tolist() == [0, 1, 2, 3]
    weights.grad = torch.full((4,), 4.0)
    optimizer.step()
    assert weights.tolist() == [-4, -3, -2, -1]
    assert optimizer.state[weights]["ema"].tolist() == [-1, 0, 1, 2]
    average.swap()
    assert weights.tolist() == [-1, 0, 1, 2]
    assert optimizer.state[weights]["ema"].tolist() == [-4, -3, -2, -1]


def test_a_parameter_without_a_gradient_starts_its_average_later():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused], lr=0.1)
    WeightAverage(optimizer, 0.5)
    for with_gradient in ([used], [used, unused]):
        for parameter in with_gradient:
            parameter.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(optimizer.state[unused]["ema"], (1 + unused.detach()) / 2)
