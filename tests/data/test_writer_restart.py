"""A writer killed at any instant and started again ends with the same bytes; parts of several machines do as well."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from data_sets import files_of, pixel_source
from PIL import Image

from vitds.data.sources import PixelSource, open_source
from vitds.data.writer import WriteOptions, merge_parts, write_dataset
from vitds.errors import DataError
from vitds.progress import Watcher

pytestmark = pytest.mark.ranks
_TOUCHES_FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


class Slow(PixelSource):
    """Takes its time, so that kills find something unfinished."""

    def read(self, row: int) -> bytes:
        time.sleep(0.01)
        return super().read(row)


def sources(kind: type[PixelSource] = PixelSource) -> dict[str, PixelSource]:
    return {
        "train": kind(**vars(pixel_source(29, seed=1))),
        "val": kind(**vars(pixel_source(11, seed=2))),
    }


def write(out: Path, kind: type[PixelSource] = PixelSource, watcher: Watcher | None = None, **options) -> None:
    write_dataset(out, sources(kind), WriteOptions("pixels", **{"samples_per_shard": 8} | options), watcher)


def in_child(work, *args, kill_at: int | None = None, **kwargs) -> int:
    """Call `work` in a process of its own; with `kill_at`, that process is killed at that file operation."""

    def run() -> None:
        if kill_at is not None:
            left = [kill_at]

            def count(event: str, arguments: tuple) -> None:
                if event in _TOUCHES_FILES and os.getpid() == own:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(own, signal.SIGKILL)

            own = os.getpid()
            sys.addaudithook(count)
        work(*args, **kwargs)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    write(out)
    return files_of(out)


def assert_whole(out: Path, expected: dict[str, bytes]) -> None:
    assert files_of(out) == expected
    assert [path.name for path in out.parent.iterdir() if ".part" not in path.name] == ["out"]
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_costs_nothing_but_time(tmp_path, expected, step):
    out, kill_at, killed = tmp_path / "out", 1, True
    while killed:
        killed = in_child(write, out, kill_at=kill_at) == -signal.SIGKILL
        write(out, workers=1 + kill_at % 2)
        assert_whole(out, expected)
        shutil.rmtree(out)
        kill_at += step
    assert kill_at > 100


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_operation_of_adding_a_split_or_merging(tmp_path, expected, step):
    def add(out: Path) -> None:
        write_dataset(out, {"val": sources()["val"]}, WriteOptions("pixels", 8))

    out, kill_at, killed = tmp_path / "out", 1, True
    while killed:
        write_dataset(out, {"train": sources()["train"]}, WriteOptions("pixels", 8))
        killed = in_child(add, out, kill_at=kill_at) == -signal.SIGKILL
        add(out)
        assert_whole(out, expected)
        shutil.rmtree(out)
        kill_at += step
    for part in (1, 2):
        write(out, part=(part, 2))
    kill_at, killed = 1, True
    while killed:
        killed = in_child(merge_parts, out, kill_at=kill_at) == -signal.SIGKILL
        merge_parts(out)
        assert_whole(out, expected)
        shutil.rmtree(out)
        kill_at += step


def test_many_kills_of_parent_and_workers_at_random_moments(tmp_path, expected):
    out, chance = tmp_path / "out", random.Random(0)
    num_kills = 0
    for attempt in range(200):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=write, args=(out, Slow), kwargs={"workers": 1 + attempt % 3})
        process.start()
        process.join(chance.uniform(0.0, 0.12))
        if process.is_alive():
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children[: chance.randrange(3)]:
                with suppress(ProcessLookupError):  # it ended by itself, or its parent ended it after the first kill
                    os.kill(int(child), signal.SIGKILL)
            if chance.random() < 0.7:
                process.kill()
            num_kills += 1
        process.join(60)
        if process.exitcode == 0:
            break
    assert num_kills > 1
    assert_whole(out, expected)


class Telling(Watcher):
    def __init__(self) -> None:
        self.begun: dict[str, tuple[int, int]] = {}
        self.said: list[str] = []

    def begin(self, task, total, *, done=0, unit="images"):
        self.begun[task] = total, done

    def say(self, text):
        self.said.append(text)


def interrupted(out: Path, **options) -> None:
    class Dies(PixelSource):
        def read(self, row: int) -> bytes:
            if row > 4:
                raise KeyboardInterrupt
            return super().read(row)

    of = {"train": sources()["train"], "val": Dies(**vars(sources()["val"]))}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(out, of, WriteOptions("pixels", **{"samples_per_shard": 4} | options))


def test_finished_shards_are_kept_and_said(tmp_path):
    interrupted(tmp_path / "out")
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    watcher = Telling()
    write(tmp_path / "out", watcher=watcher, samples_per_shard=4)
    assert watcher.begun == {"train": (29, 29), "val": (11, 4)}
    assert watcher.said == [
        "train: 8 of 8 shards are finished already",
        "val: 1 of 3 shards are finished already",
    ]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["option", "labels", "pixels"])
def test_another_plan_starts_over_and_says_so(tmp_path, change):
    interrupted(tmp_path / "out")
    of, options = sources(), {"samples_per_shard": 4}
    if change == "option":
        options = {"samples_per_shard": 5}
    elif change == "labels":
        of["train"].labels = of["train"].labels[::-1]
    else:
        of["train"].images = 255 - of["train"].images
    watcher = Telling()
    write_dataset(tmp_path / "out", of, WriteOptions("pixels", **options), watcher)
    assert "starting over" in watcher.said[0] and watcher.begun["train"] == (29, 0)
    write_dataset(tmp_path / "fresh/out", of, WriteOptions("pixels", **options))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh/out")


def test_the_same_command_on_a_complete_data_set_does_nothing(tmp_path, expected):
    write(tmp_path / "out")
    watcher = Telling()
    write(tmp_path / "out", watcher=watcher, workers=2)
    assert not watcher.begun
    assert_whole(tmp_path / "out", expected)


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)).save(path)


def folder(root: Path) -> Path:
    for number in range(6):
        save(root / "train" / "ab"[number % 2] / f"{number}.png", number)
        save(root / "val" / "ab"[number % 2] / f"{number}.png", 10 + number)
    return root


@pytest.mark.parametrize("part", [(1, 1), (1, 2)])
@pytest.mark.parametrize("change", ["newer", "other size, older"])
def test_images_that_changed_after_they_were_written_are_refused_and_named(tmp_path, part, change):
    root, options = folder(tmp_path / "in"), WriteOptions("pngs", 2, part=part)
    assert write_dataset(tmp_path / "out", open_source(str(root), None, tmp_path), options).is_new
    [written] = tmp_path.glob("out*")
    before, image = files_of(written), root / "train/b/3.png"
    assert not write_dataset(tmp_path / "out", open_source(str(root), None, tmp_path), options).is_new
    if change == "newer":
        content = bytearray(image.read_bytes())
        content[-20] ^= 1
        image.write_bytes(content)
        os.utime(image)
    else:
        image.write_bytes(image.read_bytes() + b"more")
        os.utime(image, (1e9, 1e9))
    with pytest.raises(DataError) as caught:
        write_dataset(tmp_path / "out", open_source(str(root), None, tmp_path), options)
    assert (str(image) in str(caught.value)) == (change == "newer") and str(written) in str(caught.value)
    assert "move it away" in str(caught.value) and files_of(written) == before
    assert list(tmp_path.glob("out*")) == [written]


def test_an_image_repaired_after_it_was_left_out_is_not_left_out_in_silence(tmp_path):
    root, options = folder(tmp_path / "in"), WriteOptions("pngs", 2, skip_bad=True)
    image = root / "val/a/0.png"
    content = image.read_bytes()
    image.write_bytes(b"")
    write_dataset(tmp_path / "out", open_source(str(root), None, tmp_path), options)
    image.write_bytes(content)
    with pytest.raises(DataError, match=r'split "val"(.|\n)*changed after it was written:\n *' + re.escape(str(image))):
        write_dataset(tmp_path / "out", open_source(str(root), None, tmp_path), options)


def test_a_worker_that_dies_is_reported_and_its_shards_are_written_by_the_next_run(tmp_path, expected):
    class Murderous(PixelSource):
        def read(self, row: int) -> bytes:
            if row == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(row)

    of = {"train": sources()["train"], "val": sources()["val"]}
    with pytest.raises(DataError, match="worker process died"):
        write_dataset(
            tmp_path / "out", of | {"train": Murderous(**vars(of["train"]))}, WriteOptions("pixels", 8, workers=2)
        )
    write(tmp_path / "out")
    assert_whole(tmp_path / "out", expected)


def full_disk(out: Path, limit: int, told) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(out, workers=2)
    except DataError as error:
        told.send(str(error))


def test_a_disk_that_is_full_is_named_with_the_file_and_nothing_is_lost(tmp_path, expected):
    ours, theirs = multiprocessing.Pipe()
    assert in_child(full_disk, tmp_path / "out", 7000, theirs) == 0  # validation's last shard is smaller
    message = ours.recv()
    assert "cannot be written: File too large" in message and ".tar.writing" in message and "goes on" in message
    write(tmp_path / "out")
    assert_whole(tmp_path / "out", expected)


def test_where_nothing_can_be_written_the_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written") as caught:
        write(tmp_path / "file/out")
    assert str(tmp_path / "file") in str(caught.value)


# Parts


@pytest.mark.parametrize("num_parts, workers", [(3, 2), (7, 1)])
def test_parts_of_several_machines_make_the_same_data_set(tmp_path, expected, num_parts, workers):
    for part in range(num_parts):
        machine = tmp_path / f"machine-{part}"
        write(machine / "out", part=(part + 1, num_parts), workers=workers)
        [directory] = machine.iterdir()
        shutil.copytree(directory, tmp_path / "here" / directory.name)  # from another disk
        shutil.rmtree(machine)
    summary = merge_parts(tmp_path / "here/out", workers)
    assert files_of(tmp_path / "here/out") == expected
    assert summary.splits["train"].num_images == 29 and summary.health["leakage"]["val_images"] == 0
    assert len(list((tmp_path / "here").glob("out.part-*"))) == num_parts
    merge_parts(tmp_path / "here/out")  # again: nothing to do
    assert files_of(tmp_path / "here/out") == expected


def test_parts_that_are_missing_unfinished_or_foreign_are_refused_by_name(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no parts beside it"):
        merge_parts(out)
    write(out, part=(1, 3))
    interrupted(out, samples_per_shard=8, part=(2, 3))
    with pytest.raises(DataError, match=r"2 of 3 parts are missing: out.part-2-of-3, out.part-3-of-3") as caught:
        merge_parts(out)
    assert "unfinished: out.part-2-of-3.partial" in str(caught.value)
    write(out, part=(2, 3))
    write(out, part=(3, 3), samples_per_shard=7)
    with pytest.raises(DataError, match=r"out.part-3-of-3: not of the same source and options"):
        merge_parts(out)
    shutil.rmtree(tmp_path / "out.part-3-of-3")
    shutil.copytree(tmp_path / "out.part-1-of-3", tmp_path / "out.part-3-of-3")
    with pytest.raises(DataError, match="no part that vitds wrote under this name"):
        merge_parts(out)
    assert not out.exists()


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "record"])
def test_a_part_that_was_damaged_on_its_way_is_named(tmp_path, damage):
    out = tmp_path / "out"
    for part in (1, 2):
        write(out, part=(part, 2))
    shard = tmp_path / "out.part-2-of-2/data/train/pixels-train-000001.tar"
    content = bytearray(shard.read_bytes())
    if damage == "bit":
        content[3000] ^= 4
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-512])
    elif damage == "gone":
        shard.unlink()
    else:
        (tmp_path / "out.part-2-of-2/records/train/000001.json").write_text("{")
    with pytest.raises(DataError, match=r"pixels-train-000001.tar") as caught:
        merge_parts(out)
    assert ("image-" in str(caught.value)) == (damage == "bit") and not out.exists()


def test_a_part_with_bad_images_says_so_itself(tmp_path):
    class Holey(PixelSource):
        def read(self, row: int) -> bytes:
            return b"" if row == 3 else super().read(row)

    of = {"train": Holey(**vars(sources()["train"]))}
    options = {"samples_per_shard": 8, "skip_bad": True}
    write_dataset(tmp_path / "whole/out", of, WriteOptions("pixels", **options))
    bad = 0
    for part in (1, 2):
        summary = write_dataset(tmp_path / "out", of, WriteOptions("pixels", **options, part=(part, 2)))
        bad += len(summary.splits["train"].bad)
    assert bad == 1
    assert merge_parts(tmp_path / "out").splits["train"].bad == ["image-3: empty file"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole/out")


# Shards by size


@pytest.mark.parametrize("shard_bytes", [1, 5000, 9000, 10**9])
def test_shards_are_cut_by_bytes(tmp_path, shard_bytes):
    from vitds.data.index import read_index

    write(tmp_path / "out", shard_bytes=shard_bytes)
    index = read_index(tmp_path / "out/train/index.parquet")
    sizes = [(tmp_path / "out/train" / shard).stat().st_size - 1024 for shard in index.shards]
    assert sum(index.shard_lengths()) == 29
    span = int(index.size[0])
    assert np.all(index.size == span)  # equal images: every shard but the last is as full as it can be
    assert index.shard_lengths()[:-1] == [max(1, shard_bytes // span)] * (len(sizes) - 1)
    for part in (1, 2):
        write(tmp_path / "parts/out", shard_bytes=shard_bytes, part=(part, 2))
    merge_parts(tmp_path / "parts/out")
    assert files_of(tmp_path / "parts/out") == files_of(tmp_path / "out")
