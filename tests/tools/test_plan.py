"""tools/plan.py: the table, the recommended row, its configuration, the simulation, and short mistakes."""

import importlib.util
import json
import subprocess
import sys

import pytest
from rank_processes import ROOT
from tiny_dataset import write_dataset

from vitds.errors import OutOfMemory, VitdsError
from vitds.preflight import plan_run

SCRIPT = ROOT / "tools/plan.py"


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run the tool in this process and return what it printed."""
    spec = importlib.util.spec_from_file_location("plan_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def rows_of(output):
    """Cells of the table by row, the recommended row's arrow left out."""
    lines = [line.replace("->", "").split() for line in output.splitlines()]
    return [cells for cells in lines if cells and cells[0] in ("0", "1", "2", "3") and len(cells) > 9]


def test_every_way_has_a_row_and_one_is_recommended(plan):
    output = plan("--model", "ViT-H_14", "--image-size", "518", "--gpu-memory", "80", "--gpus", "8")
    rows = rows_of(output)
    ways = {(stage, mode, place) for stage, mode, place, *_ in rows}
    assert len(rows) == len(ways) == 3 * 3 * 2 and ("3", "full", "CPU") in ways
    assert output.count("->") == 1 and "recommended: ZeRO stage 1, activation checkpointing none" in output
    assert "not measured" in output


def test_nothing_is_recomputed_where_that_saves_no_time(plan):
    tiny = "custom:width=64,depth=4,heads=4,mlp=128,patch=4"  # the host is the slowest, whatever the GPU does
    output = plan("--model", tiny, "--image-size", "16", "--num-classes", "10", "--gpus", "2")
    rates = {cells[-2] for cells in rows_of(output) if cells[0] == "1" and cells[2] == "GPU"}
    assert len(rates) == 1 and "recommended: ZeRO stage 1, activation checkpointing none" in output


def test_money_is_gpu_hours_times_the_price(plan):
    output = plan("--model", "ViT-B_16", "--gpus", "4", "--price-per-hour", "10", "--epochs", "90")
    for *_, hours, price in rows_of(output):
        assert float(price.replace(",", "")) == pytest.approx(10 * float(hours.replace(",", "")), abs=6)


def test_less_memory_is_bought_with_recomputation(plan):
    arguments = ("--model", "ViT-G_14", "--gpus", "8", "--train-batch-size", "8")
    assert "activation checkpointing none" in plan(*arguments, "--gpu-memory", "80")
    small = plan(*arguments, "--gpu-memory", "4")
    assert "-: does not fit" in small and "optimizer in host memory" in small
    with pytest.raises(OutOfMemory, match="fits no GPU of 2 GiB"):
        plan(*arguments, "--gpu-memory", "2")


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        (["--model", "ViT-H_14", "--image-size", "518", "--gpus", "2"], 1),
        (["--model", "ViT-G_14", "--image-size", "224x448", "--gpus", "2", "--gpu-memory", "16"], 3),
        (["--model", "R50+ViT-B_16", "--dtype", "fp32", "--gpus", "2"], 0),
        (["--model", "ViT-L_16", "--dtype", "fp16", "--gpus", "2"], 1),
    ],
)
def test_the_written_file_is_a_run(plan, tmp_path, monkeypatch, arguments, stage):
    monkeypatch.chdir(tmp_path)
    output = plan(*arguments, "--write", "X.json")
    written = json.loads((tmp_path / "X.json").read_text())
    write_dataset(tmp_path / "data")
    made = plan_run(["--deepspeed_config", "X.json", "--data", "data"], {"WORLD_SIZE": "2", "RANK": "0"})
    row = next(line.replace("->", "").split() for line in output.splitlines() if "->" in line)
    assert [str(made.zero_stage), str(made.activation_checkpointing)] == row[:2]
    assert [made.batch.micro_batch, made.batch.accumulation_steps] == [int(row[3]), int(row[5])]
    assert made.batch.global_batch == 1024 and made.spec.name == written["vitds"]["model"]
    assert not made.warnings
    assert made.zero_stage == stage


def test_what_would_be_lost_or_without_effect_is_refused(plan, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for flags, said in (
        (["--write", tmp_path / "mine.json"], r"mine\.json  exists"),
        (["--write", tmp_path / "x.json", "--simulate"], "--simulate recommends nothing to write"),
        (["--zero-stage", "3"], "the table has every stage"),
    ):
        with pytest.raises(VitdsError, match=said):
            plan("--model", "ViT-Ti_16", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_file_that_cannot_be_written_is_named(plan, tmp_path):
    with pytest.raises(VitdsError, match=r"nowhere/x\.json  cannot be written: No such file or directory"):
        plan("--model", "ViT-Ti_16", "--write", tmp_path / "nowhere/x.json")


def test_scaling_goes_from_1_to_4096_gpus(plan):
    output = plan("--model", "ViT-L_16", "--simulate", "--gpus", "8", "--train-batch-size", "4096")
    weak = [cells for line in output.splitlines() if (cells := line.split())[1:2] == ["weak"]]
    assert [int(cells[0]) for cells in weak] == [2**power for power in range(13)]
    assert sum("strong" in line for line in output.splitlines()) == 13


def test_a_mistake_from_the_shell_is_short(tmp_path):
    command = [sys.executable, SCRIPT, "--model", "ViT-L_16", "--gpu-memry", "80"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and 'did you mean "--gpu-memory"?' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--model", "ViT-X_14"], "unknown model"),
        (["--model", "ViT-L_16", "--image-size", "225"], "does not fit"),
        (["--model", "ViT-L_16", "--gpus", "3"], "cannot share"),
        (["--model", "ViT-L_16", "--gpu-memory", "0"], "not above 0"),
        (["--gpus", "8"], "--model"),
    ],
)
def test_mistakes(plan, arguments, what):
    with pytest.raises(VitdsError, match=what) as error:
        plan(*arguments)
    assert error.value.exit_code == 2
