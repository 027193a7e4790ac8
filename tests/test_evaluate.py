"""Evaluation gives one answer, whatever the ranks, batch sizes and ZeRO stage, and it is the run's own."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_sets import pixel_source, write_pixels
from rank_processes import ROOT
from run_directory import config_file, metrics, train_command
from warm_ranks import WarmRanks
from weights.reference import gen_npz

from vitds.data.writer import WriteOptions, write_dataset

pytestmark = pytest.mark.ranks

NUM_VAL = 29  # in batches of 4: eight, of which the last holds one image, over 1, 2 and 3 ranks
EXACT = ("num_samples", "top1", "top5", "macro_f1", "per_class_precision", "per_class_recall", "per_class_support")


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def work(one_rank, tmp_path_factory):
    """Random pixels in five classes, and a run on them that evaluated itself at its end."""
    directory = tmp_path_factory.mktemp("evaluate")
    write_pixels(directory / "data", num_train=53, num_val=NUM_VAL)
    changes = {"num_steps": 8, "eval_batch_size": 4, "dropout": 0.1, "ema_decay": 0.9}
    config = config_file(directory, 1, optimizer={"type": "AdamW", "params": {"lr": 0.01}}, vitds=changes)
    one_rank.run(train_command(config, directory / "data", directory, "run"))
    return directory


def evaluate(ranks, work, out, *flags, weights="run", data="data"):
    command = ["launch/evaluate.py", "--weights", work / weights, "--data", work / data, "--output", out, *flags]
    ranks.run(command)
    return json.loads((out / "summary.json").read_text())


def rows(out):
    return pq.read_table(out / "predictions.parquet").to_pylist()


@pytest.fixture(scope="module")
def reference(one_rank, work):
    return evaluate(one_rank, work, work / "reference"), rows(work / "reference")


def test_figures_are_those_of_the_runs_own_validation(work, reference):
    figures, _ = reference
    line = metrics(work / "run")[-1]
    assert line["split"] == "val"
    assert {name: figures[name] for name in ("loss", "top1", "top5")} == {
        name: line[name] for name in ("loss", "top1", "top5")
    }


def test_the_average_is_evaluated_and_exported_when_asked_for(one_rank, work, reference, tmp_path):
    figures = evaluate(one_rank, work, tmp_path / "average", "--ema")
    line = metrics(work / "run")[-1]
    assert figures["ema"] and figures["loss"] != reference[0]["loss"]
    assert {name: figures[name] for name in ("loss", "top1", "top5")} == {
        name: line[f"ema_{name}"] for name in ("loss", "top1", "top5")
    }
    out = tmp_path / "average.safetensors"
    one_rank.run(["tools/export_weights.py", work / "run", out, "--format", "safetensors", "--ema"])
    again = evaluate(one_rank, work, tmp_path / "exported", "--batch-size", "4", weights=out)
    assert again | {"ema": True, "weights": "", "step": None} == figures | {"weights": "", "step": None}
    photos = sorted((work / "data/val").glob("*.tar"))
    for name, *weights in (("a", work / "run", "--ema"), ("b", out), ("c", work / "run")):
        one_rank.run(["tools/predict.py", *weights, *photos, "--output", tmp_path / f"{name}.csv"])
    average, exported, plain = ((tmp_path / f"{name}.csv").read_text() for name in "abc")
    assert average == exported != plain
    one_rank.run(["tools/npz_to_ds.py", work / "run", tmp_path / "imported", "--ema"])
    imported = evaluate(one_rank, work, tmp_path / "of-imported", "--batch-size", "4", weights=tmp_path / "imported")
    assert imported["loss"] == figures["loss"]
    command = ["launch/evaluate.py", "--weights", out, "--data", work / "data", "--ema"]
    assert "an average of the weights is in checkpoints only" in one_rank.run(command, exit_code=4).output


def test_predictions_hold_each_sample_once_and_give_the_figures(reference):
    figures, predictions = reference
    assert [row["sample_id"] for row in predictions] == list(range(NUM_VAL))
    assert [row["key"] for row in predictions] == [f"image-{index}" for index in range(NUM_VAL)]
    assert [row["label_name"] for row in predictions] == [f"class-{index % 5}" for index in range(NUM_VAL)]
    assert figures["num_samples"] == NUM_VAL
    assert figures["top1"] == sum(row["predicted"] == row["label"] for row in predictions) / NUM_VAL
    assert figures["loss"] == pytest.approx(sum(row["loss"] for row in predictions) / NUM_VAL, rel=1e-6)
    assert figures["per_class_support"] == [6, 6, 6, 6, 5]
    assert len({row["predicted"] for row in predictions}) > 1, "one class for all would show nothing"


@pytest.mark.parametrize("batch_size", [1, 29, 64])
def test_any_batch_size_gives_the_same(one_rank, work, reference, batch_size, tmp_path):
    figures = evaluate(one_rank, work, tmp_path, "--batch-size", str(batch_size))
    assert {name: figures[name] for name in EXACT} == {name: reference[0][name] for name in EXACT}
    assert figures["loss"] == pytest.approx(reference[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("form", ["run", "run/checkpoints", "run/checkpoints/global_step8"])
def test_a_run_its_checkpoints_and_one_of_them_are_the_same_weights(one_rank, work, reference, form, tmp_path):
    assert evaluate(one_rank, work, tmp_path, weights=form) == reference[0]


def test_other_resolutions_precisions_and_splits_run(one_rank, work, reference, tmp_path):
    larger = evaluate(one_rank, work, tmp_path, "--image-size", "24")
    assert larger["num_samples"] == NUM_VAL
    assert larger["loss"] != reference[0]["loss"]
    half = evaluate(one_rank, work, tmp_path, "--dtype", "bf16")
    assert half["loss"] == pytest.approx(reference[0]["loss"], rel=0.02)
    assert half["loss"] != reference[0]["loss"]
    assert evaluate(one_rank, work, tmp_path, "--split", "train")["num_samples"] == 53


def test_results_lie_beside_the_run_unless_told_otherwise(one_rank, work, reference):
    output = one_rank.run(["launch/evaluate.py", "--weights", work / "run", "--data", work / "data"]).output
    assert json.loads((work / "run/evaluation/summary.json").read_text()) == reference[0]
    assert f"29 samples; per-class figures and predictions in {work}/run/evaluation" in output
    assert f"top1               {reference[0]['top1']:.4f}" in output


def test_results_of_files_lie_side_by_side(one_rank, work, tmp_path):
    for name in ("a", "b"):
        one_rank.run(["tools/export_weights.py", work / "run", tmp_path / f"{name}.npz", "--format", "npz"])
        script = ROOT / "launch/evaluate.py"
        command = [sys.executable, script, "--weights", tmp_path / f"{name}.npz", "--data", work / "data"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        assert (tmp_path / f"evaluation-{name}.npz/summary.json").exists()


def test_weights_in_googles_layout_are_evaluated_as_they_are(one_rank, work, tmp_path):
    """A head of 61 classes at 32 px: fits data of 5 classes, and no data of 62."""
    np.savez(work / "tiny.npz", **gen_npz.weights("tiny", "imagenet21k"))
    figures = evaluate(one_rank, work, tmp_path / "out", weights="tiny.npz")
    assert figures["num_samples"] == NUM_VAL
    assert len(figures["per_class_recall"]) == 61
    predictions = rows(tmp_path / "out")
    assert any(row["predicted"] >= 5 for row in predictions)
    for row in predictions:
        assert row["predicted_name"] == (f"class-{row['predicted']}" if row["predicted"] < 5 else None)
    as_timm = evaluate(one_rank, work, tmp_path / "timm", "--model", "auto:timm", weights="tiny.npz")
    assert as_timm["loss"] != figures["loss"]
    write_dataset(tmp_path / "many", {"val": pixel_source(62, num_classes=62)}, WriteOptions("many"))
    command = ["launch/evaluate.py", "--weights", work / "tiny.npz", "--data", tmp_path / "many"]
    assert "62 classes, and the head has 61" in one_rank.run(command, exit_code=3).output


def test_an_exported_file_brings_its_preprocessing_and_names(one_rank, work, reference, tmp_path):
    """Names that are not those of the data are doubted, not refused: the same classes often go by others."""
    one_rank.run(["tools/export_weights.py", work / "run", work / "exported.npz", "--format", "npz"])
    figures = evaluate(one_rank, work, tmp_path, "--batch-size", "4", weights="exported.npz")
    assert figures == reference[0] | {"weights": str(work / "exported.npz"), "step": None}
    described = json.loads((work / "exported.json").read_text())
    described |= {"classes": [f"other-{label}" for label in range(5)], "data": described["data"] | {"std": 0.25}}
    (work / "exported.json").write_text(json.dumps(described))
    command = ["launch/evaluate.py", "--weights", work / "exported.npz", "--data", work / "data", "--output", tmp_path]
    output = one_rank.run(command).output
    assert f'calls output 0 "other-0", {work}/data "class-0": the figures mean something only if' in output
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["classes"] == reference[0]["classes"] and figures["loss"] != reference[0]["loss"]
    del described["data"]
    (work / "exported.json").write_text(json.dumps(described))
    assert "no preprocessing in the weights: squash, mean 0.5, std 0.5 assumed" in one_rank.run(command).output


def test_bad_input_ends_with_its_code(one_rank, work, tmp_path):
    def refused(exit_code, *command):
        return one_rank.run(["launch/evaluate.py", *command], exit_code=exit_code).output

    run, data = work / "run", work / "data"
    assert "nowhere" in refused(4, "--weights", tmp_path / "nowhere", "--data", data)
    assert "nowhere" in refused(3, "--weights", run, "--data", tmp_path / "nowhere")
    assert refused(4, "--weights", tmp_path, "--data", data)
    assert "evaluate.py --help" in refused(2, "--weights", run, "--data", data, "--zero-stage", "4")
    assert 'did you mean "--weights"' in refused(2, "--weight", run, "--data", data)
    write_dataset(tmp_path / "other", {"val": pixel_source(6, num_classes=6)}, WriteOptions("other"))
    message = refused(3, "--weights", run, "--data", tmp_path / "other")
    assert "classes of this data are not those" in message and "the weights have 5: class-0, class-1" in message
    assert "train" in refused(3, "--weights", run, "--data", tmp_path / "other", "--split", "train")
    assert "not divisible" in refused(2, "--weights", run, "--data", data, "--image-size", "18")
    assert "not ViT-B_16" in refused(4, "--weights", run, "--data", data, "--model", "ViT-B_16")
    assert "out of memory" in refused(5, "--weights", run, "--data", data, "--image-size", "100000000")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_and_any_stage_gives_the_same(one_rank, work, reference, world_size, tmp_path):
    """Last in this file: stage 3 patches torch in its process for good."""
    with contextlib.nullcontext(one_rank) if world_size == 1 else WarmRanks(world_size) as ranks:
        for stage in (0, 3):
            out = tmp_path / f"stage{stage}"
            assert evaluate(ranks, work, out, "--zero-stage", str(stage)) == reference[0]
            assert rows(out) == reference[1]


def test_several_directories_are_evaluated_one_after_the_other(one_rank, work, reference, tmp_path):
    figures = evaluate(one_rank, work, tmp_path, data=f"data,{work / 'data'}")
    both = rows(tmp_path)
    assert figures["num_samples"] == 2 * NUM_VAL and figures["top1"] == reference[0]["top1"]
    assert [row["key"] for row in both] == [f"{work / 'data'}/{row['key']}" for row in 2 * reference[1]]
    assert [row["predicted"] for row in both] == [row["predicted"] for row in 2 * reference[1]]
