"""The engine computes what a plain PyTorch loop computes, at every ZeRO stage."""

import json

import pytest
from rank_processes import last_json, run_ranks

STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
CASES = [(1, "none"), (4, "none"), (1, "full"), (4, 2)]
# So few weights stay gathered that backward gathers them again, in the middle of what it computes again.
GATHERED_AGAIN = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    **{f"stage3_{name}": 10_000 for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")},
}
LEFT_OUT = {"drop_path": 0.5, "drop_path_subset": True, "token_drop": 0.25}


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
    parts = {stage: 2 if stage == "plain" else 1 for stage in ("plain", *STAGES)}  # the two ranks', one after the other
    runs |= {
        f"{stage} leaving out": {
            "stage": stage,
            "accumulation": parts[stage],
            "activation_checkpointing": "full",
            "model_options": LEFT_OUT,
        }
        for stage in ("plain", *STAGES)
    }
    runs |= {
        f"3 {mode} again": {
            "stage": 3,
            "activation_checkpointing": mode,
            "config": {"zero_optimization": GATHERED_AGAIN},
        }
        for mode in ("full", "selective")
    }
    runs = dict(sorted(runs.items(), key=lambda item: item[1]["stage"] == 3))
    return last_json(run_ranks(["tests/workers/engine_losses.py", json.dumps(runs)], 2)[0])


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("accumulation", "mode"), CASES)
def test_every_stage_gives_the_losses_of_a_plain_loop(stage, accumulation, mode, losses):
    expected = losses[f"plain {accumulation} {mode}"]
    assert expected[-1] < expected[0]
    assert losses[f"{stage} {accumulation} {mode}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_samples_and_tokens_that_are_left_out_are_so_at_every_stage(stage, losses):
    assert losses["plain leaving out"] != losses["plain 1 full"]
    assert losses[f"{stage} leaving out"] == pytest.approx(losses["plain leaving out"], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_weights_that_stage_3_gathers_again_can_be_those_of_recomputed_blocks(mode, losses):
    assert losses[f"3 {mode} again"] == pytest.approx(losses["plain 1 none"], rel=1e-5)


@pytest.mark.ranks
def test_bf16_gradients_accumulate_in_fp32():
    """1 x 16 and 16 x 1 micro-batches agree to 0.4 %, which accumulation in bf16 does not (measured: 0.27, 0.59 %)."""
    cases = [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
    difference = last_json(run_ranks(["tests/workers/bf16_gradient.py", json.dumps(cases)], 1)[0])
    assert difference["2 bf16"] > 4e-3
    assert all(difference[f"{stage} fp32"] < 4e-3 for stage in (1, 2, 3)), difference
