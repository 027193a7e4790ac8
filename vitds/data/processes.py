"""The same work for many tasks, by processes that share nothing but what was there when they were forked."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TypeVar, cast

from vitds.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

_TELL_EVERY_S = 0.2


def in_processes(
    work: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    num_workers: int,
    advance: Advance = lambda num: None,
) -> Iterator[Result]:
    """Do `work(task, advance)` for every task, each by the next free process, and yield the results as they come.

    Work tells its progress through the `advance` that it is given. One worker is this process itself. Workers end
    when this process does, however it ends.
    Raises: what a worker raises, and DataError when one dies.
    """
    if num_workers <= 1:
        yield from (work(task, advance) for task in tasks)
        return
    context = multiprocessing.get_context("fork")  # what the work needs reaches the workers without being copied
    remaining = iter(tasks)
    processes: list[multiprocessing.process.BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for _, task in zip(range(num_workers), remaining, strict=False):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            processes.append(context.Process(target=_serve, args=(work, theirs, list(pipes)), daemon=True))
            processes[-1].start()
            theirs.close()
            ours.send(task)
        busy = set(pipes)
        while busy:
            for pipe in cast(list[Connection], wait(list(busy))):
                try:
                    kind, content = pipe.recv()
                    if kind == "done":
                        pipe.send(next(remaining))
                except StopIteration:
                    busy.remove(pipe)
                except (EOFError, OSError):
                    raise DataError("a worker process died; was it out of memory?") from None
                if kind == "raised":
                    raise content
                if kind == "advance":
                    advance(content)
                else:
                    yield content
    finally:
        for process in processes:
            process.terminate()
            process.join()


class _ParentIsGone(Exception):
    pass


def _serve(work: Callable[[Task, Advance], Result], pipe: Connection, ends_of_parent: list[Connection]) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    for end in ends_of_parent:
        end.close()  # or a pipe would stay open when its parent is gone

    def tell(kind: str, content: object) -> None:
        try:
            pipe.send((kind, content))
        except OSError:
            raise _ParentIsGone from None

    untold, told_s = 0, time.monotonic()

    def advance(num: int) -> None:
        nonlocal untold, told_s
        untold += num
        if time.monotonic() - told_s > _TELL_EVERY_S:
            tell("advance", untold)
            untold, told_s = 0, time.monotonic()

    try:
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return
            result = work(task, advance)
            tell("advance", untold)
            untold = 0
            tell("done", result)
    except _ParentIsGone:
        return
    except Exception as error:
        tell("raised", error)
