"""Runs whose blocks multiply in 8 bits: every ZeRO stage, compiled and recomputed, beside bf16, and stopped."""

import json
import shutil

import pytest
import torch
from rank_processes import last_json, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

pytestmark = pytest.mark.ranks

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
CASES = [(1, "none"), (1, "selective"), (2, "none"), (3, "none"), (3, "selective"), (3, "full")]
# Stage 3 lets go of every block's parameters behind it, small as they are.
SHARDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def of(stage, fp8=True, steps=2, **options):
    zero = {"zero_optimization": {"stage": stage} | (SHARDED if stage == 3 else {})}
    return {"stage": stage, "fp8": fp8, "steps": steps, "config": BF16 | zero} | options


def losses_and_gradients(runs, path):
    """By name of a run; the gradients are the first step's."""
    output = run_ranks(["tests/workers/engine_losses.py", json.dumps(runs), str(path)], 1)[0]
    return last_json(output), torch.load(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs = {"learning in bf16": of(1, fp8=False, steps=60), "learning": of(1, steps=60)}
    runs |= {f"{stage} {mode}": of(stage, activation_checkpointing=mode) for stage, mode in CASES}
    return losses_and_gradients(runs, tmp_path_factory.mktemp("fp8") / "gradients.pt")


def test_a_run_learns_as_in_16_bits(trained):
    found, expected = trained[0]["learning"], trained[0]["learning in bf16"]
    assert found != expected and sum(expected[-20:]) < 0.95 * sum(expected[:20])
    assert found == pytest.approx(expected, rel=0.02)
    assert sum(found[-20:]) == pytest.approx(sum(expected[-20:]), rel=0.005)


@pytest.mark.parametrize(("stage", "mode"), CASES)
def test_stages_and_recomputation_give_the_same_bits(stage, mode, trained):
    losses, gradients = trained
    assert losses[f"{stage} {mode}"] == losses["1 none"]
    assert_same_weights(gradients[f"{stage} {mode}"], gradients["1 none"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_recompute_to_the_bit_at_a_stage_too(stage, tmp_path):
    runs = {
        f"{mode} {backend}": of(stage, activation_checkpointing=mode, compile=backend)
        for mode in ("none", "selective", "full")
        for backend in (None, "aot_eager")
    }
    losses, gradients = losses_and_gradients(runs, tmp_path / "gradients.pt")
    assert losses["none aot_eager"] == pytest.approx(losses["none None"], rel=0.01)
    for mode in ("selective", "full"):
        assert losses[f"{mode} aot_eager"] == losses["none aot_eager"]
        assert_same_weights(gradients[f"{mode} aot_eager"], gradients["none aot_eager"])


def test_runs_go_on_to_the_bit_and_with_or_without_8_bits(digits, tmp_path):
    """Dropout and drop-path are on."""
    config = config_file(tmp_path, 1, **BF16, vitds={"num_steps": 8, "save_every": 4, "fp8": True})
    with WarmRanks(1) as ranks:
        said = ranks.run(train_command(config, digits, tmp_path, "unbroken")).output
        ranks.run(train_command(config, digits, tmp_path, "stopped", "--stop-at-step", "4"), exit_code=75)
        shutil.copytree(tmp_path / "stopped", tmp_path / "switched")
        ranks.run(train_command(config, digits, tmp_path, "stopped"))
        switched = ranks.run(train_command(config, digits, tmp_path, "switched", "--set", "fp8=false")).output
    assert "bf16, blocks' linear layers in fp8" in said
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "stopped", 8), weights(tmp_path / "unbroken", 8))
    assert "changed since the checkpoint  vitds.fp8: True in the checkpoint, False now" in switched
    found, expected = metrics(tmp_path / "switched"), metrics(tmp_path / "unbroken")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=0.05)
    assert weights(tmp_path / "switched", 8).keys() == weights(tmp_path / "unbroken", 8).keys()
