"""A gradient that is not finite, where the host decides: under optimizers that DeepSpeed builds, on one rank of two."""

import json

import pytest
from rank_processes import last_json, run_ranks

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def muon():
    """With torch's Adam for what is no matrix: DeepSpeed's is compiled at the first start, for minutes."""
    params = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "torch_adam": True}
    return {"optimizer": {"type": "Muon", "params": params}}


RMSPROP = {"optimizer": {"type": "RMSprop", "params": {"lr": 0.01, "momentum": 0.9}}}
UNCHECKED = RMSPROP | BF16 | {"bf16": {"enabled": True, "check_grad_overflow": False}}
CASES = {  # ZeRO stage, zero_optimization, the rest
    "Muon 0": (0, {}, muon()),
    "Muon 1": (1, {}, muon()),
    "Muon 2": (2, {}, muon()),
    "Muon 2 bf16": (2, {}, muon() | BF16),
    "Muon 2 offloaded": (2, OFFLOADED, muon()),
    "RMSprop 1 bf16": (1, {}, RMSPROP | BF16),
    "RMSprop 2 bf16, unchecked": (2, {}, UNCHECKED),
    "Muon 3": (3, {}, muon()),
    "Muon 3 bf16": (3, {}, muon() | BF16),
    "Muon 3 offloaded": (3, OFFLOADED, muon()),
    "RMSprop 3": (3, {}, RMSPROP),
}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ranks():
    """What each rank says of every step, by case; Muon's kernels run as they are written, not compiled."""
    cases = {name: {"stage": stage, "zero": zero, "config": config} for name, (stage, zero, config) in CASES.items()}
    command = ["tests/workers/skipped_updates.py", json.dumps(cases)]
    return [last_json(output) for output in run_ranks(command, 2, TORCHDYNAMO_DISABLE="1")]


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_update_changes_neither_weights_nor_moments_and_the_schedule_goes_on(case, ranks):
    """Muon's momentum too, which DeepSpeed moves before it takes the norm: those of finite gradients would have."""
    everything = ["weights", "masters", "moments"]
    for rank in ranks:
        before, bad, after = rank[case]
        assert before["applied"] and before["changed"] == everything
        assert not bad["applied"] and bad["changed"] == []
        assert after["applied"] and after["changed"] == everything
        assert [step["lr"] for step in rank[case]] == pytest.approx([0.01, 0.01 / 2, 0.01 / 3])
