"""What can go wrong, as exceptions that carry their exit code, and the one place where they are printed.

A user's mistake ends in a `VitdsError`: what is wrong, where, and what to do. It is printed once, by rank 0, without a
traceback (`VITDS_TRACE=1` shows it). Anything else that escapes is a bug in vitds and keeps its traceback.
"""

from __future__ import annotations

import atexit
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_MEMORY = 5
EXIT_DIVERGED = 6
EXIT_RANK_LOST = 7
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

# The launcher ends every rank within a second of the first exit, so the ranks that have nothing to say wait for rank 0.
_SILENT_RANK_DELAY_S = 2.0


class VitdsError(Exception):
    """A mistake or a fault that the user can act on: what happened, where, and the likely fix.

    Most are raised by all ranks alike and printed by rank 0. One that only a single rank sees (its sample, its memory)
    has `on_one_rank` set and is printed by that rank.
    """

    exit_code = EXIT_BUG
    kind = "error"
    on_one_rank = False

    def __init__(self, what: str, *, where: str = "", fix: str = "", on_one_rank: bool | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        if on_one_rank is not None:
            self.on_one_rank = on_one_rank

    def __str__(self) -> str:
        head = "  ".join(part for part in (self.kind, self.where, self.what) if part)
        return head + "".join(f"\n  {line}" for line in self.fix.splitlines())


class UsageError(VitdsError):
    """A flag or an argument is wrong."""

    exit_code, kind = EXIT_USAGE, "usage error"


class ConfigError(VitdsError):
    """The configuration, or the combination of configuration and flags, is wrong."""

    exit_code, kind = EXIT_USAGE, "config error"


class DataError(VitdsError):
    """The data set is missing, empty, damaged, or does not fit the model."""

    exit_code, kind = EXIT_DATA, "data error"


class DataUnavailable(DataError):
    """The data cannot be had now: a server, a network or a disk fails. No sample is to blame, so none is replaced."""

    on_one_rank = True


class DataMissing(DataUnavailable):
    """A server says that there is nothing at an address."""

    on_one_rank = False


class CheckpointError(VitdsError):
    """A checkpoint or a run directory is missing, damaged, does not fit, or cannot be written."""

    exit_code, kind = EXIT_CHECKPOINT, "checkpoint error"


class WeightError(VitdsError):
    """A weights file is missing, damaged, unsafe, or does not fit the model."""

    exit_code, kind = EXIT_CHECKPOINT, "weights error"


class OutOfMemory(VitdsError):
    """The model, its states or its activations do not fit the device."""

    exit_code, kind = EXIT_MEMORY, "out of memory"
    on_one_rank = True


class Diverged(VitdsError):
    """Loss or gradients stayed non-finite, or the loss scale reached its floor."""

    exit_code, kind = EXIT_DIVERGED, "diverged"


class RankLost(VitdsError):
    """A rank died or hung, as another rank sees it."""

    exit_code, kind = EXIT_RANK_LOST, "rank lost"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; the error's type where there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name closest to a misspelt one, or None when nothing is close."""
    names = list(names)
    if name in names:  # others may be spelt alike but for their case
        return name
    by_folded = {valid.lower().replace("-", "_"): valid for valid in names}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A fix line for a misspelt name: the nearest valid one, else the whole list."""
    names = list(names)
    near = nearest(name, names)
    return f'did you mean "{near}"?' if near else "valid names: " + ", ".join(names)


def exit_with(main: Callable[[], int | None], record: Callable[[int, str], None] = lambda code, reason: None) -> None:
    """Run a command's main function and end the process with its exit code, printing a `VitdsError` once, on rank 0.

    `record` is told the code and the reason before the process ends, a traceback included.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main() or EXIT_DONE
    except VitdsError as error:
        code = error.exit_code
        record(code, str(error))
        if os.environ.get("VITDS_TRACE"):
            traceback.print_exc()
        if isinstance(error, RankLost):  # the rank that was lost may be about to say why
            time.sleep(_SILENT_RANK_DELAY_S)
        if rank == 0 or error.on_one_rank:
            with suppress(OSError):  # the terminal may be gone with the launcher
                print(f"rank {rank}: {error}" if error.on_one_rank and rank else error, file=sys.stderr, flush=True)
        else:
            time.sleep(_SILENT_RANK_DELAY_S)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception as error:
        record(EXIT_BUG, f"{type(error).__name__}: {error}")
        raise
    record(code, "")
    try:
        sys.stdout.flush()
    except OSError:  # the reader of our output left, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End a command with its exit code, a rank of a process group at once.

    Its threads are C++'s and may outlive the interpreter: one rank in some hundreds aborted over them (SIGABRT) at an
    ordinary exit, with all its work done.
    """
    if "deepspeed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
