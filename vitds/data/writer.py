"""Sources to a data set directory: tar shards, an index for each split, classes.json, and _info.json for timm.

What goes where is planned first (training rows are shuffled once, globally; validation rows keep their order), then
each shard is written whole by one worker, so the bytes do not depend on the number of workers. Everything is written
to OUT.partial, beside OUT, and renamed at the end: what is called OUT is complete.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from vitds.data.decode import BadImage, as_image_file
from vitds.data.index import INDEX_NAME, Index, label_columns, read_index, write_index
from vitds.data.order import sample_at
from vitds.data.sources import Source
from vitds.data.sources.base import Labels
from vitds.data.ustar import END_OF_ARCHIVE, MAX_NAME_BYTES, checksum, sample_span
from vitds.dataset_facts import DatasetFacts, check_splits
from vitds.durable import fsync, replace_text
from vitds.errors import DataError

CLASSES_NAME = "classes.json"
INFO_NAME = "_info.json"
SPLITS = ("train", "val")
_SHUFFLE_SEED = 0
_LOCK_NAME = ".vitds-is-writing"
_LOCK_WAIT_S = 10.0  # workers of a killed run hold the lock until they finish their shard
_NUM_BAD_SHOWN = 20


@dataclass(frozen=True)
class WriteOptions:
    """How shards are cut, by how many processes, and what happens to images that cannot be used."""

    name: str
    samples_per_shard: int = 1000
    workers: int = 1
    skip_bad: bool = False
    verify: bool = False


@dataclass
class SplitSummary:
    """What became of one split."""

    num_images: int
    num_shards: int
    size_bytes: int
    bad: list[str]


@dataclass
class Summary:
    """What a run wrote, and what its user should know."""

    num_classes: int
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """All that a worker needs to write any shard of a split: the same in every process."""

    source: Source
    rows: np.ndarray  # (N,) source rows in shard order
    keys: list[str]  # by source row
    labels: np.ndarray | list[tuple[int, ...]]  # N final labels, by source row
    directory: Path
    prefix: str
    options: WriteOptions

    @property
    def num_shards(self) -> int:
        return -(-len(self.rows) // self.options.samples_per_shard)

    def shard_name(self, shard: int) -> str:
        return f"{self.prefix}-{shard:06d}.tar"

    def shard_rows(self, shard: int) -> np.ndarray:
        size = self.options.samples_per_shard
        return self.rows[shard * size : (shard + 1) * size]


@dataclass(frozen=True)
class _Shard:
    """A finished shard: index rows (key, label, offset, size, width, height, crc32) and the images left out."""

    number: int
    rows: list[tuple]
    bad: list[str]
    size_bytes: int


def write_dataset(
    out: Path, sources: dict[str, Source], options: WriteOptions, on_progress: Callable[[str, int], None] | None = None
) -> Summary:
    """Write `sources` (by split) as a new data set, or add them to one that vitds wrote before.

    `on_progress(split, num_images)` is called as shards finish.
    Raises: DataError when OUT is in the way, classes do not agree, or images cannot be used and are not to be skipped.
    """
    old_classes, old_counts = _read_existing(out)
    for split in sources:
        if split in old_counts:
            raise DataError(
                f'there is a split "{split}" already', where=str(out), fix="choose another OUT, or move it away"
            )
    classes = old_classes or next(sources[split] for split in SPLITS if split in sources).classes
    labels = {split: _relabel(source, classes, out) for split, source in sources.items()}
    counts = {split: np.bincount(_flat(labels[split]), minlength=len(classes)).tolist() for split in sources}
    summary = Summary(len(classes), warnings=[note for source in sources.values() for note in source.notes])
    counts |= old_counts
    if counts.keys() >= {"train", "val"}:
        summary.warnings += check_splits(DatasetFacts(str(out), classes, counts["train"], counts["val"]))

    with _partial_directory(out) as partial:
        data = partial / "data"
        for split, source in sources.items():
            scratch = partial / "scratch"
            scratch.mkdir()
            source.prepare(scratch)
            summary.splits[split] = _write_split(data / split, split, source, labels[split], options, on_progress)
            shutil.rmtree(scratch)
        if old_classes:
            for split in sources:
                os.rename(data / split, out / split)
            _write_info(out, classes)
        else:
            _write_json(data / CLASSES_NAME, classes)
            _write_info(data, classes)
            fsync(data)
            os.rename(data, out)
        fsync(out)
        fsync(out.parent)
    return summary


def _read_existing(out: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Classes, and class counts by split, of the data set at OUT; nothing when OUT is free.

    Raises: DataError when something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return [], {}
    try:
        classes = json.loads((out / CLASSES_NAME).read_text())
        info = json.loads((out / INFO_NAME).read_text())
        listed = {split: entry["class_counts"] for split, entry in info["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("is not empty and is no data set of vitds", where=str(out), fix="choose another OUT") from None
    if any((out / split / INDEX_NAME).exists() and split not in listed for split in SPLITS):
        _write_info(out, classes)  # a run was killed between its last two steps
        return _read_existing(out)
    return classes, listed


def _relabel(source: Source, classes: list[str], out: Path) -> np.ndarray | list[tuple[int, ...]]:
    """A source's labels as positions in the data set's list of classes, matched by name."""
    if not len(source.labels):
        raise DataError("no images found", where=source.name)
    used = _flat(source.labels)
    if len(outside := used[(used < 0) | (used >= len(source.classes))]):
        row = next(row for row, label in enumerate(source.labels) if outside[0] in np.atleast_1d(label))
        raise DataError(f"label {outside[0]}, but there are {len(source.classes)} classes", where=source.where(row))
    position = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in (source.classes[label] for label in np.unique(used)) if name not in position]
    if unknown:
        raise DataError(
            f"has classes that the data set lacks: {_some(unknown)}",
            where=f"{source.name} -> {out}",
            fix="every validation class must be a training class; remove these folders, or shard both splits again",
        )
    ours = np.array([position.get(name, -1) for name in source.classes], dtype=np.int64)
    if isinstance(source.labels, np.ndarray):
        return ours[source.labels]
    return [tuple(np.unique(ours[list(label)]).tolist()) for label in source.labels]


def _flat(labels: Labels) -> np.ndarray:
    """Every class of every sample, in one line."""
    if isinstance(labels, np.ndarray):
        return labels
    return np.fromiter(itertools.chain.from_iterable(labels), dtype=np.int64)


def _some(names: list[str], num_shown: int = 10) -> str:
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(names[:num_shown]) + more


@contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """OUT.partial, ours alone while we write and gone afterwards; what a killed run of ours left there is cleared.

    Raises: DataError when another process is writing there, or the directory is not ours.
    """
    partial = out.with_name(out.name + ".partial")
    lock_path = partial / _LOCK_NAME
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not lock_path.exists():
            raise DataError("is in the way and was not made by vitds", where=str(partial), fix="move it away")
        with open(lock_path, "w") as lock:
            _take(lock.fileno(), partial)
            _clear(partial, keep=lock_path)
            try:
                yield partial
            finally:
                _clear(partial, keep=lock_path)  # the lock goes last: it is what says that the rest is ours to delete
                lock_path.unlink()
                partial.rmdir()
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=str(error.filename or out)) from error


def _take(lock: int, partial: Path) -> None:
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise DataError("another process is writing this data set", where=str(partial)) from None
            time.sleep(0.2)


def _clear(directory: Path, keep: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _write_split(
    directory: Path,
    split: str,
    source: Source,
    labels: np.ndarray | list[tuple[int, ...]],
    options: WriteOptions,
    on_progress: Callable[[str, int], None] | None,
) -> SplitSummary:
    """Write the shards and the index of one split."""
    directory.mkdir(parents=True)
    num_samples = len(source.keys)
    rows = np.arange(num_samples)
    if split == "train":
        _, rows = sample_at(rows, _SHUFFLE_SEED, num_samples)
    plan = _Plan(source, rows, _tar_keys(source.keys), labels, directory, f"{options.name}-{split}", options)
    shards = []
    for shard in _written_shards(plan, min(options.workers, plan.num_shards)):
        shards.append(shard)
        if on_progress:
            on_progress(split, len(shard.rows) + len(shard.bad))
    shards.sort(key=lambda shard: shard.number)
    bad = source.bad + [line for shard in shards for line in shard.bad]
    shards = [shard for shard in shards if shard.rows]
    if bad and (not options.skip_bad or not shards):
        shown = bad[:_NUM_BAD_SHOWN] + ["..."] * (len(bad) > _NUM_BAD_SHOWN)
        raise DataError(
            f"{len(bad)} of {num_samples + len(source.bad)} images cannot be used:\n    " + "\n    ".join(shown),
            where=split,
            fix="repair or remove them, or leave them out with --skip-bad",
        )
    write_index(directory / INDEX_NAME, _index(plan, shards))
    fsync(directory / INDEX_NAME)
    fsync(directory)
    return SplitSummary(
        sum(len(shard.rows) for shard in shards), len(shards), sum(shard.size_bytes for shard in shards), bad
    )


def _tar_keys(keys: list[str]) -> list[str]:
    """Make source keys safe inside a tar: ASCII without dots, short enough for ustar, and different from each other."""
    longest = MAX_NAME_BYTES - len(".webp") - len("-00000000")
    safe = [re.sub(r"[^A-Za-z0-9_/-]", "_", key)[:longest] for key in keys]
    times: dict[str, int] = {}
    for key in safe:
        times[key] = times.get(key, 0) + 1
    return [key if times[key] == 1 else f"{key}-{row:08d}" for row, key in enumerate(safe)]


def _written_shards(plan: _Plan, workers: int) -> Iterator[_Shard]:
    """Write all shards, by `workers` processes that share nothing but the plan, and yield each as it is finished."""
    if workers <= 1:
        yield from (_write_shard(plan, shard) for shard in range(plan.num_shards))
        return
    context = multiprocessing.get_context("fork")  # the plan reaches the workers without being copied
    processes, pipes = [], []
    for worker in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(plan, range(worker, plan.num_shards, workers), sender), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        while pipes:
            for pipe in cast(list[Connection], wait(pipes)):
                try:
                    result = pipe.recv()
                except EOFError:
                    raise DataError("a worker process died; was it out of memory?", where=str(plan.directory)) from None
                if result is None:
                    pipes.remove(pipe)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(plan: _Plan, shards: range, results: Connection) -> None:
    """The life of one worker process; it ends by itself when its parent is gone."""
    parent = os.getppid()
    try:
        for shard in shards:
            results.send(_write_shard(plan, shard))
            if os.getppid() != parent:
                return
        results.send(None)
    except Exception as error:
        results.send(error)


def _write_shard(plan: _Plan, number: int) -> _Shard:
    rows, bad, offset = [], [], 0
    with open(plan.directory / plan.shard_name(number), "wb", buffering=2**20) as tar:
        for row in plan.shard_rows(number):
            try:
                image = as_image_file(plan.source.read(row), verify=plan.options.verify)
            except (BadImage, OSError) as error:
                bad.append(f"{plan.source.where(row)}: {error}")
                continue
            key, label = plan.keys[row], plan.labels[row]
            span = sample_span(key, image.extension, image.data, label)
            tar.write(span)
            rows.append((key, label, offset, len(span), image.width, image.height, checksum(span)))
            offset += len(span)
        tar.write(END_OF_ARCHIVE)
        tar.flush()
        os.fsync(tar.fileno())
    if not rows:
        os.unlink(tar.name)
    return _Shard(number, rows, bad, offset + len(END_OF_ARCHIVE))


def _index(plan: _Plan, shards: list[_Shard]) -> Index:
    names = [plan.shard_name(shard.number) for shard in shards]
    shard_column = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.rows) for shard in shards])
    key, label, *numbers = zip(*(row for shard in shards for row in shard.rows), strict=True)
    one, several = label_columns(label)
    offset, size, width, height, crc32 = (np.array(column) for column in numbers)
    return Index(names, shard_column, pa.array(key, pa.string()), offset, size, one, width, height, crc32, several)


def _write_info(data: Path, classes: list[str]) -> None:
    """Write what timm's reader, and checks without pyarrow, need to know of each split; it follows from the indexes."""
    splits: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        if (data / split / INDEX_NAME).exists():
            index = read_index(data / split / INDEX_NAME)
            splits[split] = {
                "name": split,
                "num_samples": len(index),
                "filenames": [f"{split}/{shard}" for shard in index.shards],
                "shard_lengths": index.shard_lengths(),
                "class_counts": index.class_counts(len(classes)),
            }
            if index.labels is not None:
                splits[split]["multi_label"] = True  # a sample counts in each of its classes
    _write_json(data / INFO_NAME, {"splits": splits})


def _write_json(path: Path, content: object) -> None:
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
