"""How often the host waits for the device between two lines of the log.

Never at ZeRO stages 0 to 2 in fp32 and bf16, once an update for the loss scale of float16; stage 3 waits in DeepSpeed.
"""

import json

import pytest
from run_directory import config_file, train_command
from warm_ranks import WarmRanks

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 accumulated": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
    "fp16 autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}
# Whatever draws, drops, averages or follows is on, and every layer has parameter groups of its own.
RECIPE = {
    "num_steps": 8,
    "log_every": 4,
    "save_every": 8,
    "token_drop": 0.25,
    "drop_path_subset": True,
    "ema_decay": 0.99,
    "log_block_norms": True,
    "weight_decay_on": "matrices",
    "layer_decay": 0.9,
    "class_weights": [1.0 + 0.1 * i for i in range(10)],
    "data": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}
NUM_GROUPS = 10  # matrices and others, before, in and behind three blocks
OF_HOST_MEMORY = "vitds/stop.py _outcome"  # the ranks' vote to stop goes over gloo, in memory that no device has seen
VERDICT = "deepspeed/runtime/utils.py is_invalid_grad_norm"
OF_BACKWARD = "synchronize deepspeed/runtime/zero/{}.py independent_gradient_partition_epilogue"
# Behind each backward, and for the small parameters that are gathered once an update.
WAITS_OF_STAGE_3 = [OF_BACKWARD.format("stage3")] * 2 + [
    "synchronize deepspeed/runtime/zero/partition_parameters.py wait"
]


@pytest.fixture(scope="module")
def ranks():
    with WarmRanks(1) as started:
        yield started


def steps_between_lines(ranks, digits, tmp_path, precision, stage, **changes):
    """What made the host wait in steps 5, 6 and 7, and in step 8, which is logged: [[what, place, in_step], ...]."""
    on_cpu = ["tests/workers/fp16_on_cpu.py"] if precision == "fp16" else []
    config = config_file(tmp_path, stage, **PRECISIONS[precision], vitds=RECIPE, **changes)
    command = train_command(config, digits, tmp_path, "run")
    ranks.run([*on_cpu, "tests/workers/host_reads.py", tmp_path / "places.json", *command])
    steps = json.loads((tmp_path / "places.json").read_text())
    return steps[4:7], steps[7]


def waits_of_an_update(precision, stage):
    """In order: of the two micro-batches, then of the step."""
    if not precision.startswith("fp16"):
        return WAITS_OF_STAGE_3 if stage == 3 else []
    if stage < 3:
        return [f"read {VERDICT}"]
    # The -1 that marks a norm which is not finite is copied to the device for each group.
    norms = ["upload deepspeed/runtime/zero/stage3.py get_grad_norm_direct"] * NUM_GROUPS
    return [*WAITS_OF_STAGE_3[:2], *norms, f"read {VERDICT}", *WAITS_OF_STAGE_3[2:]]


def assert_waits(ranks, digits, tmp_path, precision, stage, expected=None, **changes):
    between, logged = steps_between_lines(ranks, digits, tmp_path, precision, stage, **changes)
    expected = waits_of_an_update(precision, stage) if expected is None else expected
    for step in between:
        device = [wait for wait in step if wait[1] != OF_HOST_MEMORY]
        assert [f"{what} {place}" for what, place, _ in device] == expected
        assert all(in_step or what == "synchronize" for what, _, in_step in device)
    assert "vitds/collectives.py mean_over_ranks" in [place for _, place, _ in logged]  # they would have been seen


@pytest.mark.ranks
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 2), ("bf16", 3)])
def test_nothing_waits_but_an_update_for_its_loss_scale(ranks, digits, tmp_path, precision, stage):
    assert_waits(ranks, digits, tmp_path, precision, stage)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_at_every_stage(ranks, digits, tmp_path, precision, stage):
    assert_waits(ranks, digits, tmp_path, precision, stage)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_wait_no_more_often_than_one(digits, tmp_path):
    with WarmRanks(2) as ranks:
        assert_waits(ranks, digits, tmp_path, "bf16", 2)


@pytest.mark.ranks
@pytest.mark.parametrize("stage, num_waits", [(1, 1), (2, 2)])
def test_overlapped_communication_is_waited_for_where_gradients_are_reduced(ranks, digits, tmp_path, stage, num_waits):
    overlap = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    expected = [OF_BACKWARD.format("stage_1_and_2")] * num_waits
    assert_waits(ranks, digits, tmp_path, "fp32", stage, expected, **overlap)


@pytest.mark.ranks
def test_a_timer_that_is_asked_for_waits_twice_a_micro_batch(ranks, digits, tmp_path):
    timers = {"timers": {"throughput": {"enabled": True}}}
    between, _ = steps_between_lines(ranks, digits, tmp_path, "fp32", 1, **timers)
    assert [[what for what, *_ in step].count("synchronize") for step in between] == [4, 4, 4]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2), ("fp16", 2), ("bf16", 3)])
def test_a_gpu_is_waited_for_by_what_is_known_to(ranks, digits, tmp_path, precision, stage):
    """What torch sees itself, in our code only: DeepSpeed's stage 3 waits for what it fetches."""
    between, logged = steps_between_lines(ranks, digits, tmp_path, precision, stage)
    for step in between:
        assert [wait for wait in step if wait[1].startswith("vitds/") and not wait[2]] == []
        read = [f"{what} {place}" for what, place, _ in step if what in ("read", "upload")]
        assert read == [wait for wait in waits_of_an_update(precision, stage) if not wait.startswith("synchronize")]
        if stage < 3:
            assert [what for what, *_ in step].count("cuda") == len(read)
    assert "cuda" in [what for what, *_ in logged]
