"""The engine computes what a plain PyTorch loop computes, at every ZeRO stage."""

import json

import pytest
from rank_processes import last_json, run_ranks

STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
CASES = [(1, "none"), (4, "none"), (1, "full"), (4, 2)]


@pytest.fixture(scope="module")
def losses():
    """By stage and case."""
    runs = {
        f"{stage} {accumulation} {mode}": {
            "stage": stage,
            "accumulation": accumulation,
            "activation_checkpointing": mode,
        }
        for stage in ("plain", *STAGES)
        for accumulation, mode in CASES
    }
    return last_json(run_ranks(["tests/workers/engine_losses.py", json.dumps(runs)], 2)[0])


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("accumulation", "mode"), CASES)
def test_every_stage_gives_the_losses_of_a_plain_loop(stage, accumulation, mode, losses):
    expected = losses[f"plain {accumulation} {mode}"]
    assert expected[-1] < expected[0]
    assert losses[f"{stage} {accumulation} {mode}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks
def test_bf16_gradients_accumulate_in_fp32():
    """1 x 16 and 16 x 1 micro-batches agree to 0.4 %, which accumulation in bf16 does not (measured: 0.27, 0.59 %)."""
    cases = [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
    difference = last_json(run_ranks(["tests/workers/bf16_gradient.py", json.dumps(cases)], 1)[0])
    assert difference["2 bf16"] > 4e-3
    assert all(difference[f"{stage} fp32"] < 4e-3 for stage in (1, 2, 3)), difference
