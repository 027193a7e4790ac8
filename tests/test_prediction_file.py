"""The same rows in csv, jsonl and parquet, whole or not there."""

import csv
import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from rank_processes import ROOT

from vitds import prediction_file
from vitds.errors import UsageError
from vitds.prediction_file import PredictionFile, Rows

NAMES = ["cat", 'great white shark, "man-eater"', "ünïcode\nline"]


def rows(first, count):
    generator = np.random.default_rng(first)
    probabilities = generator.dirichlet(np.ones(3), count).astype(np.float32)
    return Rows(
        [f"{first + k}.png" for k in range(count)],
        [None if k % 2 else k % 3 for k in range(count)],
        np.argsort(-probabilities, axis=1)[:, :2],
        probabilities,
        generator.normal(size=(count, 4)).astype(np.float32),
    )


def write(path, kind, batches, topk=True):
    with PredictionFile(path, kind, NAMES, topk) as file:
        for batch in batches:
            file.write(batch)
    return path


def test_every_format_holds_the_same_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_file, "_ROW_GROUP", 5)
    batches = [rows(0, 3), rows(3, 3), rows(6, 1)]
    parquet = pq.ParquetFile(write(tmp_path / "p.parquet", "parquet", batches))
    assert parquet.num_row_groups == 2
    expected = parquet.read().to_pylist()
    lines = [json.loads(line) for line in write(tmp_path / "p.jsonl", "jsonl", batches).open()]
    assert lines == expected
    with open(write(tmp_path / "p.csv", "csv", batches), newline="") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0])[:8] == [
        "path", "label", "predicted", "predicted_name", "probability",
        "topk_classes_1", "topk_classes_2", "topk_names_1",
    ]  # fmt: skip
    for flat, row in zip(table, expected, strict=True):
        assert flat["label"] == ("" if row["label"] is None else str(row["label"]))
        assert flat["predicted_name"] == row["predicted_name"] == NAMES[row["predicted"]] == flat["topk_names_1"]
        assert (
            np.float32(flat["probability"])
            == np.float32(row["probability"])
            == np.float32(row["topk_probabilities"][0])
        )
        assert [np.float32(flat[f"features_{k}"]) for k in range(4)] == [np.float32(v) for v in row["features"]]
        assert [int(flat[f"topk_classes_{k}"]) for k in (1, 2)] == row["topk_classes"]
    first = batches[0]
    assert [row["probability"] for row in expected[:3]] == first.probabilities.max(axis=1).tolist()
    assert [row["features"] for row in expected[:3]] == first.features.tolist()


def test_columns_are_those_asked_for(tmp_path):
    one = rows(0, 2)
    plain = Rows(one.names, one.labels, one.classes, one.probabilities)
    assert pq.read_table(write(tmp_path / "a.parquet", "parquet", [plain], topk=False)).column_names == [
        "path", "label", "predicted", "predicted_name", "probability",
    ]  # fmt: skip
    headless = Rows(one.names, one.labels, features=one.features)
    assert pq.read_table(write(tmp_path / "b.parquet", "parquet", [headless])).column_names == [
        "path",
        "label",
        "features",
    ]


@pytest.mark.parametrize("kind", prediction_file.FORMATS)
def test_a_file_is_whole_or_not_there(tmp_path, kind):
    path = tmp_path / "new" / "deep" / "p"
    with pytest.raises(RuntimeError), PredictionFile(path, kind, NAMES) as file:
        file.write(rows(0, 3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(path, kind, [])
    assert list(tmp_path.iterdir()) == [], "without a row there is no file"
    path.parent.parent.mkdir()
    write(path, kind, [])
    assert list(tmp_path.rglob("*")) == [path.parent.parent], "what somebody else made stays"
    write(path, kind, [rows(0, 1)])
    assert [item.name for item in path.parent.iterdir()] == ["p"]


@pytest.mark.parametrize("has_links", [True, False])
def test_two_runs_do_not_destroy_each_other_s_file(tmp_path, monkeypatch, has_links):
    def no_link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    (tmp_path / ".p.writing").write_text("mine")
    with (
        pytest.raises(UsageError, match="cannot be written: File exists"),
        PredictionFile(tmp_path / "p", "csv", NAMES) as file,
    ):
        file.write(rows(0, 3))
        write(tmp_path / "p", "csv", [rows(7, 1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.writing", "p"]
    assert (tmp_path / ".p.writing").read_text() == "mine"
    assert "7.png" in (tmp_path / "p").read_text()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / ".p.writing").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"), PredictionFile(tmp_path / "file" / "p", "csv", NAMES):
        pass
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        with pytest.raises(UsageError, match="File too large"), PredictionFile(tmp_path / "p", "csv", NAMES) as file:
            file.write(rows(0, 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    done = subprocess.run(
        [sys.executable, "-c", "import test_prediction_file as t; t.write(None, 'csv', [t.rows(0, 1)])"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}/tests:{ROOT}"},
        stdout=open("/dev/full", "w"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "stdout  cannot be written: No space left" in done.stderr
