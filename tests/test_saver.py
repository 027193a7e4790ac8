"""Saves behind the back of training: one at a time, each whole, and a failure known before the next decision."""

import threading
from types import SimpleNamespace

import pytest
import torch

from vitds.checkpoint import CheckpointStore
from vitds.resume import Progress
from vitds.saver import Saver
from vitds.snapshot import HostBuffers, Snapshot
from vitds.world import World


class Log:
    def __init__(self):
        self.lines, self.error = [], None

    def flush(self):
        return self.error

    def say(self, text):
        self.lines.append(text)

    say_from_any_rank = say


class Engine:
    """A state of one tensor, whose writes wait for `gate` and fail while `is_full`."""

    def __init__(self):
        self.weights, self.buffers = torch.zeros(1000), HostBuffers()
        self.gate, self.is_full = threading.Event(), False

    def snapshot(self, client_state):
        engine = self

        class Gated(Snapshot):
            def write(self, directory, tag):
                assert engine.gate.wait(60)
                super().write(directory, tag)
                if engine.is_full:
                    raise OSError(28, "No space left on device")

        snapshot = Gated(self.buffers, {})
        snapshot.files["mp_rank_00_model_states.pt"] = {"weights": self.weights, **client_state}
        return snapshot


@pytest.fixture(params=[True, False], ids=["background", "foreground"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.setattr("vitds.saver.checkpoint_info", lambda plan, engine, step: {"step": step})
    (tmp_path / "checkpoints").mkdir()
    options = SimpleNamespace(save_in_background=request.param, keep_last=1, keep_every=None)
    plan = SimpleNamespace(run=options, run_dir=tmp_path, world=World())
    engine, log, progress = Engine(), Log(), Progress()
    store = CheckpointStore(tmp_path / "checkpoints", World())
    with Saver(plan, engine, store, log, progress) as saver:
        yield SimpleNamespace(saver=saver, engine=engine, store=store, log=log, progress=progress, plan=plan)
        engine.gate.set()


def saved_weights(run, step):
    return torch.load(run.store.directory / f"global_step{step}/mp_rank_00_model_states.pt")["weights"]


def test_training_goes_on_while_a_save_is_written(run):
    if not run.plan.run.save_in_background:
        pytest.skip("in the foreground training waits")
    run.progress.step = 4
    run.saver.save(run.progress)
    assert not run.store.committed(), "it is still being written"
    run.engine.weights.fill_(7)
    run.engine.gate.set()
    run.progress.step = 8
    run.saver.save(run.progress)  # waits for the first: two saves never overlap
    assert saved_weights(run, 4).eq(0).all()
    run.saver.settle(run.progress)
    assert [path.name for path in run.store.committed()] == ["global_step8"]
    assert saved_weights(run, 8).eq(7).all()
    assert run.log.lines == []


def test_a_failed_save_is_said_once_and_the_best_stays_the_one_that_has_a_checkpoint(run):
    run.engine.gate.set()
    run.progress.step = 4
    assert run.progress.note_best({"top1": 0.5})
    run.saver.save(run.progress)
    run.saver.settle(run.progress)
    assert not run.progress.last_save_failed

    run.engine.is_full, run.progress.step = True, 8
    assert run.progress.note_best({"top1": 0.75})
    run.saver.save(run.progress)
    run.saver.settle(run.progress)
    run.saver.settle(run.progress)
    (line,) = run.log.lines
    assert "the checkpoint of step 8 could not be written: rank 0: [Errno 28] No space left" in line
    assert "it needs about 4,000 bytes" in line and "bytes are free there" in line
    assert run.progress.last_save_failed
    assert run.progress.best == (0.5, None, 4)
    assert (run.store.directory / "best").read_text() == "global_step4"
    assert sorted(path.name for path in run.store.directory.iterdir()) == ["best", "global_step4", "latest"]

    run.engine.is_full, run.progress.step = False, 12
    assert run.progress.note_best({"top1": 0.625}), "less than what was lost, and better than what there is"
    run.saver.save(run.progress)
    run.saver.settle(run.progress)
    assert not run.progress.last_save_failed
    assert (run.store.directory / "best").read_text() == "global_step12"
    assert [path.name for path in run.store.committed()] == ["global_step12"]


def test_the_end_of_a_run_waits_for_its_save(tmp_path, run):
    if not run.plan.run.save_in_background:
        pytest.skip("nothing is pending")
    run.progress.step = 4
    run.saver.save(run.progress)
    threading.Timer(0.2, run.engine.gate.set).start()
    run.saver.__exit__(None, None, None)
    assert run.store.newest_whole().step == 4


def test_without_memory_for_a_copy_training_waits_and_is_told_so_once(run, monkeypatch):
    monkeypatch.setattr(HostBuffers, "have_room", lambda *_: False)
    run.engine.gate.set()
    for step in (4, 8):
        run.progress.step = step
        run.saver.save(run.progress)
        assert run.store.newest_whole().step == step
    in_background = run.plan.run.save_in_background
    assert [line for line in run.log.lines if "no memory" in line] == run.log.lines
    assert len(run.log.lines) == in_background


def test_no_checkpoint_is_ahead_of_the_metrics(run):
    """A kill after its commit would lose the lines that still wait for room."""
    run.engine.gate.set()
    run.log.error = OSError(28, "No space left on device")
    run.progress.step = 4
    run.saver.save(run.progress)
    run.saver.settle(run.progress)
    assert run.progress.last_save_failed and not run.store.committed()
    assert "No space left on device" in run.log.lines[-1]
    run.log.error, run.progress.step = None, 8
    run.saver.save(run.progress)
    run.saver.settle(run.progress)
    assert not run.progress.last_save_failed and [path.name for path in run.store.committed()] == ["global_step8"]
