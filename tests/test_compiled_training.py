"""Compiled blocks under DeepSpeed: every ZeRO stage and kind of activation checkpointing, and whole runs."""

import json
import shutil

import pytest
import torch
from rank_processes import last_json, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

pytestmark = pytest.mark.ranks
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")

STAGES = (0, 1, 2, 3)
MODES = ("none", "selective", "full")
LEFT_OUT = {"drop_path": 0.5, "drop_path_subset": True, "token_drop": 0.25}
# Stage 3 lets go of every block's parameters behind it, small as they are.
SHARDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def of(stage, mode, backend, steps=2, **options):
    return {
        "stage": stage,
        "activation_checkpointing": mode,
        "compile": backend,
        "steps": steps,
        "model_options": options,
        "config": {"zero_optimization": {"stage": stage} | (SHARDED if stage == 3 else {})},
    }


def trained(runs, path, world_size=1):
    """Losses, and gradients of the first step, by name of a run."""
    runs = dict(sorted(runs.items(), key=lambda item: item[1]["stage"]))  # stage 3 patches torch in its process
    output = run_ranks(["tests/workers/engine_losses.py", json.dumps(runs), str(path)], world_size)[0]
    return last_json(output), torch.load(path)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    options = {"dropout": 0.1, "drop_path": 0.3}
    runs = {
        f"{stage} {mode} {backend}": of(stage, mode, backend, **options)
        for stage in STAGES
        for mode in MODES
        for backend in (None, "aot_eager")
    }
    return trained(runs, tmp_path_factory.mktemp("matrix") / "gradients.pt")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_blocks_that_are_not_compiled(stage, mode, matrix):
    """To the bit with torch's own kernels; inductor's are below. The worker checks that something was compiled."""
    losses, gradients = matrix
    compiled, plain = f"{stage} {mode} aot_eager", f"{stage} {mode} None"
    assert losses[compiled] == losses[plain] and len(losses[plain]) == 2
    assert all(gradient.any() for gradient in gradients[plain].values())
    assert_same_weights(gradients[compiled], gradients[plain])


def assert_close(runs, path, world_size):
    losses, gradients = trained(runs, path, world_size)
    for name in [name for name in runs if name.endswith(" inductor")]:
        plain = name.replace("inductor", "None")
        assert losses[name] == pytest.approx(losses[plain], rel=1e-5), name
        for parameter, gradient in gradients[name].items():
            scale = gradients[plain][parameter].abs().max().item()
            torch.testing.assert_close(gradient, gradients[plain][parameter], atol=1e-5 * scale, rtol=0, msg=parameter)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{"dropout": 0.1, "drop_path": 0.3}, LEFT_OUT], ids=["dropout", "left out"])
def test_inductor_agrees_at_every_stage(world_size, options, tmp_path):
    runs = {
        f"{stage} {mode} {backend}": of(stage, mode, backend, steps=6, **options)
        for stage in STAGES
        for mode in MODES
        for backend in (None, "inductor")
    }
    assert_close(runs, tmp_path / "gradients.pt", world_size)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [0, 1, 2])  # stage 3 gathers parameters at other addresses each time
def test_cuda_graphs_agree(stage, mode, tmp_path):
    """What a replayed graph gives lies where the last one's did: gradients of two micro-batches have to add up.

    Runs refuse these modes for as long as no GPU has passed this test.
    """
    of_graphs = of(stage, mode, "inductor", steps=6, dropout=0.1) | {"compile_mode": "reduce-overhead"}
    runs = {
        f"{accumulation} {name}": run | {"accumulation": accumulation}
        for accumulation in (1, 2)
        for name, run in (("None", of(stage, mode, None, steps=6, dropout=0.1)), ("inductor", of_graphs))
    }
    assert_close(runs, tmp_path / "gradients.pt", 1)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_not_finite_is_found_inside_of_a_compiled_block(stage):
    output = run_ranks(["tests/workers/compiled_diagnosis.py", str(stage), "blocks.1.mlp.fc1"], 1)[0]
    assert "in blocks.1.mlp.fc1, forward" in output


@needs_compiler
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_runs_go_on_to_the_bit_and_with_or_without_compilation(stage, digits, tmp_path):
    """Dropout and drop-path are on. Without compilation the rest of the run differs by roundings."""
    config = config_file(tmp_path, stage, vitds={"num_steps": 12, "save_every": 6, "compile": True})
    with WarmRanks(1) as ranks:
        said = ranks.run(train_command(config, digits, tmp_path, "unbroken")).output
        ranks.run(train_command(config, digits, tmp_path, "stopped", "--stop-at-step", "6"), exit_code=75)
    assert "blocks are compiled by torch.compile: the first step waits for it" in said
    shutil.copytree(tmp_path / "stopped", tmp_path / "switched")
    with WarmRanks(1) as ranks:
        ranks.run(train_command(config, digits, tmp_path, "stopped"))
        ranks.run(train_command(config, digits, tmp_path, "switched", "--compile", "false"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "stopped", 12), weights(tmp_path / "unbroken", 12))
    switched, expected = metrics(tmp_path / "switched"), metrics(tmp_path / "unbroken")
    assert [line["loss"] for line in switched] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    assert weights(tmp_path / "switched", 12).keys() == weights(tmp_path / "unbroken", 12).keys()
    assert not any("_orig_mod" in name for name in weights(tmp_path / "unbroken", 12))
