"""Frozen parameters have no gradient and no optimizer state, and stay bit-identical through training and resume."""

import pytest
import torch
from rank_processes import last_json, run_ranks
from run_directory import TINY, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

import vitds
from vitds.model.positions import sincos2d_positions
from vitds.weights.ds_file import safe_load

pytestmark = pytest.mark.ranks

STAGES = (0, 1, 2, 3)  # in this order: stage 3 patches torch in its process
HEAD = {"head.weight", "head.bias"}
SEED, STOP, STEPS = 42, 4, 8


def is_trained(name, train):
    return name.startswith("head." if train == "head" else ("blocks.2.", "norm.", "head."))


@pytest.fixture(scope="module")
def ranks():
    with WarmRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def initial():
    """The weights that a run begins with: they follow from its seed."""
    torch.manual_seed(SEED)
    return vitds.create_model(TINY, 16, 10).state_dict()


@pytest.fixture(scope="module")
def gradients():
    return last_json(run_ranks(["tests/workers/frozen_gradients.py"], 2)[0])


@pytest.mark.parametrize("train", ["head", "last-1"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_trained_parameters_have_a_gradient(stage, train, gradients, initial):
    assert set(gradients[f"{stage} {train}"]) == {name for name in initial if is_trained(name, train)}


def moments_numel(state):
    """Numbers in all first moments of a saved optimizer, whatever its layout."""
    if isinstance(state, dict):
        return sum(v.numel() if k == "exp_avg" else moments_numel(v) for k, v in state.items())
    return sum(map(moments_numel, state)) if isinstance(state, list | tuple) else 0


def saved_moments_numel(directory):
    """Over all ranks; at stage 0 every rank holds all, and one is saved."""
    files = sorted(directory.glob("*_optim_states.pt"))
    if files:
        return sum(moments_numel(safe_load(path)["optimizer_state_dict"]) for path in files)
    return moments_numel(safe_load(directory / "mp_rank_00_model_states.pt")["optimizer"])


@pytest.mark.parametrize("train", ["head", "last-1"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_stay_as_they_were_through_training_and_resume(
    stage, train, ranks, initial, digits, tmp_path
):
    config = config_file(tmp_path, stage, vitds={"num_steps": STEPS, "train": train})
    command = [*train_command(config, digits, tmp_path, "run"), "--activation-checkpointing", "full"]
    ranks.run([*command, "--stop-at-step", STOP], exit_code=75)
    assert f"resumed at step {STOP} of {STEPS}" in ranks.run(command).output

    trained = {name for name in initial if is_trained(name, train)}
    for step in (STOP, STEPS):
        found = weights(tmp_path / "run", step)
        assert found.keys() == initial.keys()
        assert {name for name in initial if not torch.equal(found[name], initial[name])} == trained, step
        num_trained = sum(initial[name].numel() for name in trained)
        num_moments = saved_moments_numel(tmp_path / f"run/checkpoints/global_step{step}")
        assert num_trained <= num_moments <= num_trained + 16, "a few more numbers pad the ranks' shares"


def test_a_linear_probe_then_fine_tuning_are_two_runs(ranks, digits, tmp_path):
    """The first step of fine-tuning has learning rate 0: it saves what the probe left, at another stage too."""
    for stage in (2, 3):
        config_file(tmp_path, stage, vitds={"num_steps": STEPS})
    probe = train_command(tmp_path / "stage2.json", digits, tmp_path, "probe", "--train", "head")
    ranks.run(probe)
    tuned = train_command(tmp_path / "stage3.json", digits, tmp_path, "tuned", "--pretrained", tmp_path / "probe")
    output = ranks.run([*tuned, "--stop-at-step", "1"], exit_code=75).output
    assert f"starts at step 0 of {STEPS}" in output
    left, begun = weights(tmp_path / "probe", STEPS), weights(tmp_path / "tuned", 1)
    assert metrics(tmp_path / "tuned")[0]["lr"] == 0.0
    assert all(torch.equal(begun[name], left[name]) for name in left)
    assert left["head.weight"].abs().sum() > 0
    assert f"resumed at step 1 of {STEPS}" in ranks.run(tuned).output
    ended = weights(tmp_path / "tuned", STEPS)
    assert {name for name in left if torch.equal(ended[name], left[name])} == set()


def test_a_frozen_backbone_that_was_loaded_is_back_after_a_resume_where_nodes_keep_copies(digits, tmp_path):
    """hpZ gathers from those copies, which are made before a checkpoint is read."""
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    config_file(tmp_path, 2, vitds={"num_steps": STEPS})
    config = config_file(tmp_path, 3, zero_optimization=zero, vitds={"num_steps": STEPS, "train": "last-1"})
    flags = ["--pretrained", tmp_path / "probe"]
    with WarmRanks(2) as two_ranks:  # of its own: DeepSpeed keeps hpZ's groups for the rest of a process
        two_ranks.run(train_command(tmp_path / "stage2.json", digits, tmp_path, "probe"))
        two_ranks.run(train_command(config, digits, tmp_path, "unbroken", *flags))
        command = train_command(config, digits, tmp_path, "stopped", *flags)
        two_ranks.run([*command, "--stop-at-step", STOP], exit_code=75)
        two_ranks.run(command)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_positions_by_formula_stay_fixed_and_a_tanh_layer_trains(stage, precision, ranks, digits, tmp_path):
    """What big_vision pre-trains; a checkpoint in 16 bits does not round the positions."""
    model = TINY + ",pooling=gap,positions=sincos2d"
    ours = {"model": model, "pre_logits": 24, "num_steps": STEPS}
    config = config_file(tmp_path, stage, **{precision: {"enabled": True}} if precision != "fp32" else {}, vitds=ours)
    command = train_command(config, digits, tmp_path, "run")
    ranks.run([*command, "--stop-at-step", STOP], exit_code=75)
    assert f"resumed at step {STOP} of {STEPS}" in ranks.run(command).output

    trained = vitds.create_model("auto", weights=tmp_path / "run")
    assert trained.spec.name == model
    assert torch.equal(trained.pos_embed, torch.from_numpy(sincos2d_positions((4, 4), 32, False)))
    assert not trained.pos_embed.requires_grad
    torch.manual_seed(SEED)
    initial = vitds.create_model(model, 16, 10, pre_logits=24)
    assert trained.head.pre_logits.weight.shape == (24, 32)
    assert not torch.equal(trained.head.pre_logits.weight, initial.head.pre_logits.weight)
    resized = vitds.create_model("auto", image_size=(8, 24), weights=tmp_path / "run")
    assert torch.equal(resized.pos_embed, torch.from_numpy(sincos2d_positions((2, 6), 32, False)))
