"""What a run leaves to read: whole lines at full precision, cut back on resume; a live display on a terminal."""

import errno
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys

import pytest
from rank_processes import ROOT

from vitds.errors import CheckpointError
from vitds.log import RunLog, cut_back


def train_line(step, **changes):
    line = {"step": step, "samples_seen": 8 * step, "epoch": 0, "split": "train", "loss": 1 / (step + 2), "lr": 1e-3}
    line |= {"grad_norm": 0.1 * step, "loss_scale": 1.0, "skipped_steps": 0, "images_per_s": 123.4}
    return line | {"data_wait_frac": 0.25, "eta_s": 9.0, "mem_gib": 1.5} | changes


def val_line(step):
    return {"step": step, "samples_seen": 8 * step, "epoch": 0, "split": "val", "loss": 0.5, "top1": 0.75, "top5": 1.0}


def record(run_dir, lines, start_step=0, is_main=True):
    with RunLog(run_dir, is_main, 10, start_step, ()) as log:
        for line in lines:
            log.record(line)


def text_of(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


LINES = [train_line(1), train_line(2), val_line(2), train_line(3), train_line(4), val_line(4)]


def test_metrics_are_whole_lines_at_full_precision(tmp_path):
    record(tmp_path, LINES)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == LINES


def test_a_validation_of_several_labels_shows_its_mean_average_precision(tmp_path):
    line = {"step": 2, "samples_seen": 16, "epoch": 0, "split": "val", "loss": 0.5, "map": 0.375}
    record(tmp_path, [line, line | {"step": 3, "map": float("nan")}])
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert first == "step 2/10  val  loss 0.5000  mAP 37.50%"
    assert second.endswith("mAP not finite")


def test_each_line_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, True, 10, 0, ()) as log:
        log.record(train_line(1))
        assert (tmp_path / "metrics.jsonl").read_text() == text_of([train_line(1)])
        assert "step 1/10" in (tmp_path / "train.log").read_text()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    record(tmp_path, [train_line(1, loss=float("nan"), grad_norm=float("inf")), val_line(1) | {"loss": float("nan")}])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, val = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert train["loss"] is train["grad_norm"] is val["loss"] is None
    assert (tmp_path / "train.log").read_text().count("loss not finite") == 2


@pytest.mark.parametrize(
    "left",
    [
        text_of(LINES),
        text_of(LINES)[:-1],
        text_of(LINES[:3]) + '{"step": 3, "samp',
        text_of(LINES[:3]) + '{"step": 3, "samp\n' + text_of(LINES[3:]),
        text_of(LINES[:3]) + "\x00\x00\x00\n",
        text_of(LINES[:3]) + "[]\n",
        text_of(LINES[:3]),
    ],
    ids=["later steps", "no newline", "torn", "torn in the middle", "zeros", "no object", "nothing to cut"],
)
def test_cut_back_keeps_whole_lines_up_to_the_checkpoint(tmp_path, left):
    path = tmp_path / "metrics.jsonl"
    path.write_text(left)
    cut_back(path, 2)
    assert path.read_text() == text_of(LINES[:3])
    assert list(tmp_path.iterdir()) == [path]


def test_cut_back_at_step_0_empties_the_file_and_none_is_no_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 0)
    assert not path.exists()
    path.write_text(text_of(LINES))
    cut_back(path, 0)
    assert path.read_text() == ""


def test_a_resumed_file_equals_an_unbroken_one(tmp_path):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for directory in (unbroken, resumed):
        directory.mkdir()
    record(unbroken, LINES)
    record(resumed, LINES[:5])  # killed after step 4, its checkpoint is of step 2
    with open(resumed / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "sam')
    record(resumed, LINES[3:], start_step=2)
    assert (resumed / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    record(tmp_path, LINES, is_main=False)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_one_plain_line_an_interval_when_not_a_terminal(tmp_path, capsys):
    record(tmp_path, [train_line(2, loss=0.5, loss_scale=64.0, skipped_steps=3), val_line(2)])
    train, val = capsys.readouterr().out.splitlines()
    assert train == "step 2/10  loss 0.5000  lr 0.001  scale 64  skipped 3  123.4 images/s  data-wait 25%  ETA 9 s"
    assert val == "step 2/10  val  loss 0.5000  top-1 75.00%  top-5 100.00%"
    assert (tmp_path / "train.log").read_text().splitlines() == [train, val]


def test_brackets_and_long_lines_are_printed_as_they_are(tmp_path, capsys):
    text = "[red]not markup[/red] " + "x" * 300
    with RunLog(tmp_path, True, 10, 0, ()) as log:
        log.say(text)
    assert capsys.readouterr().out == text + "\n"


def test_the_error_that_ends_a_run_is_in_the_log(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, True, 10, 0, ()):
        raise RuntimeError("the disk is gone")
    assert "the disk is gone" in (tmp_path / "train.log").read_text()


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_log import train_line
from vitds.errors import exit_with
from vitds.log import RunLog
def main():
    with RunLog(Path(sys.argv[1]), True, 10, 0, ()) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        for step in range(1, 11):
            log.record(train_line(step))
exit_with(main)
"""


def test_on_a_full_disk_the_run_goes_on_and_ends_in_the_name_of_metrics_with_whole_lines_to_resume_from(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert f"{tmp_path}/metrics.jsonl  the run directory cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 10/10" in done.stdout and done.stdout.count("its lines wait for room") == 1
    record(tmp_path, [train_line(3)], start_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == text_of([train_line(1), train_line(2), train_line(3)])


def test_lines_find_their_place_once_there_is_room_again(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, True, 10, 0, ()) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
            for line in LINES[:4]:
                log.record(line)
            assert log.flush().errno == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert log.flush() is None
        assert (tmp_path / "metrics.jsonl").read_text() == text_of(LINES[:4])
        log.record(LINES[4])
        assert (tmp_path / "metrics.jsonl").read_text() == text_of(LINES[:5])


class ReadOnly(io.FileIO):
    """A file of a disk that its kernel makes read-only after an error, which is nothing that a test may do to one."""

    def write(self, _):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_lines_wait_for_a_disk_that_becomes_read_only(tmp_path, capsys):
    with RunLog(tmp_path, True, 10, 0, ()) as log:
        usual = log._metrics
        log._metrics = ReadOnly(tmp_path / "metrics.jsonl")
        for line in LINES[:4]:
            log.record(line)
        assert capsys.readouterr().out.count("Read-only file system; its lines wait for room") == 1
        log._metrics = usual
        log.record(LINES[4])
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LINES[:5])


def test_a_run_goes_on_without_train_log(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    record(tmp_path, LINES)
    assert (tmp_path / "metrics.jsonl").read_text() == text_of(LINES)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLog(tmp_path / "gone", True, 10, 0, ())


def test_trackers_go_on_where_the_checkpoint_is(tmp_path, monkeypatch):
    """Killed after step 4, resumed at step 2: TensorBoard shows each step once, wandb knows the run again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds for its service to start: 30 may pass on a busy machine
    for start_step, steps in ((0, range(1, 5)), (2, [3])):
        with RunLog(tmp_path, True, 10, start_step, ("tensorboard", "wandb")) as log:
            for step in steps:
                log.record(train_line(step))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    # offline-run-TIME-ID, and -1 behind it where two start in one second
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_id.txt").read_text().strip()}


LIVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_log import train_line, val_line
from vitds.log import RunLog
with RunLog(Path(sys.argv[1]), True, 10, 0, ()) as log:
    log.say("starts at step 0")
    for step in range(1, 11):
        log.record(train_line(step))
        log.advance(step)
    log.record(val_line(10))
    time.sleep(0.3)
"""


def on_a_terminal(command, **environment):
    """Run a command on a pseudo-terminal and return all that it wrote there."""
    control, terminal = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "CI"} | {"TERM": "xterm", "COLUMNS": "120"} | environment
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT, env=env)
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(control, 4096):
            seen += chunk
    except OSError:  # Linux ends a pseudo-terminal whose other side is closed with EIO
        pass
    os.close(control)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_shows_a_live_display(tmp_path):
    seen = on_a_terminal([sys.executable, "-c", LIVE, str(tmp_path)])
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert "\x1b[?25l" in seen, "the cursor is hidden while a display is live"
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l"), "and comes back"
    assert "10/10" in shown
    for part in ("loss 0.0833", "lr 0.001", "123.4 images/s", "data-wait 25%", "ETA"):
        assert part in shown, part
    assert "val  loss 0.5000  top-1 75.00%" in shown
    assert "starts at step 0" in shown
    assert len((tmp_path / "train.log").read_text().splitlines()) == 12, "the log has every line all the same"


def test_continuous_integration_gets_plain_lines_on_a_terminal(tmp_path):
    seen = on_a_terminal([sys.executable, "-c", LIVE, str(tmp_path)], CI="true")
    assert "\x1b[?25l" not in seen
    assert seen.count("images/s") == 10
