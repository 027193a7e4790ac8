"""How long work tells whoever watches it: tasks that have a total, steps, and a line now and then."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_LOG_EVERY_S = 60.0  # where no bar can be drawn


class Watcher:
    """Told how work goes. This one does not care; it is the default wherever nobody watches."""

    def begin(self, task: str, total: int, *, done: int = 0, unit: str = "images") -> None:
        """A task begins, of which `done` was there already, from an earlier run."""

    def advance(self, task: str, num: int) -> None:
        """A task got on by `num`."""

    def say(self, text: str) -> None:
        """Something that its user should know now."""


class ConsoleWatcher(Watcher, AbstractContextManager):
    """Draws bars with rate and remaining time; into a file, a line a minute."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._tasks: dict[str, _Task] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def begin(self, task: str, total: int, *, done: int = 0, unit: str = "images") -> None:
        """Show a bar; what was there already does not count as speed."""
        bar = self._bars.add_task(task, total=total, completed=done, rate="")
        self._tasks[task] = _Task(bar, total, done, done, unit)

    def advance(self, task: str, num: int) -> None:
        """Move a bar."""
        known = self._tasks[task]
        known.done += num
        self._bars.update(known.bar, completed=known.done, rate=f"{known.rate():,.0f} {known.unit}/s")
        if not self._console.is_terminal and time.monotonic() - known.logged_s > _LOG_EVERY_S:
            known.logged_s = time.monotonic()
            rate, left_min = f"{known.rate():,.0f} {known.unit}/s", (known.total - known.done) / known.rate() / 60
            self._console.print(f"{task}: {known.done:,} of {known.total:,}, {rate}, {left_min:.0f} min left")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text)


class _Task:
    def __init__(self, bar: TaskID, total: int, done: int, found: int, unit: str) -> None:
        self.bar, self.total, self.done, self.found, self.unit = bar, total, done, found, unit
        self.started_s = self.logged_s = time.monotonic()

    def rate(self) -> float:
        """Per second, since it began."""
        return max(self.done - self.found, 1) / max(time.monotonic() - self.started_s, 1e-3)
