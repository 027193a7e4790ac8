"""Measurements that a busy machine cannot bend much: variants take turns, and only costs of one round are compared.

What counts is CPU time, of this process and of the children that it has waited for; wall time stands beside it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitds.data.decode import jpeg_decoder
from vitds.errors import VitdsError

_PACKAGES = (
    *("vitds", "torch", "torchvision", "deepspeed", "numpy", "pillow", "simplejpeg", "webdataset", "pyarrow"),
    *("timm", "transformers"),
)


class Cost(NamedTuple):
    """What one run of one variant took, in seconds."""

    cpu_s: float
    wall_s: float


Costs = dict[str, list[Cost]]  # of each variant, a cost per round
Clock = Literal["cpu_s", "wall_s"]  # which of its times is compared


@dataclass(frozen=True)
class Figure:
    """One line of the table: the median over the rounds with its extremes, and what it is held against.

    `bound` is what must be reached, `goal` what has been seen possible.
    """

    name: str
    value: float
    unit: str
    lowest: float | None = None
    highest: float | None = None
    bound: float | None = None
    goal: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The figure as a JSON object."""
        return asdict(self)


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, on_run: Callable[[], object] = lambda: None
) -> Costs:
    """Run every variant once a round, each round starting with another one; `on_run` is called after each run.

    One round before the first warms caches and is not counted.
    """
    names = list(variants)
    costs: Costs = {name: [] for name in names}
    for number in range(-1, rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            cost = cost_of(variants[name])
            if number >= 0:
                costs[name].append(cost)
            on_run()
    return costs


def cost_of(run: Callable[[], object]) -> Cost:
    """Call `run`, and give what that took."""
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    run()
    return Cost(_cpu_s() - cpu_s, time.perf_counter() - wall_s)


def _cpu_s() -> float:
    """CPU seconds so far, user and system, of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rate(costs: Costs, name: str, num_items: float, unit: str, clock: Clock = "cpu_s") -> Figure:
    """Items per second of one variant."""
    return median_figure(name, [num_items / getattr(cost, clock) for cost in costs[name]], unit)


def ratios(costs: Costs, name: str, over: str, clock: Clock = "cpu_s") -> list[float]:
    """How many times the time of variant `name` variant `over` takes, round by round."""
    pairs = zip(costs[name], costs[over], strict=True)
    return [getattr(theirs, clock) / getattr(ours, clock) for ours, theirs in pairs]


def speedup(
    costs: Costs,
    name: str,
    over: str,
    *,
    bound: float | None = None,
    goal: float | None = None,
    clock: Clock = "cpu_s",
) -> Figure:
    """How many times the time of variant `name` variant `over` takes, compared round by round."""
    return median_figure(f"{name} over {over}", ratios(costs, name, over, clock), "times", bound, goal)


def median_figure(
    name: str, values: Sequence[float], unit: str, bound: float | None = None, goal: float | None = None
) -> Figure:
    """The median of what the rounds gave, with its extremes."""
    return Figure(name, statistics.median(values), unit, min(values), max(values), bound, goal)


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Before variants are compared: that they compute the same, by each one's losses in its first steps.

    Raises: VitdsError when two differ by more than the relative tolerance, or when the losses do not move.
    """
    (first, expected), *others = losses.items()
    if abs(expected[-1] - expected[0]) < 3 * tolerance * expected[0]:
        raise VitdsError(f"the losses of {first} hardly move, so they prove nothing: {expected}")
    for name, found in others:
        if any(not abs(ours - theirs) <= tolerance * abs(ours) for ours, theirs in zip(expected, found, strict=True)):
            raise VitdsError(f"{first} and {name} do not compute the same: losses {expected} and {found}")


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What the figures hold for: the machine's kind, the versions, the command."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    versions["JPEG decoder"] = jpeg_decoder()
    return {"machine": f"{os.cpu_count()} cores, {_processor()}", "versions": versions, "command": " ".join(command)}


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.machine()
