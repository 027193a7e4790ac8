"""tools/show_batch.py: a picture of what a command would train on, without DeepSpeed."""

import subprocess
import sys

import numpy as np
import pytest
from data_sets import write_pixels
from PIL import Image
from rank_processes import ROOT
from tiny_dataset import write_config

from vitds.preflight import plan_run
from vitds.step_view import sheet_of_step

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*({"torch", "deepspeed"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    data = write_pixels(folder / "data")
    vitds = {"model": "custom:width=8,depth=1,heads=1,mlp=8,patch=4", "image_size": 16, "num_steps": 9}
    config = write_config(folder / "run.json", train_batch_size=12, vitds=vitds)
    return ["--deepspeed_config", str(config), "--data", str(data)]


def show(*flags):
    command = [sys.executable, "-c", RUN, "tools/show_batch.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_sheet_is_that_of_the_step_whatever_the_number_of_ranks(arguments, tmp_path):
    flags, out = [*arguments, "--set", "data.recipe=deit3"], tmp_path / "sheet.png"
    done = show(*flags, "--step", 9, "--images", 10, "--ranks", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"written: {out}", "torch"]
    expected = sheet_of_step(plan_run(flags, {"WORLD_SIZE": "1", "RANK": "0"}), 9, 10)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and (np.asarray(sheet) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--out", "sheet.jpg"), "the sheet is a PNG"),
        (("--out", "/nowhere/x.png"), "/nowhere  no such directory"),
        (("--out", "x.png", "--step", "10"), "the run has 9 steps"),
        (("--out", "x.png", "--nmae", "x"), "unknown flag --nmae"),
        (("--out", "x.png", "--set", "data.recipe=deit4"), 'did you mean "deit3"?'),
        ((), "required: --out"),
    ],
)
def test_a_mistake_is_named_before_torch_is_there(arguments, flags, said):
    done = show(*arguments, *flags)
    assert done.returncode == 2 and said in done.stderr and not done.stdout.strip()
