import subprocess
import sys

from data_sets import write_pixels
from rank_processes import ROOT


def run(*arguments):
    command = [sys.executable, ROOT / "tools/verify_shards.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_whole_and_damaged_data_sets_differ_by_exit_code_and_findings_are_counted(tmp_path):
    out = write_pixels(tmp_path / "out", 20, 9)
    done = run(out, "--decode", "--workers", "2")
    assert done.returncode == 0 and "train: 20 images in 3 shards" in done.stdout and "whole;" in done.stdout
    (out / "val/other.tar").touch()
    assert "\n1 finding; every byte" in run(out).stdout
    (out / "val/other.tar").unlink()
    shard = out / "train/pixels-train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:2048])
    done = run(out, "--show", "2")
    assert done.returncode == 3 and f"{shard} image-" in done.stdout and "more (--show" in done.stdout
    assert "Traceback" not in done.stderr and " findings; every byte" in done.stdout
    done = run(tmp_path / "nothing")
    assert done.returncode == 3 and "holds no data set" in done.stderr


def test_an_address_is_said_to_be_no_directory():
    done = run("https://host/data?token=secret")
    assert done.returncode == 2 and "https://host/data  an address: only directories are verified" in done.stderr
    assert "secret" not in done.stderr
