"""What is said about a stream before torch is imported: what is missing, what may not be run, what it is not."""

import json
import subprocess
import sys

import pytest
from rank_processes import ROOT
from tiny_dataset import write_config, write_dataset

from vitds.errors import ConfigError, DataError, UsageError
from vitds.preflight import plan_run
from vitds.stream_facts import WEAKER_GUARANTEE, is_stream, shard_urls


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "shards").mkdir()
    for number in range(3):
        (tmp_path / f"shards/cats-{number:02}.tar").write_bytes(b"")
    config = write_config(tmp_path / "run.json")

    def of(data="shards/cats-{00..02}.tar", *flags):
        path = data if ":" in data else tmp_path / data
        return plan_run(["--deepspeed_config", str(config), "--data", str(path), *flags], {})

    return of


ENOUGH = ("--samples-per-epoch", "40", "--num-classes", "5")


@pytest.mark.parametrize(
    "path",
    ["a-{0..3}.tar", "a.tar", "a.tar.gz", "a.tgz", "https://h/a.tar?sig=b/c", "pipe:cat a", "s3://b/{a,b}", "x::a.tar"],
)
def test_streams_are_told_from_directories(path):
    assert is_stream(path)


@pytest.mark.parametrize("path", ["data/imagenet", "a,b", "https://host/data", "s3://bucket/tar"])
def test_directories_are_no_streams(path, tmp_path):
    (tmp_path / "odd{name}.tar").mkdir()
    assert not is_stream(path) and not is_stream(str(tmp_path / "odd{name}.tar"))


def test_braces_and_double_colons_name_shards_in_order():
    assert shard_urls("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert shard_urls("{x,y}.tar::pipe:cat {1..2}") == ["x.tar", "y.tar", "pipe:cat 1", "pipe:cat 2"]
    with pytest.raises(UsageError, match="braces that do not match"):
        shard_urls("a-{0..3.tar")


def test_a_stream_is_planned_and_its_weaker_guarantee_said_once(plan):
    planned = plan("shards/cats-{00..02}.tar", *ENOUGH, "--epochs", "2")
    assert (planned.num_train, planned.num_val, planned.num_classes, planned.num_steps) == (40, 0, 5, 10)
    assert planned.classes == ["0", "1", "2", "3", "4"]
    assert planned.warnings.count(WEAKER_GUARANTEE) == 1
    assert planned.run.name == "ViT-Ti_16-cats"


def test_the_resolved_configuration_gives_the_run_again(plan, tmp_path):
    first = plan("shards/cats-{00..02}.tar", *ENOUGH)
    (tmp_path / "resolved.json").write_text(json.dumps(first.resolved()))
    assert plan_run(["--deepspeed_config", str(tmp_path / "resolved.json")], {}).resolved() == first.resolved()


def test_a_val_split_of_another_directory_is_evaluated_when_its_labels_mean_the_same(plan, tmp_path):
    def validated(*flags, **counts):
        write_dataset(tmp_path / "val", **{"classes": ("cat", "dog"), "train": None, "val": (3, 4)} | counts)
        return plan(*flags, "--set", f"data.val_path={tmp_path}/val")

    stream = ("shards/cats-{00..02}.tar", *ENOUGH)
    assert validated(*stream).num_val == 7 and validated(*stream).num_train == 40
    write_dataset(tmp_path / "data")
    assert (validated("data").num_train, validated("data").num_val) == (10, 7)
    with pytest.raises(DataError, match="its 2 classes are not the 2 of the training data, in their order"):
        validated("data", classes=("dog", "cat"))
    with pytest.raises(DataError, match="validation has 1 class that training lacks: dog"):
        write_dataset(tmp_path / "data", train=(5, 0))
        validated("data")
    with pytest.raises(DataError, match="the validation split is missing"):
        validated(*stream, train=(1, 1), val=None)


@pytest.mark.parametrize("place", ["shards", "."])
def test_the_names_of_a_classes_json_beside_local_shards_are_taken(plan, tmp_path, place):
    (tmp_path / place / "classes.json").write_text(json.dumps(["cat", "dog"]))
    planned = plan("shards/cats-{00..02}.tar", "--samples-per-epoch", "40")
    assert planned.classes == ["cat", "dog"] and planned.num_classes == 2
    with pytest.raises(DataError, match="the data has 2 classes and the head 1 output"):
        plan("shards/cats-{00..02}.tar", "--samples-per-epoch", "40", "--num-classes", "1")


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "do not say how many samples they hold, nor how many classes there are"),
        (ENOUGH[:2], "do not say how many classes there are"),
        (ENOUGH[2:], "do not say how many samples they hold"),
        ((*ENOUGH, "--sampling", "balanced"), '"data.sampling" needs an index'),
        ((*ENOUGH, "--set", "data.repeats=2"), '"data.repeats" needs an index'),
        ((*ENOUGH, "--set", "data.shuffle_window=2"), '"data.shuffle_window" needs an index'),
        ((*ENOUGH, "--class-weights", "auto"), "auto needs the number of samples of each class"),
    ],
)
def test_what_a_stream_needs_and_cannot_serve(plan, flags, message):
    with pytest.raises(ConfigError, match=message):
        plan("shards/cats-{00..02}.tar", *flags)


@pytest.mark.parametrize("path", ["shards/cats-*.tar", "s3://bucket/cats-*.tar", "https://h/cats-*.tar?sig=*"])
def test_a_star_is_refused_with_what_to_use_in_its_place(plan, path, tmp_path):
    with pytest.raises(UsageError, match=r"\* is not expanded") as caught:
        plan(path, *ENOUGH)
    assert caught.value.where.endswith("cats-*.tar") and "{000000..000005}" in caught.value.fix
    (tmp_path / "shards/cats-*.tar").write_bytes(b"")  # may be a name
    assert plan("shards/cats-*.tar", *ENOUGH).num_train == 40
    assert plan("https://h/cats.tar?sig=*", *ENOUGH).num_train == 40


def test_local_shards_that_do_not_exist_are_named(plan):
    with pytest.raises(DataError) as caught:
        plan("shards/cats-{01..05}.tar", *ENOUGH)
    assert caught.value.where.endswith("cats-03.tar")
    assert caught.value.what == "no such shard, and 2 more of 5"


@pytest.mark.parametrize(
    "path, said",
    [
        ("pipe:cat x.tar", "pipe: runs a shell command"),
        ("{shards/cats-00.tar,pipe:cat x.tar}", "pipe: runs a shell command"),
        ("http://h/a.tar::pipe:cat x.tar", "pipe: runs a shell command"),
        ("sftp://h/a.tar", "sftp: runs curl"),
        ("hf://datasets/a/b.tar", "hf: runs curl"),
    ],
)
def test_commands_are_refused_with_the_reason_unless_allowed(plan, path, said):
    with pytest.raises(UsageError, match=said) as caught:
        plan(path, *ENOUGH)
    assert "--allow-pipe" in caught.value.fix
    if "cats" not in path:
        assert plan(path, *ENOUGH, "--allow-pipe").num_train == 40


def test_unknown_ways_to_open_a_shard_are_refused(plan):
    with pytest.raises(UsageError, match="gopher: is no way to open a shard"):
        plan("gopher://h/a.tar", *ENOUGH)


def test_samples_per_epoch_of_indexed_data_is_warned_about(plan, tmp_path):
    write_dataset(tmp_path / "data")
    assert any("samples_per_epoch has no effect" in said for said in plan("data", "--samples-per-epoch", "4").warnings)


def test_a_refusal_comes_before_torch(tmp_path):
    config = write_config(tmp_path / "run.json")
    command = ["--deepspeed_config", str(config), "--data", "pipe:rm x.tar", "--num-classes", "2"]
    code = (
        "import sys\nfrom vitds.errors import UsageError\nfrom vitds.preflight import plan_run\n"
        "try: plan_run(sys.argv[1:], {})\nexcept UsageError: print({'torch', 'webdataset'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
