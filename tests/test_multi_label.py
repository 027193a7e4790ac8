"""Images of any number of classes: trained with binary cross-entropy on two ranks, evaluated, resumed, put to use."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_sets import write_multi_label, write_pixels
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

import vitds
from vitds.data.reader import ShardReader
from vitds.weights_header import read_header

pytestmark = pytest.mark.ranks

NUM_VAL = 33  # in batches of 4: nine, so one of two ranks has a padding batch in the last round
RECIPE = {"loss": "bce", "label_smoothing": 0.1, "num_steps": 6, "save_every": 3, "eval_every": 3, "eval_batch_size": 4}


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_ranks():
    with WarmRanks(2) as ranks:
        yield ranks


def config(directory, stage=1, **ours):
    return config_file(directory, stage, vitds=RECIPE | ours)


@pytest.fixture(scope="module")
def work(two_ranks, tmp_path_factory):
    """Data of five classes, none to three an image, and an unbroken run on two ranks at stage 1."""
    directory = tmp_path_factory.mktemp("multi-label")
    write_multi_label(directory / "data", num_val=NUM_VAL)
    command = train_command(config(directory), directory / "data", directory, "run", "--class-weights", "auto")
    answer = two_ranks.run(command)
    assert "mAP" in answer.output and "top-1" not in answer.output
    return directory


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stopped_run_ends_bit_for_bit_as_an_unbroken_one(two_ranks, work, stage, tmp_path):
    unbroken = work / "run"
    if stage == 0:
        command = train_command(config(tmp_path, 0), work / "data", tmp_path, "run", "--class-weights", "auto")
        two_ranks.run(command)
        unbroken = tmp_path / "run"
    command = train_command(config(tmp_path, stage), work / "data", tmp_path, "stopped", "--class-weights", "auto")
    two_ranks.run([*command, "--stop-at-step", "3"], exit_code=75)
    two_ranks.run(command)
    assert metrics(tmp_path / "stopped") == metrics(unbroken)
    assert_same_weights(weights(tmp_path / "stopped", 6), weights(unbroken, 6))


def test_a_validation_reports_the_mean_average_precision_and_chooses_by_it(work):
    lines = [line for line in metrics(work / "run") if line["split"] == "val"]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert 0 < line["map"] < 1 and not line.keys() & {"top1", "top5"}
    best = max(lines, key=lambda line: line["map"])
    assert (work / "run/checkpoints/best").read_text().strip() == f"global_step{best['step']}"


def test_how_a_global_batch_is_cut_changes_no_loss(one_rank, two_ranks, work, tmp_path):
    """Sixteen images on one rank, two by two or all together, and eight on each of two; with mixup."""
    plain = {"dropout": 0.0, "drop_path": 0.0, "eval_every": 6, "class_weights": [0.5, 2.0, 1.0, 0.0, 3.0]}
    plain["data"] = {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}
    found = []
    for name, ranks, size in (("two-by-two", one_rank, 2), ("all", one_rank, 16), ("two-ranks", two_ranks, 8)):
        flags = ["--micro-batch-size", str(size), "--gradient-accumulation-steps", "auto"]
        ranks.run(train_command(config(tmp_path, 0, **plain), work / "data", tmp_path, name, *flags))
        found.append([line["loss"] for line in metrics(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], rel=2e-5)
    assert found[2] == pytest.approx(found[1], rel=2e-5)


@pytest.fixture(scope="module")
def evaluation(one_rank, work):
    command = ["launch/evaluate.py", "--weights", work / "run/checkpoints/global_step6", "--data", work / "data"]
    output = one_rank.run([*command, "--output", work / "evaluation"]).output
    figures = json.loads((work / "evaluation/summary.json").read_text())
    assert f"map                {figures['map']:.4f}" in output and "top1" not in output
    return figures, pq.read_table(work / "evaluation/predictions.parquet").to_pylist()


def scores(work):
    """The weights' own outputs for each image of the split, and which are true."""
    model, transform, classes = vitds.load(work / "run/checkpoints/global_step6")
    split = ShardReader(work / "data", "val")
    with torch.no_grad():
        logits = [model(transform(split.read(row).data)[None])[0] for row in range(len(split))]
    truths = np.zeros((len(split), len(classes)), dtype=int)
    truths[split.index.label_pairs()] = 1
    return torch.stack(logits), truths


def test_figures_are_those_of_the_run_and_of_scikit_learn(work, evaluation):
    metrics_of = pytest.importorskip("sklearn.metrics")
    figures, _ = evaluation
    line = metrics(work / "run")[-1]
    assert (figures["num_samples"], figures["loss"], figures["map"]) == (NUM_VAL, line["loss"], line["map"])
    logits, truths = scores(work)
    assert figures["map"] == pytest.approx(metrics_of.average_precision_score(truths, logits.numpy(), average="macro"))
    expected = metrics_of.average_precision_score(truths, logits.numpy(), average=None)
    assert figures["per_class_average_precision"] == pytest.approx(expected)
    assert figures["per_class_support"] == truths.sum(axis=0).tolist()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(truths).float())
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_predictions_hold_the_classes_and_the_highest_scores_of_each_sample(work, evaluation):
    _, rows = evaluation
    logits, truths = scores(work)
    for row, logit, truth in zip(rows, logits, truths, strict=True):
        assert row["labels"] == np.flatnonzero(truth).tolist()
        assert row["label_names"] == [f"class-{label}" for label in row["labels"]]
        assert sorted(row["top5"]) == list(range(5))
        assert row["top5_names"] == [f"class-{label}" for label in row["top5"]]
        assert row["top5_scores"] == pytest.approx(logit.sigmoid()[row["top5"]].tolist(), abs=1e-5)
    assert [row["key"] for row in rows] == [f"image-{row}" for row in range(NUM_VAL)]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_two_ranks_give_the_same(two_ranks, work, evaluation, batch_size, tmp_path):
    """In one batch of all, the second rank has nothing but padding."""
    command = ["launch/evaluate.py", "--weights", work / "run/checkpoints/global_step6", "--data", work / "data"]
    two_ranks.run([*command, "--batch-size", str(batch_size), "--output", tmp_path])
    figures, rows = json.loads((tmp_path / "summary.json").read_text()), pq.read_table(tmp_path / "predictions.parquet")
    if batch_size == 4:
        assert (figures, rows.to_pylist()) == evaluation
    assert figures["map"] == pytest.approx(evaluation[0]["map"], rel=1e-6)


def test_one_class_an_image_trained_with_bce_keeps_top_1(one_rank, work, tmp_path):
    """As does a head of more outputs than the data has classes; a probability is a sigmoid."""
    write_pixels(tmp_path / "data")
    flags = ["--num-classes", "7"]
    one_rank.run(train_command(config(tmp_path), tmp_path / "data", tmp_path, "run", *flags))
    line = metrics(tmp_path / "run")[-1]
    assert line.keys() >= {"top1", "top5", "loss"} and "map" not in line
    command = ["launch/evaluate.py", "--weights", tmp_path / "run", "--data", tmp_path / "data", "--output", tmp_path]
    one_rank.run(command)
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert {name: figures[name] for name in ("loss", "top1", "top5")} == {
        name: line[name] for name in ("loss", "top1", "top5")
    }
    one_rank.run([*command[:4], work / "data", "--output", tmp_path / "other"], exit_code=0)
    assert 0 < json.loads((tmp_path / "other/summary.json").read_text())["map"] < 1


def test_a_resume_with_other_class_weights_is_refused(one_rank, work, tmp_path):
    (tmp_path / "weights.json").write_text('{"class-1": 2}')
    flags = ["--class-weights", tmp_path / "weights.json"]
    command = train_command(config(tmp_path), work / "data", tmp_path, "run", *flags)
    one_rank.run([*command, "--stop-at-step", "1"], exit_code=75)
    (tmp_path / "weights.json").write_text('{"class-1": 3}')
    message = one_rank.run(command, exit_code=4).output
    assert "vitds.class_weights: [1.0, 2.0, 1.0, 1.0, 1.0] in the checkpoint, [1.0, 3.0, 1.0, 1.0, 1.0] now" in message
    (tmp_path / "weights.json").write_text("[1, 2, 1, 1, 1]")
    one_rank.run(command)


def test_a_probability_of_these_weights_is_a_sigmoid_wherever_they_go(one_rank, work, evaluation, tmp_path):
    run, shards = work / "run/checkpoints/global_step6", work / "data/val"
    assert read_header(run).loss == "bce"
    one_rank.run(["tools/export_weights.py", run, tmp_path / "out.npz", "--format", "npz"])
    one_rank.run(["tools/export_weights.py", run, tmp_path / "hf", "--format", "hf"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["problem_type"] == "multi_label_classification"
    for number, weights_of in enumerate((run, tmp_path / "out.npz", tmp_path / "hf")):
        assert read_header(weights_of).loss == "bce"
        out = tmp_path / f"{number}.parquet"
        one_rank.run(["tools/predict.py", weights_of, shards, "--output", out, "--topk", "5", "--workers", "1"])
        rows = pq.read_table(out).to_pylist()
        assert [row["label"] for row in rows] == [None] * NUM_VAL
        for row, known in zip(rows, evaluation[1], strict=True):
            assert row["topk_probabilities"] == pytest.approx(known["top5_scores"], abs=1e-3)
