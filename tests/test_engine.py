"""The engine computes what a plain PyTorch loop computes, at every ZeRO stage."""

import functools
import json

import pytest
from rank_processes import last_json, run_ranks

CASES = [[1, "none"], [4, "none"], [1, "full"], [4, 2]]


@functools.cache
def losses(stage, world_size, steps=20, config="{}"):
    order = json.dumps({"stage": stage, "steps": steps, "cases": CASES, "config": json.loads(config)})
    return last_json(run_ranks(["tests/workers/engine_losses.py", order], world_size)[0])


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_gives_the_losses_of_a_plain_loop(stage):
    plain, sharded = losses("plain", 1), losses(stage, 2)
    for case, expected in plain.items():
        assert expected[-1] < expected[0]
        assert sharded[case] == pytest.approx(expected, rel=1e-5), case


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_accumulate_in_fp32(stage):
    """1 x 16 and 16 x 1 micro-batches agree to 0.4 %, which accumulation in bf16 does not (measured: 0.27, 0.59 %)."""
    worker = "tests/workers/bf16_gradient.py"
    assert last_json(run_ranks([worker, str(stage), "fp32"], 1)[0])["difference"] < 4e-3
    if stage == 2:
        assert last_json(run_ranks([worker, str(stage), "bf16"], 1)[0])["difference"] > 4e-3
