"""How much each class weighs in the loss: by the data's class counts, by a file, or as a configuration lists it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitds.dataset_facts import DatasetFacts
from vitds.errors import ConfigError, did_you_mean


def class_weights(
    given: str | Sequence[float] | None, facts: DatasetFacts, num_classes: int, where: str
) -> tuple[float, ...] | None:
    """One weight for each output of the head, or None for none; `where` is what a message names.

    "auto" is N / (C n_c) for a class with n_c of the training set's N labels, C the number of classes that have any:
    the mean weight of a label is 1. A file is a JSON list of a weight for each output, or an object {class: weight},
    and what it does not name weighs 1, as do outputs without samples under "auto".

    Raises: ConfigError for a file that is missing or damaged, an unknown class, or weights that are none.
    """
    if given is None:
        return None
    if given == "auto":
        return _balanced(facts, num_classes, where)
    if isinstance(given, str):
        where, given = given, _read(given, facts.classes, num_classes)
    weights = [_weight(value, where) for value in given]
    if len(weights) != num_classes:
        raise ConfigError(f"{len(weights)} class weights, and the head has {num_classes} outputs", where=where)
    if not any(weights):
        raise ConfigError("every class weight is 0: nothing would be learnt", where=where)
    return tuple(weights)


def _balanced(facts: DatasetFacts, num_classes: int, where: str) -> tuple[float, ...]:
    counts, num_labels = facts.train_counts, sum(facts.train_counts)
    if not num_labels:
        raise ConfigError("auto needs the number of samples of each class, which this data does not tell", where=where)
    num_present = sum(count > 0 for count in counts)
    weights = [num_labels / (num_present * count) if count else 1.0 for count in counts]
    return tuple(weights + [1.0] * (num_classes - len(weights)))


def _read(path: str, classes: list[str], num_classes: int) -> list[Any]:
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file of class weights", where=path, fix="--class-weights auto|FILE") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"class weights cannot be read: {error}", where=path) from None
    if isinstance(body, list):
        return body
    if not isinstance(body, dict):
        raise ConfigError("is neither a list of weights nor an object {class: weight}", where=path)
    for name in body:
        if name not in classes:
            raise ConfigError(f'unknown class "{name}"', where=path, fix=did_you_mean(name, classes))
    return [body.get(name, 1.0) for name in classes] + [1.0] * (num_classes - len(classes))


def _weight(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"class weight {json.dumps(value)}: a number of at least 0 was expected", where=where)
    return float(value)
