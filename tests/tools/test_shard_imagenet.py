import subprocess
import sys

import pytest
from PIL import Image
from rank_processes import ROOT


def shard(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/shard_imagenet.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)


def test_the_summary_says_what_was_written_and_what_to_do_next(tmp_path):
    done = shard("digits", tmp_path / "out", "--samples-per-shard", 500, "--workers", 2, "--name", "tiny")
    assert done.returncode == 0, done.stderr
    assert "train: 1,437 images in 3 shards" in done.stdout and "val: 360 images in 1 shard" in done.stdout
    assert "10 classes" in done.stdout and f"--data {tmp_path}/out" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out/train").glob("*.tar")) == [
        f"tiny-train-00000{number}.tar" for number in range(3)
    ]
    assert "images/s" in done.stdout
    same = shard("digits", tmp_path / "out", "--samples-per-shard", 500, "--workers", 1, "--name", "tiny")
    assert same.returncode == 0 and "1,797 images; already complete, nothing written" in same.stdout
    assert "images/s" not in same.stdout
    again = shard("digits", tmp_path / "out")
    assert again.returncode == 3 and 'a split "train" already' in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["digits", "out", "--wrkers", "2"], 2, 'did you mean "--workers"?'),
        (["digits", "out", "--work", "2"], 2, "--work"),
        (["digits", "out", "--workers", "0"], 2, "--workers"),
        (["digits", "out", "--split", "test"], 2, "--split"),
        (["digits", "out", "--name", "../a"], 2, '--name "../a" is no beginning of a file name'),
        (["digits", "out", "--name", "x\udcff"], 2, "is no beginning of a file name"),
        (["digits", "out\udcff"], 2, "out\\xff  its path is no UTF-8"),
        (["digits", "in\udcff/out"], 2, "in\\xff/out  its path is no UTF-8"),
        (["digits"], 2, "OUT"),
        (["nowhere", "out"], 3, "no such file or directory"),
        (["digits", "out", "--val-fraction", "1.5"], 2, "1.5 is not between 0 and 1"),
        (["digits", "out", "--val-fraction", "0.1"], 3, "--split train"),
        (["digits", "out", "--classes", "nowhere.txt"], 3, "nowhere.txt"),
        (["out", "--split", "train"], 2, "SOURCE is missing"),
        (["digits", "out", "--index-only"], 2, "--index-only takes one directory"),
        (["out", "--index-only", "--val-fraction", "0.1"], 2, "leaves every sample in its split"),
        (["no where", "--merge"], 3, f"python tools/shard_imagenet.py SOURCE '{ROOT}/no where' --part 1/N"),
        (["nowhere", "--index-only"], 3, "holds no train/*.tar"),
    ],
)
def test_mistakes_have_their_exit_code_and_one_message(arguments, code, said):
    failed = shard(*arguments)
    assert failed.returncode == code and said in failed.stderr and "Traceback" not in failed.stderr


def test_a_validation_split_is_held_out_of_the_training_images(tmp_path):
    done = shard("digits", tmp_path / "out", "--split", "train", "--val-fraction", 0.02, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "train: 1,408 images" in done.stdout and "val: 29 images" in done.stdout
    for name in ("_info.json", "classes.json", "health.json", "train/index.parquet", "val/index.parquet"):
        (tmp_path / "out" / name).unlink()
    done = shard("--index-only", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "train: 1,408 images" in done.stdout and "10 classes" in done.stdout


def test_any_bytes_in_the_path_of_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most terminals
    source = tmp_path / "in\udcff"
    for name in ("cat/a", "cat/b", "dog/\udcff"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(source / f"{name}.png")
    (source / "bad\udcff.csv").write_text("path,label\ncat/a.png,cat\nnowhere.png,cat\ndog/_.png,dog\n")
    for number, path in enumerate((source, source / "bad\udcff.csv")):
        done = shard(path, tmp_path / f"out-{number}", "--workers", "1", "--skip-bad")
        assert done.returncode == 0, done.stderr
        assert f"{3 - 2 * number} images in 1 shard" in done.stdout
    again = shard(source / "bad\udcff.csv", tmp_path / "out-1", "--workers", "1", "--skip-bad")
    assert again.returncode == 0 and "already complete" in again.stdout, again.stderr
    part = shard(source, tmp_path / "parts", "--workers", "1", "--part", "1/2")
    assert part.returncode == 0, part.stderr
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (source / "bad\udcff.csv").write_text("path,label\ncat/a.png,cat\n" + "nowhere.png,cat\n" * 25)
    failed = shard(source / "bad\udcff.csv", tmp_path / "out-2", "--workers", "1")
    assert failed.returncode == 3 and f"all of them are listed in {tmp_path}/vitds-bad-" in failed.stderr


def test_images_of_several_classes_name_the_loss_that_they_need(tmp_path):
    (tmp_path / "table.csv").write_text("path,label,split\na.png,cat|dog,train\nb.png,,train\nc.png,dog,val\n")
    for name in "abc":
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    done = shard(tmp_path / "table.csv", tmp_path / "out", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "--name out --loss bce" in done.stdout
    assert '"multi_label": true' in (tmp_path / "out/_info.json").read_text()
