"""tools/benchmark.py: the command line, the JSON, and the arithmetic of rounds. Nothing here asserts a time."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from rank_processes import ROOT

from vitds.errors import VitdsError

SCRIPT = ROOT / "tools/benchmark.py"


def benchmark(*arguments, cwd):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def rounds():
    spec = importlib.util.spec_from_file_location("benchmark_rounds", ROOT / "tools/benchmarks/rounds.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants_take_turns_and_the_first_round_does_not_count(rounds):
    ran = []
    costs = rounds.interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, rounds=3)
    assert sorted(ran) == sorted("abc" * 4) and ["".join(ran[i : i + 3]) for i in (0, 3, 6, 9)] == [
        "cab", "abc", "bca", "cab",
    ]  # fmt: skip
    assert {name: len(values) for name, values in costs.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_speedup_is_the_median_of_ratios_within_rounds(rounds):
    costs = {
        "ours": [rounds.Cost(1, 9), rounds.Cost(2, 9), rounds.Cost(10, 9)],
        "theirs": [rounds.Cost(2, 9), rounds.Cost(6, 9), rounds.Cost(10, 9)],
    }
    figure = rounds.speedup(costs, "ours", "theirs", bound=1.5)
    assert (figure.value, figure.lowest, figure.highest, figure.bound) == (2, 1, 3, 1.5)
    assert rounds.rate(costs, "ours", 100, "images/s").value == 50


def test_variants_that_compute_something_else_are_not_compared(rounds):
    losses = {"ours": [7.0, 6.5, 6.2], "theirs": [7.0, 6.51, 6.2]}
    rounds.check_losses(losses, tolerance=2e-3)
    for wrong in ([7.0, 6.6, 6.2], [7.0, 6.5, float("nan")]):
        with pytest.raises(VitdsError, match="ours and theirs do not compute the same"):
            rounds.check_losses(losses | {"theirs": wrong}, tolerance=2e-3)
    with pytest.raises(VitdsError, match="hardly move"):
        rounds.check_losses({"ours": [6.9078] * 3, "theirs": [6.9078] * 3}, tolerance=2e-3)


def test_children_count_once_they_are_waited_for(rounds):
    def child():
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)

    assert rounds.interleaved({"child": child}, rounds=1)["child"][0].cpu_s > 0.25


def test_a_place_that_takes_no_json_is_named_before_anything_is_measured(tmp_path):
    done = benchmark("data", "--json", tmp_path / "nowhere/figures.json", cwd=tmp_path)
    assert done.returncode == 2 and f"{tmp_path}/nowhere  cannot be written to" in done.stderr


def test_every_figure_goes_into_the_json(tmp_path):
    done = benchmark("data", "--limit", 8, "--rounds", 1, "--json", tmp_path / "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    assert document["environment"]["command"].startswith("python tools/benchmark.py data --limit 8")
    assert document["environment"]["versions"]["torch"] != "none"
    assert document["figures"] and all(figure["name"] in done.stdout for figure in document["figures"])


@pytest.mark.parametrize("arguments, said", [(["dat"], 'did you mean "data"'), (["data", "--round", "3"], "--rounds")])
def test_mistakes_are_short(arguments, said, tmp_path):
    done = benchmark(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_shards_are_measured_beside_their_peers_and_the_scratch_is_gone(tmp_path):
    (tmp_path / "scratch").mkdir()
    arguments = ("--num-images", 30, "--rounds", 1, "--scratch", tmp_path / "scratch", "--json", tmp_path / "figures")
    done = benchmark("shard", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [figure["name"] for figure in json.loads((tmp_path / "figures").read_text())["figures"]]
    assert {"vitds from a tar of tars", "webdataset ShardWriter", "Python tarfile", "tar cf", "dd bs=1M"} <= set(names)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.ranks
@pytest.mark.parametrize(("command", "line"), [("checkpoint", "foreground over"), ("optimizer", "one tensor over")])
def test_saves_and_updates_are_measured(tmp_path, command, line):
    tiny = "custom:width=32,depth=2,heads=2,mlp=64,patch=16"
    done = benchmark(command, "--model", tiny, "--rounds", "2", "--json", tmp_path / "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert any(line in figure["name"] for figure in figures) and all(figure["value"] != 0 for figure in figures)


def train_figures(*arguments, cwd):
    tiny = ("--model", "custom:width=64,depth=2,heads=4,mlp=128,patch=8", "--image-size", 16, "--rounds", 1)
    done = benchmark("train", *tiny, *arguments, "--json", cwd / "figures.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {(one["name"], one["unit"]): one for one in json.loads((cwd / "figures.json").read_text())["figures"]}


def test_layers_are_measured_one_by_one(tmp_path):
    tiny = ["--model", "custom:width=32,depth=1,heads=2,mlp=64,patch=4", "--image-size", 16, "--batch", 2]
    done = benchmark("layers", *tiny, "--rounds", 1, "--precision", "fp32", "--json", tmp_path / "f.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure["value"] for figure in json.loads((tmp_path / "f.json").read_text())["figures"]}
    assert {"qkv", "fc2", "attention, auto", "attention, math", "patches, product"} <= figures.keys()
    assert "patches, product over patches, convolution" in figures and all(value > 0 for value in figures.values())
    assert "cudnn attention does not run on this device" in done.stdout or "attention, cudnn" in figures


@pytest.mark.ranks
def test_training_is_measured_beside_the_same_model_without_deepspeed_and_timms(tmp_path):
    left_out = ("--token-drop", 0.5, "--drop-path", 0.4, "--fp8")
    figures = train_figures("--only", "vitds", "timm", "--zero-stages", 1, 2, *left_out, cwd=tmp_path)
    loops = ("vitds, ZeRO-1", "vitds, ZeRO-2", "vitds, plain loop", "timm, plain loop", "timm, timm's loop")
    for loop in loops:
        images, operations = figures[loop, "images/CPU s"]["value"], figures[loop, "TFLOP/CPU s"]["value"]
        # per image: 4 patches of 8 x 8 x 3 to 64; twice 5 tokens through 4 x 64 x 64 + 2 x 64 x 128, 2 x 5 x 5 x 64
        assert operations * 1e12 == pytest.approx(
            images * 6 * (4 * 192 * 64 + 2 * (5 * (16_384 + 16_384) + 3_200) + 64_000)
        )
    assert figures["vitds, ZeRO-2 adds to the plain loop", "%"]["bound"] == 10
    for what in ("token_drop 0.5", "drop_path 0.4", "drop_path 0.4 by subset"):
        assert figures[f"vitds, plain loop, {what} over vitds, plain loop", "times"]["value"] > 0
    for loop in ("ZeRO-2", "plain loop"):
        assert figures[f"vitds fp8, {loop} over vitds, {loop}", "times"]["value"] > 0
    assert figures["vitds, timm's loop over timm, timm's loop", "times"]["value"] > 0


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compiled_blocks_are_measured_beside_those_that_are_not(tmp_path):
    figures = train_figures("--only", "vitds", "--compile", "--precision", "fp32", cwd=tmp_path)
    for loop in ("ZeRO-1", "plain loop"):
        assert figures[f"vitds compiled, {loop} over vitds, {loop}", "times"]["value"] > 0


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_all_peers_compute_the_same_at_every_stage(stage, checkpointing, tmp_path):
    pytest.importorskip("transformers")
    precision = ("--precision", "bf16" if stage else "fp32", "--activation-checkpointing", checkpointing)
    figures = train_figures("--zero-stages", stage, *precision, cwd=tmp_path)
    assert (f"vitds, ZeRO-{stage} over Hugging Face, ZeRO-{stage}", "times") in figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--zero-stages", "0"], "use stage 1"),
        (["--fp8", "--precision", "fp32"], "fp8 is for bf16"),
        (["--only", "jax"], "no variant is left"),
    ],
)
def test_what_cannot_be_trained_is_said(arguments, said, tmp_path):
    done = benchmark("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def accuracy_figures(*arguments, cwd):
    done = benchmark("accuracy", *arguments, "--json", cwd / "figures.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    figures = json.loads((cwd / "figures.json").read_text())["figures"]
    return {(one["name"], one["unit"]): one for one in figures}, done.stdout


@pytest.mark.ranks
def test_accuracy_is_measured_beside_a_plain_loop(tmp_path):
    figures, said = accuracy_figures("--rounds", 1, "--samples", 1280, cwd=tmp_path)
    assert figures["plain loop, mean", "% top-1"]["value"] > 30  # of 10 digits
    assert abs(figures["vitds, ZeRO-1 minus plain loop", "points"]["value"]) < 3  # about as exact as 20 steps are equal
    assert "one seed has no spread" in said and figures["vitds, ZeRO-1, a run", "steps"]["value"] == 20


@pytest.mark.ranks
@pytest.mark.slow
def test_an_accelerator_is_judged_at_equal_time_and_all_by_the_spread_of_seeds(tmp_path):
    arguments = ("--rounds", 2, "--samples", 6400, "--accelerators", "token_drop=0.5")
    figures, said = accuracy_figures(*arguments, cwd=tmp_path)
    for pair in ("vitds, ZeRO-1 minus plain loop", "token_drop=0.5 minus vitds, ZeRO-1"):
        held = figures[pair, "points"]
        verdict = "within" if abs(held["value"]) <= held["bound"] else "not within"
        assert f"{pair}: {held['value']:+.2f} points, {verdict} the spread" in said
    values = [figures[f"plain loop, seed {seed}", "% top-1"]["value"] for seed in (1, 2)]
    assert figures["plain loop, mean", "% top-1"]["value"] == pytest.approx(sum(values) / 2)
    deviation = figures["plain loop, standard deviation", "points"]["value"]
    assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "64"], "--samples 1280 or more"),
        (["--data", "nowhere"], "no data set directory"),
        (["--samples", "1280", "--accelerators", "token_dorp=1"], "token_drop"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments, said, tmp_path):
    done = benchmark("accuracy", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(tmp_path):
    figures = train_figures("--precision", "fp16", "--batch", 4, cwd=tmp_path)
    assert figures["vitds, ZeRO-1, peak memory", "GiB"]["value"] > 0
