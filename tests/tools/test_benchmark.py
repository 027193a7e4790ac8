"""tools/benchmark.py: the command line, the JSON, and the arithmetic of rounds. Nothing here asserts a time."""

import importlib.util
import json
import subprocess
import sys

import pytest
from rank_processes import ROOT

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


def test_children_count_once_they_are_waited_for(rounds):
    def child():
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)

    assert rounds.interleaved({"child": child}, rounds=1)["child"][0].cpu_s > 0.25


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
@pytest.mark.parametrize(("command", "line"), [("checkpoint", "foreground over"), ("optimizer", "layer decay over")])
def test_saves_and_updates_are_measured(tmp_path, command, line):
    tiny = "custom:width=32,depth=2,heads=2,mlp=64,patch=16"
    done = benchmark(command, "--model", tiny, "--rounds", "2", "--json", tmp_path / "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert any(line in figure["name"] for figure in figures) and all(figure["value"] != 0 for figure in figures)
