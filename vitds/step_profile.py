"""Where the time of a few steps goes: a trace for Perfetto or Chrome, and a table that adds up to the wall time.

The marks are the phases that the loop gives to the watchdog. In the profiled steps each mark waits for the device, so
that a GPU's work is counted in the phase that asked for it; the losses are those of a run without a profile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "phase "
_ROWS = {"data": "data", "forward": "forward", "backward": "backward", "update": "optimizer"}  # the rest is "other"
_ENDS = ("evaluate", "save")  # no part of a step

Interval = tuple[float, float]  # begin and end, in microseconds of the trace


class StepProfiler:
    """Profiles the steps STEP to STEP + COUNT - 1, or those before an evaluation or a save comes."""

    def __init__(
        self,
        wanted: str,
        run_dir: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
        watch: Callable[[str], None],
    ) -> None:
        """`wanted` is STEP:COUNT; `say` gets the table, and `watch` hears that it is made, which takes long."""
        first, count = map(int, wanted.split(":"))
        self._steps = range(first, first + count)
        self._path = run_dir / f"trace-step{first}-rank{rank}.json.gz"
        self._device, self._say, self._watch = device, say, watch
        self._profile: profile | None = None
        self._mark: record_function | None = None
        self._step: int | None = None
        self._num_steps, self._start_s = 0, 0.0

    def enter(self, phase: str, step: int | None = None) -> None:
        """The loop begins a phase."""
        begins_step = phase == "data" and step is not None
        if self._profile is None:
            if not (self._steps and begins_step and step in self._steps):
                return
            self._begin()
        self._end_mark()
        if phase in _ENDS or (begins_step and step not in self._steps):
            self._end()
            return
        if begins_step and step != self._step:
            self._step, self._num_steps = step, self._num_steps + 1
        self._mark = record_function(_MARK + phase)
        self._mark.__enter__()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._start_s = time.perf_counter()

    def _end_mark(self) -> None:
        if self._mark is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _end(self) -> None:
        assert self._profile is not None
        wall_s = time.perf_counter() - self._start_s
        done, self._profile, self._steps = self._profile, None, range(0)
        self._watch("profile")
        done.stop()
        done.export_chrome_trace(str(self._path))
        rows = step_table(done.events())
        self._say(describe(rows, wall_s, self._num_steps) + f"\n  trace  {self._path}  (ui.perfetto.dev)")


def step_table(events: Iterable[torch.autograd.profiler_util.FunctionEvent]) -> dict[str, float]:
    """Seconds by row: what a phase took without its communication, and the communication of all of them.

    On a CPU a collective is communication from its start to its end; on a GPU while nothing else runs there, for the
    rest of it is hidden behind the computation.
    """
    phases: list[tuple[str, Interval]] = []
    on_cpu, on_gpu, kernels = list[Interval](), list[Interval](), list[Interval]()
    for event in events:
        interval = (event.time_range.start, event.time_range.end)
        if event.device_type == DeviceType.CPU:
            if event.name.startswith(_MARK):
                phases.append((event.name.removeprefix(_MARK), interval))
            elif event.name.startswith("gloo:"):
                on_cpu.append(interval)
        elif event.name.startswith("nccl"):
            on_gpu.append(interval)
        elif not event.is_user_annotation:
            kernels.append(interval)
    exposed = union(on_cpu) + without(union(on_gpu), union(kernels))
    rows = dict.fromkeys([*_ROWS.values(), "other", "communication"], 0.0)
    for phase, (begin, end) in phases:
        waited = sum(max(0.0, min(end, last) - max(begin, first)) for first, last in exposed)
        rows["communication"] += waited / 1e6
        rows[_ROWS.get(phase, "other")] += (end - begin - waited) / 1e6
    return rows


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def without(intervals: list[Interval], taken: list[Interval]) -> list[Interval]:
    """What of `intervals` lies outside of `taken`, both without overlaps and in order."""
    left, index = [], 0
    for begin, end in intervals:
        while index < len(taken) and taken[index][1] <= begin:
            index += 1
        ahead = index
        while begin < end and ahead < len(taken) and taken[ahead][0] < end:
            if begin < taken[ahead][0]:
                left.append((begin, taken[ahead][0]))
            begin = taken[ahead][1]
            ahead += 1
        if begin < end:
            left.append((begin, end))
    return left


def describe(rows: dict[str, float], wall_s: float, num_steps: int) -> str:
    """The table for people."""
    lines = [f"profile of {num_steps} step{'s' * (num_steps > 1)}, ms each"]
    named = {**rows, "sum": sum(rows.values()), "wall time": wall_s}
    lines += [f"  {name:14}{1e3 * taken / num_steps:10.2f}{taken / wall_s:8.1%}" for name, taken in named.items()]
    return "\n".join(lines)
