"""Training from a stream by launch/train.py on 1, 2 and 3 real ranks: equal steps, stops, resumes, damage."""

import functools
import json
import os
import shutil
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from data_sets import write_pixels
from run_directory import config_file, metrics, train_command
from tar_shards import NUM_CLASSES, write_shards
from warm_ranks import WarmRanks
from web_server import Server, serving

from vitds.stream_facts import WEAKER_GUARANTEE

pytestmark = pytest.mark.ranks

SIZES = (7, 1, 30)
FLAGS = ("--samples-per-epoch", "38", "--num-classes", str(NUM_CLASSES))


NUM_RANKS = [1, 2, 3]


@pytest.fixture(scope="module")
def ranks():
    """As many ranks as asked for, started once."""
    with ExitStack() as stack, patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
        yield functools.cache(lambda num_ranks: stack.enter_context(WarmRanks(num_ranks)))


def command(folder, name, *flags, shards="shards/s-{000..002}.tar", batch=6, **ours):
    config = config_file(
        folder, 0, train_batch_size=batch, gradient_accumulation_steps=1,
        vitds={"num_steps": 8, "save_every": 4, "log_every": 1, "workers": 1, "data": {"shuffle_buffer": 2}, **ours},
    )  # fmt: skip
    return train_command(config, shards if "://" in shards else folder / shards, folder, name, *FLAGS, *flags)


def shards_done(run_dir, step):
    manifest = json.loads((run_dir / f"checkpoints/global_step{step}/MANIFEST.json").read_text())
    first, *beyond = manifest["info"]["shards_done"]
    return {*range(first), *beyond}


@pytest.mark.parametrize("sizes, workers", [(SIZES, 2), ((38,), 2), ((5, 9, 3, 14, 7), 0)])
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_every_label_is_right_and_ranks_keep_step_with_uneven_and_few_shards(
    ranks, tmp_path, num_ranks, sizes, workers
):
    pattern = write_shards(tmp_path, sizes)
    answer = ranks(num_ranks).run(["tests/workers/stream_labels.py", pattern, workers, 40])
    said = json.loads(answer.output.splitlines()[-1])
    assert said == {"micro_batches": 80, "keys": 38}  # every sample came


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_run_takes_its_steps_and_says_its_guarantee_once(ranks, tmp_path, num_ranks):
    write_shards(tmp_path / "shards", SIZES)
    output = ranks(num_ranks).run(command(tmp_path, "run")).output
    assert output.count(WEAKER_GUARANTEE) == 1
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [6 * step // 38 for step in range(1, 9)]
    assert json.loads((tmp_path / "run/classes.json").read_text()) == [str(label) for label in range(NUM_CLASSES)]
    assert 0 in shards_done(tmp_path / "run", 8)


@pytest.fixture(scope="module")
def stopped(ranks, tmp_path_factory):
    """A run of two ranks that was stopped at its third step, and the shards that it reads."""
    folder = tmp_path_factory.mktemp("stopped")
    write_shards(folder / "shards", [4] * 12)
    output = ranks(2).run(command(folder, "run", "--stop-at-step", "3"), exit_code=75).output
    assert "stopped at step 3, checkpoint saved" in output
    return folder


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_stopped_run_goes_on_from_its_shards_on_any_number_of_ranks(ranks, stopped, tmp_path, num_ranks):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    before = shards_done(tmp_path / "run", 3)
    assert before
    output = ranks(num_ranks).run(command(tmp_path, "run")).output
    assert "resumed at step 3 of 8" in output
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    assert before < shards_done(tmp_path / "run", 8)


def test_other_shards_are_other_data(ranks, stopped):
    write_shards(stopped / "more", [4] * 13)
    output = ranks(2).run(command(stopped, "run", shards="more/s-{000..012}.tar"), exit_code=4).output
    assert "the data differ from those of the checkpoint" in output


def test_another_directory_validates_a_stream(ranks, tmp_path):
    write_shards(tmp_path / "shards", SIZES)
    data = write_pixels(tmp_path / "indexed", num_train=5, num_val=13)
    output = ranks(1).run(command(tmp_path, "run", "--set", f"data.val_path={data}")).output
    assert [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "val"] == [8]
    assert "best top-1" in output


def test_damage_ends_the_run_or_is_named_counted_and_passed_over(ranks, tmp_path):
    write_shards(tmp_path / "shards", [9, 9, 9])
    cut = tmp_path / "shards/s-001.tar"
    cut.write_bytes(cut.read_bytes()[:2100])
    output = ranks(1).run(command(tmp_path, "strict", num_steps=40), exit_code=3).output
    assert f"{cut}" in output and "cut off" in output
    tolerant = command(tmp_path, "run", "--max-bad-samples", "0.5")
    output = ranks(1).run([*tolerant, "--stop-at-step", "6"], exit_code=75).output
    lost = "lost the rest of a shard, about 12 samples"
    assert output.count(f"{lost}  {cut}: cannot be read, or not to its end: cut off") == 1
    assert "about 12 of 38 training samples are bad and were replaced" in output
    output = ranks(1).run(tolerant).output
    assert "about 12 of 38 training samples are bad" in output and lost not in output  # known by then


def test_shards_come_over_http_with_broken_connections_and_through_an_allowed_pipe(ranks, tmp_path):
    write_shards(tmp_path / "shards", SIZES)
    server = Server()
    server.root, server.drop_after = tmp_path / "shards", 20_000
    with serving(server) as address:
        ranks(1).run(command(tmp_path, "http", shards=f"{address}/s-{{000..002}}.tar"))
    assert any(asked for _, asked in server.requests)
    pipe = f"pipe:cat {tmp_path}/shards/s-{{000..002}}.tar"
    refused = ranks(1).run(command(tmp_path, "pipe", "--data", pipe), exit_code=2).output
    assert "pipe: runs a shell command" in refused and "--allow-pipe" in refused
    ranks(1).run(command(tmp_path, "pipe", "--data", pipe, "--allow-pipe"))
    assert len(metrics(tmp_path / "pipe")) == 8
