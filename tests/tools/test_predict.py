"""tools/predict.py: what the evaluation says of each sample, for any images, in three formats."""

import contextlib
import csv
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_sets import write_pixels
from PIL import Image
from rank_processes import ROOT
from run_directory import config_file, train_command
from warm_ranks import WarmRanks
from weights.reference import gen_npz

import vitds
from vitds.manifest import Manifest, hash_file, write_manifest
from vitds.weights.ds_file import model_states

NUM_VAL = 29


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def work(one_rank, tmp_path_factory):
    """Random pixels in five classes, runs on them in fp32 and bf16, a folder of photos, weights without names."""
    directory = tmp_path_factory.mktemp("predict")
    write_pixels(directory / "data", num_train=53, num_val=NUM_VAL)
    vitds_section = {"num_steps": 8, "eval_batch_size": 4, "data": {"eval_crop": "center", "interpolation": "bicubic"}}
    adamw = {"type": "AdamW", "params": {"lr": 0.01}}
    for name, more in {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}.items():
        (directory / name).mkdir()
        config = config_file(directory / name, 1, optimizer=adamw, vitds=vitds_section, **more)
        one_rank.run(train_command(config, directory / "data", directory, f"run-{name}"))
    np.savez(directory / "tiny.npz", **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    (directory / "photos/sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(directory / "photos" / name)
    return directory


def predict(ranks, *arguments, exit_code=0):
    return ranks.run(["tools/predict.py", *arguments], exit_code=exit_code).output


@pytest.mark.ranks
@pytest.mark.parametrize("precision, batch_size", [("fp32", 4), ("fp32", 7), ("bf16", 4)])
def test_every_sample_gets_the_class_that_the_evaluation_gives_it(one_rank, work, tmp_path, precision, batch_size):
    run = work / f"run-{precision}"
    one_rank.run(["launch/evaluate.py", "--weights", run, "--data", work / "data", "--output", tmp_path])
    evaluated = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    figures = json.loads((tmp_path / "summary.json").read_text())
    flags = ["--topk", 5, "--batch-size", batch_size, "--output", tmp_path / "p.parquet"]
    said = predict(one_rank, run, work / "data/val", *flags)
    predicted = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["path"].partition(":")[2] for row in predicted] == [row["key"] for row in evaluated]
    for name, theirs in {"label": "label", "predicted": "predicted", "predicted_name": "predicted_name"}.items():
        assert [row[name] for row in predicted] == [row[theirs] for row in evaluated]
    assert [row["topk_classes"] for row in predicted] == [row["top5"] for row in evaluated]
    assert len({row["predicted"] for row in predicted}) > 1, "one class for all would show nothing"
    num_right = sum(row["label"] == row["predicted"] for row in predicted)
    assert num_right / NUM_VAL == figures["top1"]
    assert f"{NUM_VAL} images, top-1 {figures['top1']:.4f}: {num_right} of {NUM_VAL} labels" in said
    np.testing.assert_allclose(
        [row["probability"] for row in predicted],
        [row["confidence"] for row in evaluated],
        rtol=1e-5 if batch_size > 4 else 0,
    )


@pytest.mark.ranks
def test_rows_of_a_folder_are_those_of_load(one_rank, work, tmp_path):
    flags = ["--topk", 9, "--features", "--image-size", "24x20", "--output", tmp_path / "new" / "p.jsonl"]
    assert "3 images\n" in predict(one_rank, work / "run-fp32", work / "photos", *flags)
    rows = [json.loads(line) for line in (tmp_path / "new/p.jsonl").open()]
    paths = [str(work / "photos" / name) for name in ("a.jpg", "b.png", "sub/c.webp")]
    assert [row["path"] for row in rows] == paths
    model, transform, classes = vitds.load(work / "run-fp32", (24, 20))
    with torch.no_grad():
        inputs = torch.stack([transform(path) for path in paths])
        probabilities, features = model(inputs).softmax(dim=1).numpy(), model.features(inputs).numpy()
    for row, chances, feature in zip(rows, probabilities, features, strict=True):
        order = np.argsort(-chances).tolist()
        assert row["label"] is None and row["topk_classes"] == order and row["predicted"] == order[0]
        assert row["topk_names"] == [classes[label] for label in order] and row["predicted_name"] == classes[order[0]]
        assert row["topk_probabilities"] == chances[order].tolist() and row["probability"] == chances.max()
        assert row["features"] == feature.tolist()


@pytest.mark.ranks
def test_names_of_nameless_weights(one_rank, work, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["zero", "one"]))
    predict(
        one_rank,
        work / "tiny.npz",
        work / "photos",
        "--topk",
        10,
        "--output",
        tmp_path / "p.csv",
        "--classes",
        tmp_path / "names.json",
    )
    with open(tmp_path / "p.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            for rank in range(1, 11):
                label = int(row[f"topk_classes_{rank}"])
                assert row[f"topk_names_{rank}"] == (["zero", "one"][label] if label < 2 else f"class {label}")
    (tmp_path / "many.json").write_text(json.dumps([str(label) for label in range(11)]))
    many = (work / "tiny.npz", work / "photos", "--classes", tmp_path / "many.json")
    assert "--classes  11 names, and the model has 10 classes" in predict(one_rank, *many, exit_code=2)


@pytest.mark.ranks
def test_a_run_without_an_average_has_none_to_predict_with(one_rank, work):
    """That of a run which kept one is compared in tests/test_evaluate.py."""
    output = predict(one_rank, work / "run-fp32", work / "photos", "--ema", exit_code=4)
    assert "ema" in output and "Traceback" not in output


@pytest.mark.ranks
def test_bad_images_are_named_and_the_rest_is_whole(one_rank, work, tmp_path):
    (tmp_path / "m.png").write_text("no image")
    whole = (work / "photos/a.jpg").read_bytes()
    (tmp_path / "n.jpg").write_bytes(whole[:200])
    (tmp_path / "z.jpg").write_bytes(whole)
    for kind in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out-{kind}"
        said = predict(one_rank, work / "run-fp32", tmp_path, "--format", kind, "--output", out, exit_code=3)
        assert f"data error  {tmp_path}/m.png  no image" in said and f"data error  {tmp_path}/n.jpg  " in said
        assert "2 of 3 could not be used" in said and "Traceback" not in said
    assert pq.read_table(tmp_path / "out-parquet")["path"].to_pylist() == [f"{tmp_path}/z.jpg"]
    assert [line.split(",")[0] for line in (tmp_path / "out-csv").read_text().splitlines()] == [
        "path",
        f"{tmp_path}/z.jpg",
    ]
    assert json.loads((tmp_path / "out-jsonl").read_text())["path"] == f"{tmp_path}/z.jpg"
    said = predict(
        one_rank, work / "run-fp32", tmp_path / "m.png", "--output", tmp_path / "new/deep/none.csv", exit_code=3
    )
    assert "1 of 1 could not be used" in said and not (tmp_path / "new").exists()


@pytest.mark.ranks
def test_a_model_without_a_head_gives_features_only(one_rank, work, tmp_path):
    model = vitds.create_model("custom:width=32,depth=1,heads=2,mlp=64,patch=8", image_size=16, num_classes=0)
    info = {"model": model.spec.name, "image_size": [16, 16], "num_classes": 0, "pre_logits": None}
    file = tmp_path / "headless/mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save(model_states(model.state_dict(), info), file)
    write_manifest(file.parent, Manifest({file.name: hash_file(file)}, info))
    said = predict(one_rank, file.parent, work / "photos", exit_code=4)
    assert "has no head" in said and "--features" in said
    predict(one_rank, file.parent, work / "photos", "--features", "--output", tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "label", "features"] and len(table["features"][0]) == 32


def test_mistakes_are_answered_before_torch_is_imported(tmp_path):
    np.savez(tmp_path / "tiny.npz", **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    (tmp_path / "photo.png").touch()
    (tmp_path / "there.csv").touch()
    weights, image = tmp_path / "tiny.npz", tmp_path / "photo.png"
    hidden = (
        "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path('tools/predict.py', run_name='__main__')"
    )
    for code, message, arguments in [
        (4, "none.npz  does not exist", [tmp_path / "none.npz", image]),
        (4, "not ViT-B_16", [weights, image, "--model", "ViT-B_16"]),
        (3, "none.png  no such file", [weights, image, tmp_path / "none.png"]),
        (2, "there.csv  exists", [weights, image, "--output", tmp_path / "there.csv"]),
        (2, "Parquet is not written to stdout", [weights, image, "--format", "parquet"]),
        (2, "its name says no format", [weights, image, "--output", tmp_path / "out.json"]),
        (2, "--format csv in a file *.parquet", [weights, image, "--format", "csv", "--output", "out.parquet"]),
        (2, "not divisible", [weights, image, "--image-size", 50]),
        (2, "neither S nor HxW", [weights, image, "--image-size", "50,50"]),
        (2, "tiny.npz cannot be read", [weights, image, "--classes", weights]),
        (2, 'did you mean "--topk"', [weights, image, "--top_k", 3]),
        (2, "required: IMAGE", [weights]),
    ]:
        command = [sys.executable, "-c", hidden, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and message in done.stderr, (done.stderr, message)
        assert "Traceback" not in done.stderr and not done.stdout


def test_a_pipe_that_closes_ends_it_quietly(tmp_path):
    np.savez(tmp_path / "tiny.npz", **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/a.png")
    for number in range(300):
        os.link(tmp_path / "photos/a.png", tmp_path / f"photos/{'long-name-' * 20}{number}.png")
    command = [sys.executable, "tools/predict.py", tmp_path / "tiny.npz", tmp_path / "photos", "--batch-size", "4"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        assert process.stdout.readline() == "path,label,predicted,predicted_name,probability\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0 and "Broken" not in errors and "Traceback" not in errors, errors


def test_a_terminal_sees_progress_on_stderr_and_rows_on_stdout(tmp_path):
    np.savez(tmp_path / "tiny.npz", **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    command = [
        sys.executable,
        "tools/predict.py",
        tmp_path / "tiny.npz",
        *[tmp_path / "a.png"] * 9,
        "--batch-size",
        "2",
    ]
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    rows = process.communicate()[0].splitlines()
    assert process.returncode == 0 and len(rows) == 10, seen.decode()
    assert b"9 images" in seen and b"a second" in seen and b"Traceback" not in seen and b"a.png" not in seen
