"""Sources to a data set directory: tar shards, an index for each split, classes.json, health.json, _info.json for timm.

What goes where is planned first (`vitds.data.plan`), then each shard is written whole by one worker, so the bytes do
not depend on the number of workers. Everything is written to OUT.partial, beside OUT, and renamed at the end: what is
called OUT is complete. A run that was killed leaves OUT.partial behind; the same command goes on with the shards that
are finished there. Parts, written by several machines, are such directories of finished shards, which `merge_parts`
puts together.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from vitds.data.describe import (
    CLASSES_NAME,
    INFO_NAME,
    SPLITS,
    FinishedSplit,
    SplitSummary,
    Summary,
    health_of,
    read_json,
    summary_of,
    write_info,
    write_json,
)
from vitds.data.health import HEALTH_NAME
from vitds.data.index import INDEX_NAME, write_index
from vitds.data.partial import clear_leftovers, partial_directory
from vitds.data.plan import SplitPlan, WriteOptions, flat, relabelled
from vitds.data.processes import in_processes
from vitds.data.shard import ShardFiles, record_table, write_shard
from vitds.data.sources import Source
from vitds.data.ustar import END_OF_ARCHIVE
from vitds.dataset_facts import DatasetFacts, check_splits
from vitds.durable import fsync, replace_text
from vitds.errors import DataError
from vitds.progress import Watcher

__all__ = ["SPLITS", "Summary", "WriteOptions", "merge_parts", "part_directory", "write_dataset"]

_PLAN_NAME = "plan.json"
_NUM_BAD_SHOWN = 20


def write_dataset(
    out: Path, sources: dict[str, Source], options: WriteOptions, watcher: Watcher | None = None
) -> Summary:
    """Write `sources` (by split) as a new data set, or add them to one that vitds wrote before.

    What an earlier run of the same plan finished is not written again, be it some shards or everything.
    Raises: DataError when OUT is in the way, classes do not agree, images changed after they were written, something
            cannot be written, or images cannot be used and are not to be skipped.
    """
    watcher = watcher or Watcher()
    old_classes, old_counts = _read_existing(out)
    classes = old_classes or next(sources[split] for split in SPLITS if split in sources).classes
    plans = {
        split: SplitPlan(split, source, classes, relabelled(source, classes, str(out)), options)
        for split, source in sources.items()
    }
    counts = {split: np.bincount(flat(plan.labels), minlength=len(classes)).tolist() for split, plan in plans.items()}
    counts |= old_counts
    warnings = [note for source in sources.values() for note in source.notes]
    if counts.keys() >= {"train", "val"}:
        warnings += check_splits(DatasetFacts(str(out), classes, counts["train"], counts["val"]))

    there = _fingerprints(out)
    for split, plan in plans.items():
        if there.get(split) == plan.fingerprint:
            _check_unchanged(plan, out, out / split)
    plans = {split: plan for split, plan in plans.items() if there.get(split) != plan.fingerprint}
    target = out if options.part == (1, 1) else part_directory(out, options.part)
    if not plans:
        clear_leftovers(out)
        return replace(summary_of(out, classes, list(sources), warnings), is_new=False)
    with partial_directory(target) as partial:
        work, scratch = partial / "work", partial / "scratch"
        for split, plan in plans.items():
            (scratch / split).mkdir(parents=True)
            plan.source.prepare(scratch / split)
        document = _document(plans, classes, warnings, options)
        if target != out and target.exists():
            if _same_plan(_read_plan(target), document):
                for split, plan in plans.items():
                    _check_unchanged(plan, target, _files(target, document, split).shards)
                return replace(_part_summary(target, document), is_new=False)
            raise DataError("another part lies here already", where=str(target), fix="move it away")
        goes_on = _same_plan(_read_plan(work), document, with_state=True)
        taken = [split for split in plans if split in old_counts]
        if taken and not goes_on:
            changed = _listed(_changed_since(plans[taken[0]], out / taken[0]))
            raise DataError(
                f'there is a split "{taken[0]}" already, of other images or options'
                + (f"; these changed after it was written:{changed}" if changed else ""),
                where=str(out),
                fix="choose another OUT, or move it away",
            )
        _begin(work, document, goes_on, watcher)
        for split, plan in plans.items():
            if split not in taken:
                _write_split(plan, ShardFiles(work, split, f"{options.name}-{split}"), watcher)
        _check_bad(work, document, plans, options)
        if target != out:
            fsync(work)
            os.rename(work, target)
            fsync(target.parent)
            return _part_summary(target, document)
        return _finish(out, work, document, watcher, options.workers)


def part_directory(out: Path, part: tuple[int, int]) -> Path:
    """Where part `number` of `of` of a data set lies: beside OUT."""
    number, of = part
    return out.with_name(f"{out.name}.part-{number:0{len(str(of))}d}-of-{of}")


def merge_parts(out: Path, workers: int = 1, watcher: Watcher | None = None) -> Summary:
    """Put all parts of a data set together; they stay as they are. Shards are compared with their checksums on the way.

    Raises: DataError naming the parts that are missing, unfinished, damaged, or of another plan.
    """
    watcher = watcher or Watcher()
    parts = _find_parts(out)
    document = next(iter(parts.values())) | {"part": [1, 1]}
    for split, facts in document["splits"].items():
        facts["sources"] = sorted({name for part in parts.values() for name in part["splits"][split]["sources"]})
    classes, splits = document["classes"], document["splits"]
    old_classes, old_counts = _read_existing(out)
    if old_classes and old_classes != classes:
        raise DataError("the parts have other classes than the data set that is there", where=str(out))
    there = _fingerprints(out)
    if all(there.get(split) == facts["fingerprint"] for split, facts in splits.items()):
        clear_leftovers(out)
        return replace(summary_of(out, classes, list(splits), document["warnings"]), is_new=False)
    with partial_directory(out) as partial:
        work = partial / "work"
        goes_on = _same_plan(_read_plan(work), document)
        if not goes_on and (taken := old_counts.keys() & splits.keys()):
            raise DataError(f'there is a split "{min(taken)}" already', where=str(out), fix="choose another OUT")
        _begin(work, document, goes_on, watcher)
        tasks = []
        for split, facts in splits.items():
            if (out / split / INDEX_NAME).exists():
                continue  # a merge was killed between its last steps
            _files(work, document, split).make_directories()
            tasks += [(split, number) for number in range(facts["num_shards"])]
        directories = list(parts)
        watcher.begin("merge", len(tasks), unit="shards")

        def take(task: tuple[str, int], advance: Callable[[int], None]) -> None:
            split, number = task
            source = _files(directories[number % len(directories)], document, split)
            _take_shard(source, _files(work, document, split), number)
            advance(1)

        for _ in in_processes(take, tasks, workers, lambda num: watcher.advance("merge", num)):
            pass
        summary = _finish(out, work, document, watcher, workers)
    watcher.say(f"the {len(parts)} parts are merged; {out.name}.part-*-of-{len(parts)} may be deleted")
    return summary


# What is there


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
        write_info(out, classes)  # a run was killed between its last two steps
        return _read_existing(out)
    return classes, listed


def _fingerprints(out: Path) -> dict[str, str]:
    """What plan each split of a finished data set was written by."""
    parts = read_json(out / HEALTH_NAME).get("splits")
    parts = {split: part for split, part in parts.items() if isinstance(part, dict)} if isinstance(parts, dict) else {}
    return {split: part.get("fingerprint", "") for split, part in parts.items() if (out / split / INDEX_NAME).exists()}


def _changed_since(plan: SplitPlan, shards: Path) -> list[str]:
    """The source's files that were modified after the first of the split's shards was finished."""
    finished_ns = [path.stat().st_mtime_ns for path in shards.glob("*.tar")]
    if not finished_ns:
        return []
    first_ns, changed = min(finished_ns), []
    for path in plan.source.files():
        with suppress(OSError):  # what is missing is named when it is read
            if os.stat(path).st_mtime_ns > first_ns:
                changed.append(str(path))
    return changed


def _check_unchanged(plan: SplitPlan, where: Path, shards: Path) -> None:
    """Refuse to take shards for those of images that changed meanwhile; sizes are part of the fingerprint.

    Raises: DataError naming what changed.
    """
    if changed := _changed_since(plan, shards):
        raise DataError(
            f'split "{plan.split}" is complete, but {len(changed)} of its files changed after it was written:'
            + _listed(changed),
            where=str(where),
            fix="choose another OUT, or move it away",
        )


def _document(
    plans: dict[str, SplitPlan], classes: list[str], warnings: list[str], options: WriteOptions
) -> dict[str, Any]:
    """All that a merge, or a later run, needs to know of a run; it lies among the finished shards."""
    splits = {
        split: {
            "fingerprint": plan.fingerprint,
            "cuts": plan.cuts,
            "source_state": plan.source_state,
            "num_shards": plan.num_shards,
            "sources": [plan.source.name],
            "bad": plan.source.bad,
        }
        for split, plan in plans.items()
    }
    return {
        "name": options.name,
        "part": list(options.part),
        "classes": classes,
        "duplicates": options.find_duplicates,
        "warnings": warnings,
        "splits": splits,
    }


def _read_plan(work: Path) -> dict[str, Any]:
    return read_json(work / _PLAN_NAME)


def _same_plan(found: dict[str, Any], document: dict[str, Any], with_state: bool = False) -> bool:
    """Whether shards of one plan belong to another; `with_state` also asks whether the source's files are unchanged."""
    facts = ("fingerprint", "cuts", "source_state") if with_state else ("fingerprint", "cuts")

    def essence(plan: dict[str, Any]) -> object:
        return (
            plan["part"],
            plan["classes"],
            {split: [entry[fact] for fact in facts] for split, entry in plan["splits"].items()},
        )

    return bool(found) and essence(found) == essence(document)


def _begin(work: Path, document: dict[str, Any], goes_on: bool, watcher: Watcher) -> None:
    """Make the directory of work, or keep what a run of the same plan left there."""
    if not goes_on:
        if work.exists():
            watcher.say(f"{work.parent.name}: its shards are of another plan or of images that changed; starting over")
            shutil.rmtree(work)
        work.mkdir()
        write_json(work / _PLAN_NAME, document)


# Shards


def _write_split(plan: SplitPlan, files: ShardFiles, watcher: Watcher) -> None:
    """Write the shards that are not finished. One with images that could not be used may do better this time."""
    files.make_directories()
    records = {number: files.read_record(number) for number in plan.shards}
    unfinished = [number for number, record in records.items() if record is None or record["bad"]]
    total = sum(plan.num_rows(number) for number in plan.shards)
    todo = sum(plan.num_rows(number) for number in unfinished)
    watcher.begin(plan.split, total, done=total - todo)
    if len(unfinished) < len(records):
        watcher.say(f"{plan.split}: {len(records) - len(unfinished)} of {len(records)} shards are finished already")
    _ = plan.keys, plan.rows  # before the workers are forked
    work = functools.partial(write_shard, plan, files)
    workers = min(plan.options.workers, len(unfinished))
    for _ in in_processes(work, unfinished, workers, functools.partial(watcher.advance, plan.split)):
        pass


def _check_bad(work: Path, document: dict[str, Any], plans: dict[str, SplitPlan], options: WriteOptions) -> None:
    """Refuse images that cannot be used, unless they are to be skipped.

    Raises: DataError naming them.
    """
    bad, num_images = [], 0
    for split, plan in plans.items():
        files = _files(work, document, split)
        found = [line for number in plan.shards for line in (files.read_record(number) or {"bad": []})["bad"]]
        bad += document["splits"][split]["bad"] + found
        num_images += len(plan.source.keys) + len(plan.source.bad)
    if bad and not options.skip_bad:
        fix = "repair or remove them; or leave them out: --skip-bad goes on with the shards that are finished"
        raise unusable(bad, num_images, ", ".join(plans), fix)


def unusable(bad: list[str], num_images: int, where: str, fix: str) -> DataError:
    """The error that names the first of the images that cannot be used and, if there are more, a file with all."""
    if len(bad) > _NUM_BAD_SHOWN:
        with (
            suppress(OSError),  # no room for it
            NamedTemporaryFile(
                "w", encoding="utf-8", errors="backslashreplace", prefix="vitds-bad-", suffix=".txt", delete=False
            ) as file,
        ):
            file.writelines(f"{line}\n" for line in bad)
            fix = f"{fix}; all of them are listed in {file.name}"
    return DataError(f"{len(bad)} of {num_images} images cannot be used:{_listed(bad)}", where=where, fix=fix)


def _listed(lines: list[str]) -> str:
    shown = lines[:_NUM_BAD_SHOWN] + ["..."] * (len(lines) > _NUM_BAD_SHOWN)
    return "".join(f"\n    {line}" for line in shown)


def _files(work: Path, document: dict[str, Any], split: str) -> ShardFiles:
    return ShardFiles(work, split, f"{document['name']}-{split}")


def _load(out: Path, work: Path, document: dict[str, Any], split: str) -> FinishedSplit:
    """Collect the records of a split.

    Raises: DataError when no image is left.
    """
    files, facts = _files(work, document, split), document["splits"][split]
    records = []
    for number in range(facts["num_shards"]):
        record = json.loads(files.record(number).read_text(encoding="utf-8"))
        records.append(record)
    bad = [
        _place(line, facts["sources"]) for line in facts["bad"] + [line for record in records for line in record["bad"]]
    ]
    filled = [number for number, record in enumerate(records) if record["key"]]
    if not filled:
        raise DataError(f"none of {len(bad)} images can be used", where=split, fix="\n".join(bad[:_NUM_BAD_SHOWN]))
    tables = [record_table(records[number]) for number in filled]
    shard = np.repeat(np.arange(len(filled), dtype=np.int32), [len(table) for table in tables])
    directory = files.shards if files.shards.exists() else out / split
    return FinishedSplit(directory, [files.name(number) for number in filled], shard, pa.concat_tables(tables), bad)


def _place(line: str, sources: list[str]) -> str:
    """A line about an image without its source's name, which may differ between machines."""
    for name in sources:
        line = line.removeprefix(name)
    return line.lstrip(" /")


# The end


def _finish(out: Path, work: Path, document: dict[str, Any], watcher: Watcher, workers: int) -> Summary:
    """From finished shards to the data set: indexes, health, classes, and then the name OUT. Can be repeated."""
    classes, data = document["classes"], work / "data"
    old_classes, _ = _read_existing(out)
    loaded = {split: _load(out, work, document, split) for split in document["splits"]}
    for split, content in loaded.items():
        if content.directory == data / split:
            write_index(data / split / INDEX_NAME, content.index())
            fsync(data / split / INDEX_NAME)
            fsync(data / split)
    health = health_of(out, document, loaded, watcher, workers)
    home = out if old_classes else data
    if old_classes:
        for split, content in loaded.items():
            if content.directory == data / split:
                os.rename(data / split, out / split)
    else:
        write_json(data / CLASSES_NAME, classes)
    write_info(home, classes)
    write_json(home / HEALTH_NAME, health)
    if not old_classes:
        fsync(data)
        os.rename(data, out)
    fsync(out)
    fsync(out.parent)
    return summary_of(out, classes, list(loaded), document["warnings"])


# Parts


def _part_summary(part: Path, document: dict[str, Any]) -> Summary:
    summary = Summary(part, len(document["classes"]), warnings=document["warnings"])
    number, of = document["part"]
    for split, facts in document["splits"].items():
        files = _files(part, document, split)
        records = [
            json.loads(files.record(shard).read_text(encoding="utf-8"))
            for shard in range(number - 1, facts["num_shards"], of)
        ]
        summary.splits[split] = SplitSummary(
            sum(len(record["key"]) for record in records),
            len(records),
            sum(record["size_bytes"] for record in records),
            facts["bad"] + [line for record in records for line in record["bad"]],
        )
    return summary


def _find_parts(out: Path) -> dict[Path, dict[str, Any]]:
    """All parts beside OUT with what they know of their plan, in their order.

    Raises: DataError naming what is missing, unfinished or foreign.
    """
    found: dict[Path, dict[str, Any]] = {}
    unfinished = []
    for path in sorted(out.parent.glob(f"{out.name}.part-*-of-*")):
        named = re.fullmatch(r"\.part-(\d+)-of-(\d+)(\.partial)?", path.name.removeprefix(out.name))
        if named and named[3]:
            unfinished.append(path.name)
        elif named:
            document = _read_plan(path)
            if document.get("part") != [int(named[1]), int(named[2])]:
                raise DataError("is no part that vitds wrote under this name", where=str(path))
            found[path] = document
    if not found:
        command = f"python tools/shard_imagenet.py SOURCE {shlex.quote(str(out))} --part 1/N"
        raise DataError("there are no parts beside it", where=str(out), fix=f"write them first, 1 to N: {command}")

    def plan_of(document: dict[str, Any]) -> str:
        facts = {split: (entry["fingerprint"], entry["cuts"]) for split, entry in document["splits"].items()}
        return json.dumps([document["part"][1], document["classes"], facts])

    usual = Counter(plan_of(document) for document in found.values()).most_common(1)[0][0]
    foreign = [path.name for path, document in found.items() if plan_of(document) != usual]
    if foreign:
        raise DataError(
            f"{', '.join(foreign)}: not of the same source and options as the other parts",
            where=str(out.parent),
            fix="move them away; a part that is missing then must be written again",
        )
    of = next(iter(found.values()))["part"][1]
    expected = [part_directory(out, (number + 1, of)) for number in range(of)]
    missing = [path.name for path in expected if path not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {of} parts are missing: {', '.join(missing)}",
            where=str(out.parent),
            fix=f"unfinished: {', '.join(unfinished)}" if unfinished else "",
        )
    return {path: found[path] for path in expected}


def _take_shard(source: ShardFiles, target: ShardFiles, number: int) -> None:
    """Link (or copy) a shard and its record, after comparing every sample with its checksum.

    Raises: DataError naming shard and key.
    """
    if target.read_record(number) is not None:
        return
    record = source.read_record(number)
    if record is None:
        raise DataError("is missing, or has another size than when it was written", where=str(source.shard(number)))
    if record["size_bytes"]:
        path = target.shard(number)
        temporary = path.with_name(f".{path.name}.writing")
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            os.link(source.shard(number), temporary)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source.shard(number), temporary)
            fsync(temporary)
        with open(temporary, "rb", buffering=2**20) as shard:
            for key, size, checksum in zip(record["key"], record["size"], record["crc32"], strict=True):
                if crc32(shard.read(size)) != checksum:
                    raise DataError("bytes differ from what was written (crc32)", where=f"{source.shard(number)} {key}")
            if shard.read() != END_OF_ARCHIVE:
                raise DataError("does not end as it was written", where=str(source.shard(number)))
        path.unlink(missing_ok=True)  # a rename between two links of one file would leave both
        temporary.rename(path)
        fsync(path.parent)
    replace_text(target.record(number), json.dumps(record))
