"""Curves are drawn from what a run wrote."""

import json
import xml.etree.ElementTree as ET

import pytest

from vitds.errors import CheckpointError
from vitds.report import draw_curves


def write_run(directory, lines):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_curves_show_every_run_and_are_well_formed(tmp_path):
    train = [{"step": step, "split": "train", "loss": 2.5 - step / 10} for step in range(1, 11)]
    val = [{"step": 10, "split": "val", "loss": 1.7, "top1": 0.625}]
    first = write_run(tmp_path / "first", train + val)
    second = write_run(tmp_path / "a<b", [*train[:3], {"step": 4, "split": "train", "loss": None}])

    root = ET.fromstring(draw_curves([first, second]))

    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"first train 1.5", "● first val 1.7", "● first val 62.5", "a<b train 2.2"} <= set(texts)


def test_the_mean_average_precision_has_a_panel_of_its_own(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 10, "split": "val", "loss": 1.7, "map": 0.375}])
    picture = draw_curves([run])
    assert "mAP, %" in picture and "● run val 37.5" in picture and "top-1" not in picture


def test_a_run_without_validation_has_one_panel(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "split": "train", "loss": 1.0}])
    assert "top-1" not in draw_curves([run])


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        draw_curves([tmp_path])


def test_a_run_that_is_not_there_is_said_with_the_nearest_that_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such directory$"):
        draw_curves([tmp_path / "digits"])
    write_run(tmp_path / "digits-2", [{"step": 1, "split": "train", "loss": 1.0}])
    (tmp_path / "digits").mkdir()  # no run
    with pytest.raises(CheckpointError, match='digitss  no such directory\n  did you mean "digits-2"'):
        draw_curves([tmp_path / "digitss"])
