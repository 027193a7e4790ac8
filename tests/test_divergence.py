"""Numbers that go wrong on purpose, on one rank of two: what is skipped, what is said of it, when the run is over."""

import json
import shutil

import pytest
import torch
from counts import counted
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.feed import global_batch, micro_batches_at, open_data
from vitds.preflight import plan_run
from vitds.replay import plan_of, replay

POISONED = "tests/workers/poisoned.py"
ON_CPU = "tests/workers/fp16_on_cpu.py"
BF16 = {"bf16": {"enabled": True}}
# In this order: stage 3 patches torch in its process.
CASES = [
    pytest.param(0, {}, id="stage 0"),
    pytest.param(1, BF16, id="stage 1 bf16"),
    pytest.param(1, {}, id="stage 1", marks=pytest.mark.slow),
    pytest.param(2, {}, id="stage 2"),
    pytest.param(2, BF16, id="stage 2 bf16", marks=pytest.mark.slow),
    pytest.param(3, {}, id="stage 3", marks=pytest.mark.slow),
    pytest.param(3, BF16, id="stage 3 bf16"),
]

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ranks():
    with WarmRanks(2) as warm:
        yield warm


def events(run_dir):
    return [line for line in metrics(run_dir) if line["split"] == "event"]


def train_lines(run_dir):
    return [line for line in metrics(run_dir) if line["split"] == "train"]


def poisoned(order, command):
    return [POISONED, json.dumps(order), *command]


@pytest.mark.parametrize("stage, precision", CASES)
@counted("numbers go wrong on one of two ranks", "a gradient, then an output: skipped on all, named; stages 0 to 3")
def test_what_is_not_finite_on_one_rank_is_skipped_on_all_and_named(stage, precision, ranks, digits, tmp_path):
    """Two steps go wrong; that they are looked into leaves no trace in what is trained."""
    config = config_file(tmp_path, stage, **precision, vitds={"num_steps": 7})
    order = {"how": "gradient", "module": "blocks.1", "at": [[3, 2]]}
    both = order | {"also": {"how": "output", "module": "blocks.2.mlp.fc1", "at": [[5, 3]]}}
    output = ranks.run(poisoned(both, train_command(config, digits, tmp_path, "seen"))).output
    ranks.run(poisoned(both | {"blind": True}, train_command(config, digits, tmp_path, "blind")))
    assert "step 3: a gradient is not finite  first in blocks.1" in output
    assert "step 5: the loss of rank 1 is not finite  first in blocks.2.mlp.fc1, forward, rank 1" in output
    assert "skipped step 5" in (tmp_path / "seen" / "train.log").read_text()

    gradient, loss = events(tmp_path / "seen")
    assert (gradient["step"], gradient["cause"], gradient["ranks"]) == (3, "gradient", [])
    assert gradient["first"]["module"].startswith("blocks.1")
    assert gradient["first"] | {"module": ""} == {"micro_batch": 0, "is_backward": True, "rank": 1, "module": ""}
    assert gradient["num_keys"] == len(gradient["keys"]) == 16, "any sample of the step may be at fault"
    assert (loss["step"], loss["cause"], loss["ranks"]) == (5, "loss", [1])
    assert loss["first"] == {"micro_batch": 1, "is_backward": False, "rank": 1, "module": "blocks.2.mlp.fc1"}
    plan = plan_of(tmp_path / "seen")
    ids = torch.cat([pair.ids for pair in global_batch(plan, 5)])[12:].tolist()  # second micro-batch of the second rank
    places = [open_data(plan, "train").where(sample_id) for sample_id in ids]
    assert loss["keys"] == [[shard.rpartition("/")[2], key] for shard, key in places]

    lines = train_lines(tmp_path / "seen")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2, 2]
    assert len({line["lr"] for line in lines}) == 7, "the schedule goes on"
    assert lines == train_lines(tmp_path / "blind")
    assert_same_weights(weights(tmp_path / "seen", 7), weights(tmp_path / "blind", 7))


@pytest.mark.parametrize("stage, precision", CASES)
def test_what_was_skipped_between_two_lines_is_told_with_the_second(stage, precision, ranks, digits, tmp_path):
    """The device decides, in the first step too, and nobody asks it before a line is due; nothing else differs."""
    order = {"how": "gradient", "module": "blocks.1", "at": [[1, 0], [3, 2]]}
    seen = {}
    for every in (1, 4):
        ours = {"num_steps": 8, "save_every": 8, "log_every": every, "ema_decay": 0.5, "log_block_norms": True}
        changes = precision | {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
        config = config_file(tmp_path, stage, **changes, vitds=ours)
        ranks.run(poisoned(order, train_command(config, digits, tmp_path, f"every {every}")))
        seen[every] = [
            train_lines(tmp_path / f"every {every}")[3::4] if every == 1 else train_lines(tmp_path / f"every {every}"),
            events(tmp_path / f"every {every}"),
        ]
        seen[every] += [weights(tmp_path / f"every {every}", 8, state) for state in ("master", "ema")]
    assert seen[1][:2] == seen[4][:2]
    assert [event["step"] for event in seen[4][1]] == [1, 3] and seen[4][0][0]["skipped_steps"] == 2
    for one, other in zip(seen[1][2:], seen[4][2:], strict=True):
        assert_same_weights(one, other)


def test_a_stop_between_two_lines_tells_of_what_was_skipped_and_changes_nothing(ranks, digits, tmp_path):
    config = config_file(tmp_path, 2, vitds={"num_steps": 8, "save_every": 8, "log_every": 4})
    order = {"how": "gradient", "module": "blocks.1", "at": [[1, 0], [2, 2]]}
    ranks.run(poisoned(order, train_command(config, digits, tmp_path, "unbroken")))
    pieces = poisoned(order, train_command(config, digits, tmp_path, "pieces"))
    assert "skipped step 2" in ranks.run([*pieces, "--stop-at-step", "3"], exit_code=75).output
    ranks.run(pieces)
    assert metrics(tmp_path / "pieces") == metrics(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "pieces", 8), weights(tmp_path / "unbroken", 8))


@counted("numbers go wrong on one of two ranks", "in three steps in a row: exit 6, the last good checkpoint kept")
def test_so_many_in_a_row_end_the_run_with_the_last_good_checkpoint_kept(ranks, digits, tmp_path):
    keys = {"num_steps": 12, "save_every": 1, "keep_last": 1, "max_skipped_in_a_row": 3}
    command = train_command(config_file(tmp_path, 0, vitds=keys), digits, tmp_path, "run")
    order = {"how": "parameter", "module": "blocks.1.mlp.fc2", "at": [[5, 2]]}
    output = ranks.run(poisoned(order, command), exit_code=6).output
    assert "diverged  3 steps in a row were skipped" in output and "up to step 7" in output
    assert "lower the learning rate" in output
    assert [line["first"]["module"] for line in events(tmp_path / "run")] == ["blocks.1.mlp.fc2"] * 3
    assert checkpoints(tmp_path / "run") == ["global_step4"]
    assert all(torch.isfinite(one).all() for one in weights(tmp_path / "run", 4).values())
    assert "resumed at step 4" in ranks.run(command).output, "the cause is gone, and the run ends well"


def test_so_many_in_a_row_between_two_lines_end_the_run_when_that_is_known(ranks, digits, tmp_path):
    keys = {"num_steps": 20, "save_every": 4, "max_skipped_in_a_row": 3, "log_every": 20}
    command = train_command(config_file(tmp_path, 2, vitds=keys), digits, tmp_path, "run")
    order = {"how": "output", "module": "blocks.1", "at": [[5, 2], [6, 0], [7, 1]]}  # step 8, which is saved, would do
    output = ranks.run(poisoned(order, command), exit_code=6).output
    assert "diverged  3 steps in a row were skipped" in output and "up to step 7" in output
    assert [event["step"] for event in events(tmp_path / "run")] == [5, 6, 7]
    assert checkpoints(tmp_path / "run") == ["global_step4"]


@pytest.mark.parametrize("stage", [0, 2])
@counted("numbers go wrong on one of two ranks", "a learning rate of 1e38: exit 6, no lost weights saved")
def test_a_learning_rate_that_diverges_ends_the_run_and_saves_nothing_that_is_lost(stage, ranks, digits, tmp_path):
    optimizer = {"type": "SGD", "params": {"lr": 1e38}}
    scheduler = {"type": "constant", "params": {"warmup_num_steps": 0}}
    config = config_file(tmp_path, stage, optimizer=optimizer, scheduler=scheduler, vitds={"save_every": 1})
    ranks.run(train_command(config, digits, tmp_path, "run"), exit_code=6)
    for directory in (tmp_path / "run" / "checkpoints").glob("global_step*"):  # none, where the first update is lost
        of_step = weights(tmp_path / "run", int(directory.name.removeprefix("global_step")))
        assert all(torch.isfinite(one).all() for one in of_step.values())


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("global_step*"))


@pytest.mark.parametrize("stage, precision", [(0, {}), pytest.param(3, BF16, marks=pytest.mark.slow)])
@counted("numbers go wrong on one of two ranks", "rewind: back, on without the batches at fault, killed after it")
def test_a_rewind_leaves_out_the_batches_at_fault_and_a_kill_after_it_changes_nothing(
    stage, precision, ranks, digits, tmp_path
):
    """A micro-batch that is always infinite: back to step 4, then on without it and the batch before it."""
    data = {"train_crop": "none", "flip": 0.0}
    ours = {"num_steps": 12, "save_every": 4, "max_skipped_in_a_row": 1, "on_divergence": "rewind", "data": data}
    config = config_file(tmp_path, stage, **precision, vitds=ours)
    command = train_command(config, digits, tmp_path, "run")
    plan = plan_run(command[1:], {"WORLD_SIZE": "2", "RANK": "1"})
    _, fatal = micro_batches_at(plan, torch.device("cpu"), 6)
    order = {"how": "output", "module": "blocks.1", "sums": [float(fatal.images.double().sum())]}
    output = ranks.run(poisoned(order, command)).output
    assert "skipped step 7" in output and "back to step 4; left out from here on: the global batches 5, 6" in output

    lines = metrics(tmp_path / "run")
    (rewind,) = events(tmp_path / "run")
    assert (rewind["step"], rewind["event"], rewind["from_step"], rewind["left_out"]) == (5, "rewind", 7, [5, 6])
    train = train_lines(tmp_path / "run")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["samples_seen"] // 16 for line in train] == [1, 2, 3, 4, 5, *range(8, 15)]
    assert train[-1]["skipped_steps"] == 0
    replayed = replay(plan_of(tmp_path / "run"), tmp_path / "run", 8, tmp_path / "replay", num_shown=1)
    assert replayed.pixel_hash == train[7]["pixel_hash"]

    # As if killed between the rewind and the save after it; then stopped behind it.
    pieces = poisoned(order, train_command(config, digits, tmp_path, "pieces"))
    ranks.run([*pieces, "--stop-at-step", "7"], exit_code=75)
    shutil.rmtree(tmp_path / "pieces" / "checkpoints" / "global_step7")
    ranks.run([*pieces, "--stop-at-step", "9"], exit_code=75)
    ranks.run(pieces)
    assert metrics(tmp_path / "pieces") == lines
    assert_same_weights(weights(tmp_path / "pieces", 12), weights(tmp_path / "run", 12))

    # Where it is known at step 8 only, the same batches are left out.
    config = config_file(tmp_path, stage, **precision, vitds=ours | {"log_every": 12})
    output = ranks.run(poisoned(order, train_command(config, digits, tmp_path, "late"))).output
    assert "left out from here on: the global batches 5, 6 " in output
    assert events(tmp_path / "late")[-1]["from_step"] == 8
    assert_same_weights(weights(tmp_path / "late", 12), weights(tmp_path / "run", 12))


@counted("numbers go wrong on one of two ranks", "more rewinds than allowed: exit 6")
def test_after_so_many_rewinds_the_run_ends(ranks, digits, tmp_path):
    ours = {"num_steps": 12, "save_every": 2, "max_skipped_in_a_row": 2, "on_divergence": "rewind", "max_rewinds": 2}
    command = train_command(config_file(tmp_path, 1, vitds=ours), digits, tmp_path, "run")
    order = {"how": "parameter", "module": "blocks.0.mlp.fc1", "at": [[4, 0]]}
    output = ranks.run(poisoned(order, command), exit_code=6).output
    assert "2 steps in a row were skipped" in output and "after 2 rewinds" in output
    assert checkpoints(tmp_path / "run") == ["global_step2"]


def test_fp16_names_what_is_at_fault_but_not_each_step_of_its_search(ranks, digits, tmp_path):
    fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    command = train_command(config_file(tmp_path, 2, fp16=fp16), digits, tmp_path, "run")
    order = {"how": "output", "module": "blocks.0.norm1", "at": [[14, 0]]}
    output = ranks.run([ON_CPU, *poisoned(order, command)]).output
    (event,) = events(tmp_path / "run")
    assert event["step"] == 14 and event["first"]["module"] == "blocks.0.norm1"
    assert train_lines(tmp_path / "run")[-1]["skipped_steps"] > 3
    assert output.count("skipped step") == 1


FLOOR = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "loss_scale_window": 1000}


@counted("numbers go wrong on one of two ranks", "fp16's loss scale at its floor: exit 6, or a rewind")
def test_a_loss_scale_at_its_floor_ends_the_run_and_names_what_overflowed(ranks, digits, tmp_path):
    config = config_file(tmp_path, 2, fp16=FLOOR, vitds={"num_steps": 12, "save_every": 1, "keep_last": 1})
    order = {"how": "parameter", "module": "blocks.1.mlp.fc2", "at": [[5, 2]]}
    command = train_command(config, digits, tmp_path, "run")
    output = ranks.run([ON_CPU, *poisoned(order, command)], exit_code=6).output
    assert "the loss scale is at its floor, and the gradients of step 7 still overflow" in output
    assert [event["step"] for event in events(tmp_path / "run")] == [5, 6, 7], "from 4 to 2, to 1, and no further"
    assert events(tmp_path / "run")[-1]["first"]["module"] == "blocks.1.mlp.fc2"
    assert checkpoints(tmp_path / "run") == ["global_step4"]


@counted("numbers go wrong on one of two ranks", "fp16's loss scale at its floor: exit 6, or a rewind")
def test_a_run_at_the_floor_of_its_loss_scale_goes_back(ranks, digits, tmp_path):
    ours = {"num_steps": 12, "save_every": 4, "on_divergence": "rewind", "data": {"train_crop": "none", "flip": 0.0}}
    config = config_file(tmp_path, 1, fp16=FLOOR | {"initial_scale_power": 0}, vitds=ours)
    command = train_command(config, digits, tmp_path, "run")
    plan = plan_run(command[1:], {"WORLD_SIZE": "2", "RANK": "1"})
    _, fatal = micro_batches_at(plan, torch.device("cpu"), 6)
    order = {"how": "output", "module": "blocks.1", "sums": [float(fatal.images.double().sum())]}
    output = ranks.run([ON_CPU, *poisoned(order, command)]).output
    assert "back to step 4; left out from here on: the global batches 5, 6" in output
    assert train_lines(tmp_path / "run")[-1]["step"] == 12
