"""What a run must know of a dataset directory before anything is built: classes, counts, whether the splits agree."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitds.errors import DataError
from vitds.transport import Url, location

_SHARD_FIRST = "write one from images: python tools/shard_imagenet.py SOURCE OUT"


@dataclass(frozen=True)
class DatasetFacts:
    """A data set's classes, and the number of samples of each class in each split (no counts: no such split).

    Where samples have any number of classes (`multi_label`), the counts do not add up to the samples of a split:
    `num_samples` says how many those are.
    """

    path: str
    classes: list[str]
    train_counts: list[int]
    val_counts: list[int]
    multi_label: bool = False
    num_samples: tuple[int, int] | None = None  # train, val
    parts: tuple[DatasetFacts, ...] = ()  # of a mixture: its directories

    @property
    def num_train(self) -> int:
        """Samples to train on."""
        return self.num_samples[0] if self.num_samples else sum(self.train_counts)

    @property
    def num_val(self) -> int:
        """Samples to validate on."""
        return self.num_samples[1] if self.num_samples else sum(self.val_counts)


def split_paths(path: str) -> list[str]:
    """The directories that `--data` names: one, or several with commas between them.

    A comma is part of a name where a directory of that name exists, inside braces, and in the command of a pipe.
    """
    if path.startswith("pipe:"):
        return [path]
    pieces = re.split(r",(?![^{]*\})", path)
    found: list[str] = []
    while pieces:
        lengths = range(len(pieces), 1, -1)
        length = next((number for number in lengths if Path(",".join(pieces[:number])).exists()), 1)
        found.append(",".join(pieces[:length]))
        del pieces[:length]
    return found


def united(names: Iterable[Sequence[str]]) -> list[str]:
    """The classes of several data sets by name, in the order of first appearance."""
    return list(dict.fromkeys(name for of_one in names for name in of_one))


def read_dataset_facts(path: str, split: str = "train") -> DatasetFacts:
    """Read classes.json and _info.json; of several directories, those of all, each of which must have the split.

    Raises: DataError when a directory is missing, is no data set, is damaged, or has nothing in the split.
    """
    directories = split_paths(path)
    parts = [_read_directory(directory, split, len(directories) > 1) for directory in directories]
    return parts[0] if len(parts) == 1 else _merged(path, parts)


def _merged(path: str, parts: Sequence[DatasetFacts]) -> DatasetFacts:
    classes = united(part.classes for part in parts)
    train, val = (dict.fromkeys(classes, 0) for _ in range(2))
    for part in parts:
        for name, num_train in zip(part.classes, part.train_counts or [0] * len(part.classes), strict=True):
            train[name] += num_train
        for name, num_val in zip(part.classes, part.val_counts or [0] * len(part.classes), strict=True):
            val[name] += num_val
    num_samples = sum(part.num_train for part in parts), sum(part.num_val for part in parts)
    multi_label = any(part.multi_label for part in parts)
    return DatasetFacts(
        path, classes, list(train.values()), list(val.values()), multi_label, num_samples, parts=tuple(parts)
    )


def _read_directory(path: str, split: str, is_mixture: bool) -> DatasetFacts:
    directory = location(path)
    if isinstance(directory, Path) and not directory.is_dir():
        if directory.exists():
            raise DataError("is a file, no dataset directory", where=path, fix=_SHARD_FIRST)
        if "://" in path:
            raise DataError("no address that vitds reads", where=path, fix="https://, http://, s3:// or gs://")
        raise DataError("no such data directory", where=path, fix=f"{_neighbours(directory)}\n{_SHARD_FIRST}")
    classes, info = (_read_json(directory / name) for name in ("classes.json", "_info.json"))
    try:
        splits = info["splits"]
        counts = {name: [int(count) for count in splits[name]["class_counts"]] for name in splits}
        multi_label = any(splits[name].get("multi_label", False) for name in splits)
        train, val = (int(splits.get(name, {}).get("num_samples", 0)) for name in ("train", "val"))
        damaged = not all(isinstance(name, str) for name in classes)
        damaged |= any(len(of_split) != len(classes) for of_split in counts.values())
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        damaged = True
    if damaged:
        raise DataError("classes.json and _info.json do not fit together", where=path, fix=_SHARD_FIRST)
    num_samples = (train, val) if multi_label else None
    facts = DatasetFacts(path, classes, counts.get("train", []), counts.get("val", []), multi_label, num_samples)
    if not (facts.num_train if split == "train" else facts.num_val):
        state = "is empty" if split in counts else "is missing"
        name = "training" if split == "train" else "validation"
        fix = f"{_SHARD_FIRST} --split {split}"
        if is_mixture and facts.num_val:
            fix += "\nor, to validate on it alone, name it not in --data but in --set data.val_path=DIR,DIR"
        raise DataError(f"the {name} split {state}", where=f"{path}/{split}", fix=fix)
    return facts


def validated_on(facts: DatasetFacts, val: DatasetFacts) -> DatasetFacts:
    """Facts with the validation split of another data set, which may name classes that are only numbers here.

    Raises: DataError when its labels mean something else.
    """
    are_numbers = facts.classes == [str(label) for label in range(len(facts.classes))]
    if val.classes != facts.classes and not (are_numbers and len(val.classes) <= len(facts.classes)):
        raise DataError(
            f"its {_classes(val.classes)} are not the {len(facts.classes)} of the training data, in their order",
            where=val.path,
            fix="write the two as splits of one data set: tools/shard_imagenet.py gives them one classes.json",
        )
    if val.multi_label and not facts.multi_label:
        raise DataError("its samples have any number of classes, and those to train on one", where=val.path)
    val_counts = val.val_counts + [0] * (len(facts.classes) - len(val.classes))
    return dataclasses.replace(facts, val_counts=val_counts, num_samples=(facts.num_train, val.num_val))


def check_splits(facts: DatasetFacts) -> list[str]:
    """Compare the classes of the two splits; a warning for what validation lacks.

    Raises: DataError when validation has a class that was never trained on.
    """
    if not (facts.num_val and facts.train_counts):  # of a stream nobody counted
        return []
    pairs = list(zip(facts.classes, facts.train_counts, facts.val_counts, strict=True))
    untrained = [name for name, num_train, num_val in pairs if num_val and not num_train]
    unseen = [name for name, num_train, num_val in pairs if num_train and not num_val]
    if untrained:
        raise DataError(
            f"validation has {_classes(untrained)} that training lacks: {_names(untrained)}",
            where=facts.path,
            fix="add training images of it, or take it out of the validation images, and write the shards again",
        )
    if unseen:
        return [
            f"validation has no image of {_names(unseen)}: {_classes(unseen)} not measured (labels stay as they are)"
        ]
    return []


def check_mixture(facts: DatasetFacts) -> list[str]:
    """A warning for each directory of a mixture that has few classes in common with those before it.

    Classes are the same when their names are: one that calls them otherwise would train a head of its own beside.
    """
    warnings, known = [], set(facts.parts[0].classes) if facts.parts else set()
    for part in facts.parts[1:]:
        shared = known & set(part.classes)
        if 2 * len(shared) < min(len(known), len(part.classes)):
            warnings.append(
                f"{part.path} shares {len(shared)} of its {_classes(part.classes)} by name with the directories before "
                f"it: the head has {len(facts.classes)} outputs"
            )
        known |= set(part.classes)
    return warnings


def check_head(facts: DatasetFacts, num_classes: int) -> None:
    """Refuse a head with fewer outputs than the data has classes.

    Raises: DataError naming both numbers.
    """
    if num_classes < len(facts.classes):
        raise DataError(
            f"the data has {len(facts.classes)} classes and the head {num_classes} outputs",
            where=facts.path,
            fix=f"--num-classes {len(facts.classes)}, or leave it out: it follows from the data",
        )


def _read_json(path: Path | Url) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        root = path.parent
        fix = _how_to_make_one(root) if isinstance(root, Path) else "the address of a directory that vitds wrote"
        raise DataError(f"is no dataset directory: it has no {path.name}", where=str(root), fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix=_SHARD_FIRST) from None


def _how_to_make_one(directory: Path) -> str:
    """From what lies in a directory that is no data set."""
    if (directory.parent / "classes.json").is_file():
        return f"it is a split: --data {directory.parent}"
    if directory.name.endswith(".partial"):
        return "sharding was not finished: the same tools/shard_imagenet.py command goes on"
    if ".part-" in directory.name:
        whole = directory.parent / directory.name.partition(".part-")[0]
        return f"it is a part: python tools/shard_imagenet.py --merge {whole}"
    if any(directory.glob("train/*.tar")):
        return f"index its shards: python tools/shard_imagenet.py --index-only {directory}"
    if any(directory.glob("*.tar")):
        return (
            f"write its tars anew, with an index: python tools/shard_imagenet.py {directory} OUT\n"
            f"or train without one: --data '{directory}/NAME-{{000..127}}.tar' --samples-per-epoch N --num-classes L"
        )
    return _SHARD_FIRST.replace("SOURCE", shlex.quote(str(directory))) if any(directory.iterdir()) else _SHARD_FIRST


def _neighbours(directory: Path) -> str:
    parent = directory.parent
    if not parent.is_dir():
        return f"{parent} does not exist either"
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return f"directories in {parent}: {_names(names)}" if names else f"{parent} holds no directories"


def _names(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _classes(names: list[str]) -> str:
    return "1 class" if len(names) == 1 else f"{len(names)} classes"
