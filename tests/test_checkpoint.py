"""The commit: a checkpoint is there whole or not at all, and what is damaged is named and passed over."""

import errno
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from run_directory import consolidated_state_dict

from vitds.checkpoint import CheckpointStore, save_weights, step_of
from vitds.errors import CheckpointError
from vitds.manifest import read_manifest
from vitds.world import World

RANKS = World(rank=0, world_size=1)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return CheckpointStore(tmp_path / "checkpoints", RANKS)


def torch_file(content):
    stream = io.BytesIO()
    torch.save({"content": content.decode()}, stream)
    return stream.getvalue()


def writing(content=b"weights"):
    """What DeepSpeed leaves: two files of a checkpoint, and its scripts beside the directory."""

    def write(directory, tag):
        (directory / tag).mkdir()
        (directory / tag / "mp_rank_00_model_states.pt").write_bytes(torch_file(content))
        (directory / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(torch_file(content * 1000))
        (directory / "zero_to_fp32.py").write_text("print()\n")

    return write


def commit(store, *steps):
    for step in steps:
        store.save(writing(b"weights of step %d" % step), step, {"step": step})


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def test_a_commit_is_deepspeeds_layout_with_a_manifest(store):
    path = store.save(writing(), 10, {"step": 10, "model": "ViT-B_16"})
    assert path == store.directory / "global_step10"
    assert listing(store.directory) == ["global_step10", "latest", "zero_to_fp32.py"]
    assert (store.directory / "latest").read_text() == "global_step10"
    manifest = read_manifest(path)
    assert manifest.info == {"step": 10, "model": "ViT-B_16"}
    assert set(manifest.files) == {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    assert store.verify(path) == []
    assert store.newest_whole().directory == path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_write_that_fails_keeps_what_was_committed_and_leaves_nothing_else(store, error):
    commit(store, 10)
    before = contents(store.directory)

    def torn(directory, tag):
        writing()(directory, tag)
        raise error

    with pytest.raises(CheckpointError, match="step 20 could not be written") as caught:
        store.save(torn, 20, {})
    assert str(error) in caught.value.what
    needed = sum(entry.size_bytes for entry in read_manifest(store.directory / "global_step10").files.values())
    assert re.search(rf"needs about {needed:,} bytes, [\d,]+ bytes are free there", caught.value.fix)
    assert contents(store.directory) == before
    assert store.newest_whole().directory.name == "global_step10"


def test_a_directory_that_cannot_be_made_is_the_same_error(store):
    commit(store, 10)
    away = store.directory.rename(store.directory.with_name("away"))
    store.directory.write_text("a file in the way")
    with pytest.raises(CheckpointError, match="step 20 could not be written"):
        store.save(writing(), 20, {})
    store.directory.unlink()
    away.rename(store.directory)
    assert store.newest_whole().directory.name == "global_step10"


@pytest.mark.parametrize("moment", ["while writing", "before the manifest", "before the rename", "before the pointer"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(store, monkeypatch, moment):
    """A kill is an exception that no handler sees: whatever is on disk then is what the next start finds."""

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    commit(store, 10)
    write = writing(b"new")
    if moment == "while writing":

        def write(directory, tag):
            (directory / tag).mkdir()
            (directory / tag / "mp_rank_00_model_states.pt").write_bytes(b"ne")
            raise Killed

    else:
        next_call = {
            "before the manifest": "vitds.checkpoint.write_manifest",
            "before the rename": "pathlib.Path.rename",
            "before the pointer": "vitds.checkpoint.replace_text",
        }
        monkeypatch.setattr(next_call[moment], killed)
    with pytest.raises(Killed):
        store.save(write, 20, {})
    monkeypatch.undo()

    choice = store.newest_whole()
    assert choice.passed_over == []
    assert choice.directory.name == ("global_step20" if moment == "before the pointer" else "global_step10")
    store.save(writing(b"again"), 20, {})
    assert store.newest_whole().directory.name == "global_step20"
    assert (store.directory / "latest").read_text() == "global_step20"
    assert (store.directory / "global_step20/mp_rank_00_model_states.pt").read_bytes() == torch_file(b"again")
    assert not [name for name in listing(store.directory) if name.startswith(".")]


def test_saving_a_step_again_replaces_it(store):
    commit(store, 10)
    flip(store.directory / "global_step10/mp_rank_00_model_states.pt")
    commit(store, 10)
    assert store.verify(store.directory / "global_step10") == []
    assert not [name for name in listing(store.directory) if name.startswith(".")]


def test_prune_keeps_the_newest_and_the_best(store):
    commit(store, 5, 10, 15, 100, 20)
    store.mark_best(5)
    store.prune(100, 2)
    assert [path.name for path in store.committed()] == ["global_step100", "global_step20", "global_step5"]
    assert not [name for name in listing(store.directory) if name.startswith(".")]
    assert (store.directory / "best").read_text() == "global_step5"
    store.mark_best(100)
    store.prune(100, 1)
    assert [path.name for path in store.committed()] == ["global_step100"]


def test_prune_keeps_every_nth_for_good(store):
    for step in range(4, 44, 4):
        commit(store, step)
        store.prune(step, 2, keep_every=12)
    assert [step_of(path) for path in store.committed()] == [40, 36, 24, 12]


class Killed(BaseException):
    """A kill is an exception that no handler sees: whatever is on disk then is what the next start finds."""


# Every call of the operating system through which a save, its pointers and its clean-up change the directory.
OPERATIONS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "scandir")


class Disk:
    """Counts these operations, and has the `at`-th one fail or kill: before it happens, or a file half written."""

    def __init__(self, monkeypatch, at, error):
        self.count, self.at, self.error = 0, at, error
        for owner, names in ((os, OPERATIONS), (Path, ("write_text",))):
            for name in names:
                monkeypatch.setattr(owner, name, self.counting(getattr(owner, name), name))

    def counting(self, operation, name):
        def counted(*args, **options):
            self.count += 1
            if self.count == self.at:
                if name == "write_text":
                    operation(args[0], args[1][: len(args[1]) // 2], **options)
                raise self.error
            return operation(*args, **options)

        return counted


def at_every_operation(directory, error, change, check):
    """Run `change` on a copy of a directory once for each of its operations, with that one failing."""
    for at in range(1, 500):
        copy = directory.with_name(f"at{at}")
        shutil.copytree(directory, copy)
        store = CheckpointStore(copy, RANKS)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, error)
            try:
                change(store)
            except (Killed, CheckpointError):
                pass
        check(store, f"operation {at} of {change.__name__}")
        shutil.rmtree(copy)
        if disk.count < at:
            return at - 1
    raise AssertionError("no end")


def save_mark_and_prune(store):
    store.save(writing(b"new"), 20, {"step": 20})
    store.mark_best(20)
    store.prune(20, 1)


def save_over_a_damaged_one(store):
    flip(store.directory / "global_step12" / MODEL_FILE)
    store.save(writing(b"new"), 12, {"step": 12})
    store.mark_best(12)
    store.prune(12, 1)


def prune(store):
    store.prune(12, 1)


@pytest.mark.parametrize("change", [save_mark_and_prune, save_over_a_damaged_one, prune])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_a_kill_or_a_full_disk_at_any_file_operation_leaves_a_whole_checkpoint(store, change, error):
    commit(store, 4, 8, 12)
    store.mark_best(12)

    def check(found, where):
        assert found.newest_whole().step >= (8 if change is save_over_a_damaged_one else 12), where
        if (best := found.directory / "best").exists():
            assert (found.directory / best.read_text()).is_dir(), where
        else:
            assert change is save_over_a_damaged_one, where
        found.save(writing(b"again"), 24, {"step": 24})
        found.mark_best(24)
        found.prune(24, 1)
        assert listing(found.directory) == ["best", "global_step24", "latest", "zero_to_fp32.py"], where

    assert at_every_operation(store.directory, error, change, check) > (4 if change is prune else 20)


def test_prune_drops_the_damaged_future_that_a_run_went_back_from(store):
    commit(store, 4, 8)
    flip(store.directory / "global_step8/mp_rank_00_model_states.pt")
    commit(store, 5)
    store.prune(5, 1)
    assert [path.name for path in store.committed()] == ["global_step5"]


def test_what_a_killed_save_left_is_cleared_by_the_next(store):
    commit(store, 4)
    (store.directory / ".writing-global_step7/global_step7").mkdir(parents=True)
    (store.directory / ".trash-global_step2").mkdir()
    commit(store, 8)
    assert not [name for name in listing(store.directory) if name.startswith(".")]


def test_what_cannot_be_deleted_is_in_no_saves_way(store, monkeypatch):
    """As on NFS a file that another process reads: the name stays until that process ends."""
    commit(store, 4)
    (store.directory / ".writing-global_step8/global_step8").mkdir(parents=True)
    (store.directory / ".trash-global_step4").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    commit(store, 8)
    store.prune(8, 1)
    assert [path.name for path in store.committed()] == ["global_step8"]
    assert store.verify(store.directory / "global_step8") == []


def test_a_new_run_has_no_commit_on_record(store):
    (store.directory / ".writing-global_step10").mkdir()
    (store.directory / "notes").mkdir()
    assert not store.has_commit_on_record()
    choice = store.newest_whole()
    assert choice.directory is None
    assert choice.passed_over == []


MODEL_FILE, OPTIMIZER_FILE = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
DAMAGES = {
    "missing": (lambda directory: (directory / MODEL_FILE).unlink(), f"{MODEL_FILE}: No such file"),
    "truncated": (lambda directory: truncate(directory / OPTIMIZER_FILE), f"{OPTIMIZER_FILE}: 9"),
    "flipped": (lambda directory: flip(directory / OPTIMIZER_FILE), f"{OPTIMIZER_FILE}: content differs"),
    "no manifest": (lambda directory: (directory / "MANIFEST.json").unlink(), "never committed"),
    "renamed": (lambda directory: directory.rename(directory.with_name("global_step30")), "the checkpoint of step 20"),
    "torn manifest": (lambda directory: truncate(directory / "MANIFEST.json"), "MANIFEST.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(store, damage):
    commit(store, 10, 20)
    do_damage, message = DAMAGES[damage]
    do_damage(store.directory / "global_step20")
    damaged = store.committed()[0]
    (line,) = store.verify(damaged)
    assert message in line
    assert damaged.name in line
    choice = store.newest_whole()
    assert choice.directory.name == "global_step10"
    assert choice.passed_over == [line]


def test_where_a_commit_is_on_record_and_nothing_verifies_the_answer_is_an_error(store):
    commit(store, 10, 20)
    flip(store.directory / "global_step10" / MODEL_FILE)
    (store.directory / "global_step20" / OPTIMIZER_FILE).unlink()
    before = contents(store.directory)
    with pytest.raises(CheckpointError, match="none of them verifies") as caught:
        store.newest_whole()
    assert caught.value.exit_code == 4
    assert OPTIMIZER_FILE in caught.value.fix
    assert MODEL_FILE in caught.value.fix
    assert contents(store.directory) == before


def test_a_pointer_alone_is_a_commit_on_record(store):
    commit(store, 10)
    shutil.rmtree(store.directory / "global_step10")
    with pytest.raises(CheckpointError, match="none of them verifies"):
        store.newest_whole()


def test_steps_are_ordered_as_numbers(store):
    commit(store, 9, 100, 20)
    assert [step_of(path) for path in store.committed()] == [100, 20, 9]
    with pytest.raises(CheckpointError, match="not a global_stepN"):
        step_of(store.directory / "global_step")


def test_weights_alone_have_the_shape_of_a_run(tmp_path):
    state = {"head.weight": torch.randn(3, 4), "head.bias": torch.randn(3)}
    path = save_weights(tmp_path / "out", state, {"model": "ViT-B_16"})
    assert path == tmp_path / "out/global_step0"
    assert (tmp_path / "out/latest").read_text() == "global_step0"
    loaded = consolidated_state_dict(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert read_manifest(path).info["model"] == "ViT-B_16"


def test_weights_where_a_file_stands_are_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"):
        save_weights(tmp_path / "out", {}, {})
