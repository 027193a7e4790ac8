"""--profile: a trace a rank, and a table that adds up to the wall time, of a run that is otherwise the same."""

import gzip
import json
import re

import pytest
from forked_ranks import ForkedRanks
from run_directory import config_file, metrics, train_command

from vitds.run_config import check_entry
from vitds.step_profile import union, without


def table_of(output: str) -> dict[str, float]:
    """Milliseconds a step, by row."""
    lines = output.split("profile of 2 steps, ms each\n")[1].splitlines()[:8]
    return {row[0].strip(): float(row[1]) for row in (re.split(r"\s{2,}", line.strip()) for line in lines)}


@pytest.mark.ranks
def test_profiled_steps_add_up_to_their_wall_time_and_change_no_loss(digits, tmp_path):
    config = config_file(tmp_path, 2, vitds={"num_steps": 5, "save_every": 5, "workers": 0})
    with ForkedRanks(2) as ranks:
        ranks.run(train_command(config, digits, tmp_path, "plain"), tmp_path / "plain.txt")
        command = train_command(config, digits, tmp_path, "profiled", "--profile", "3:2")
        ranks.run([*command, "--set", "log_block_norms=true"], tmp_path / "profiled.txt")
    table = table_of((tmp_path / "profiled.txt").read_text())
    assert list(table) == ["data", "forward", "backward", "optimizer", "other", "communication", "sum", "wall time"]
    assert all(taken > 0 for taken in table.values())
    assert sum(list(table.values())[:6]) == pytest.approx(table["sum"], abs=0.1)
    assert table["sum"] == pytest.approx(table["wall time"], rel=0.05)
    for rank in (0, 1):
        trace = tmp_path / f"profiled/trace-step3-rank{rank}.json.gz"
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        marks = [event["name"] for event in events if str(event.get("name", "")).startswith("phase ")]
        assert marks.count("phase forward") == marks.count("phase data") == 2 * 2  # two micro-batches a step
        assert any(str(event.get("name")).startswith("gloo:") for event in events)
    blocks = [f"grad_norm_{name}" for name in ("embed", "block_0", "block_1", "block_2", "head")]
    lines = metrics(tmp_path / "profiled")
    for line in lines:
        if line["split"] == "train":
            norms = [line.pop(name) for name in blocks]
            assert min(norms) > 0 or line["step"] <= 2  # the head begins at zero, and the warmup with it
    assert lines == metrics(tmp_path / "plain")


def test_time_is_counted_once():
    assert union([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]
    assert without([(0, 10), (12, 14)], [(2, 3), (5, 11), (13, 20)]) == [(0, 2), (3, 5), (12, 13)]
    assert without([(0, 1)], []) == [(0, 1)]


@pytest.mark.parametrize("wanted", ["5", "0:3", "5:0", "a:b"])
def test_what_is_no_range_of_steps(wanted):
    with pytest.raises(ValueError, match="STEP:COUNT such as 100:5"):
        check_entry("profile", wanted)
