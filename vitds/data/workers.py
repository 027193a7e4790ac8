"""Data processes: they make the batches that a rank takes, in its order, and are replaced when they die or hang.

    batch j   made by process j % num, into memory that this process and the rank share
    pipes     one for each process, so that one killed in the middle of a message disturbs no other
    memory    anonymous, taken before the processes start: /dev/shm and its limit play no part

A batch is a function of its positions alone, so a fresh process makes again what a lost one owed: none is lost, none
comes twice, and every bit is the same.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vitds.errors import ConfigError, DataError, DataUnavailable, OutOfMemory

PREFETCHED = 2  # batches that each process is asked for ahead of its rank
_MAX_TRIES = 3  # of one batch: by then its samples are the likely cause
_LOOK_EVERY_S = 0.5
_NOTE_BYTES = 4096
_SPARE_FILES = 64  # that a rank opens later beside shards and pipes: sockets to other ranks, checkpoints, logs
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl

Made = TypeVar("Made")

_ends_of_rank: set[Connection] = set()  # a forked process closes them, or others would outlive this one


class Maker(Generic[Made]):
    """What makes batches, in the rank or in a process of its own, and says what it is at."""

    worker = 0  # the number of the process that this is in
    replaceable = True  # by a fresh process: no state is carried from batch to batch
    note: Callable[[str], None] = staticmethod(lambda text: None)  # told the shard and key of each sample before it

    def make(self, positions: Sequence[int]) -> Made:
        """Make the batch at these positions."""
        raise NotImplementedError

    def use(self, memory: Tensor) -> None:
        """Put the next batch's images into this memory; it is free again when the batch after that was asked for."""
        raise NotImplementedError

    def pack(self, made: Made) -> Any:
        """A batch for a pipe, small: its images are in the memory."""
        raise NotImplementedError

    def unpack(self, packed: Any, memory: Tensor) -> Made:
        """The batch again, on the other side."""
        raise NotImplementedError


class WorkerPool(Generic[Made]):
    """Batches by data processes that start now; a context manager that ends them.

    `tell` hears of each process that was lost and replaced, and `waits` is called again and again while one is waited
    for, and once more when it was lost. Of a maker that is not `replaceable` one ends the run.
    """

    def __init__(
        self,
        maker: Maker[Made],
        positions: Iterable[Sequence[int]],
        num_workers: int,
        batch_shape: Sequence[int],
        timeout_s: float,
        tell: Callable[[str], None],
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the memory and start the processes; `batch_shape` is that of the largest batch, in bytes.

        Raises: OutOfMemory when there is no memory for the batches, ConfigError when too few files may be open.
        """
        self.timeout_s, self.tell, self.waits = timeout_s, tell, waits
        self._maker, self._positions = maker, iter(positions)
        check_open_files(num_workers)
        self._workers = [_Worker(maker, number, batch_shape) for number in range(num_workers)]
        atexit.register(self.close)  # before multiprocessing's own exit, which would wait for them in vain
        for worker in self._workers * PREFETCHED:
            self._ask(worker)

    def __iter__(self) -> Generator[Made, None, None]:
        """Take the batches in order, each for as long as it is the last that was taken.

        Raises: DataError from a process, or when one is lost for good; whatever else it raised.
        """
        try:
            while True:
                for worker in self._workers:
                    if not worker.owed:
                        return
                    packed, memory = self._take(worker)
                    self._ask(worker)
                    yield self._maker.unpack(packed, memory)
        finally:
            self.close()

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.end()

    def _ask(self, worker: _Worker) -> None:
        positions = next(self._positions, None)
        if positions is not None:
            worker.ask(positions)

    def _take(self, worker: _Worker) -> tuple[Any, Tensor]:
        for attempt in range(1, _MAX_TRIES + 1):
            fault = worker.wait(self.timeout_s, self.waits)
            if fault is None:
                kind, content = worker.receive()
                if kind == "raised":
                    raise content
                return content
            self.waits()
            lost = f"data process {worker.number} {fault}"
            where = worker.note
            if not self._maker.replaceable or attempt == _MAX_TRIES:
                break
            worker.replace()
            self.tell(f"{lost}, at {where}: replaced, and what it owed is made again")
        raise DataUnavailable(
            lost,
            where=where,
            fix="if it was out of memory: fewer --workers, or a smaller --micro-batch-size\n"
            "if it waits for slow data: --set worker_timeout_s=600",
        )


class _Worker:
    """One data process, as its rank sees it."""

    def __init__(self, maker: Maker, number: int, batch_shape: Sequence[int]) -> None:
        self.number, self.owed = number, deque[Sequence[int]]()
        self._maker, self._num_taken = maker, 0
        self._memory = [_shared(batch_shape) for _ in range(PREFETCHED + 1)]
        self._note = mmap.mmap(-1, _NOTE_BYTES)
        self._start()

    @property
    def note(self) -> str:
        """The shard and key of the sample that it is at."""
        text = self._note[:].partition(b"\0")[0].decode(errors="replace")
        return text or "its start"

    def ask(self, positions: Sequence[int]) -> None:
        """Ask for one more batch; the memory is that of the batch before the last one that was taken."""
        self.owed.append(positions)
        self._send(self._num_taken + len(self.owed) - 1, positions)

    def wait(self, timeout_s: float, waits: Callable[[], None]) -> str | None:
        """Wait until a message is there; None, or what is wrong with the process."""
        note, deadline = self.note, time.monotonic() + timeout_s
        while not self._pipe.poll(_LOOK_EVERY_S):
            waits()
            if self.note != note:  # slow, and alive
                note, deadline = self.note, time.monotonic() + timeout_s
            elif time.monotonic() > deadline:
                return f"gave no sign of life for {timeout_s:g} s"
        try:
            self._message = self._pipe.recv()
            return None
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process.join(1)
            code = self._process.exitcode
            return f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"

    def receive(self) -> tuple[str, Any]:
        """The batch owed longest and the memory that it lies in, or what was raised."""
        kind, content = self._message
        if kind == "raised":
            return kind, content
        memory = self._memory[self._num_taken % len(self._memory)]
        self.owed.popleft()
        self._num_taken += 1
        return kind, (content, memory)

    def replace(self) -> None:
        """Start a fresh process that owes the same."""
        self.end()
        self._note[:1] = b"\0"
        self._start()
        for place, positions in enumerate(self.owed):
            self._send(self._num_taken + place, positions)

    def end(self) -> None:
        """End the process, whatever it does; a stopped one too."""
        self._process.kill()
        self._process.join()
        _ends_of_rank.discard(self._pipe)
        self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # the data set is there, and is not read again
        self._pipe, theirs = context.Pipe()
        _ends_of_rank.add(self._pipe)
        self._process = context.Process(target=self._serve, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def _send(self, number: int, positions: Sequence[int]) -> None:
        try:
            self._pipe.send((number % len(self._memory), positions))
        except OSError:  # it is gone, which is noticed when its batch is waited for
            pass

    def _serve(self, pipe: Connection, rank: int) -> None:
        """The life of the process: signals are left to the rank, which may be saving, and ends it itself."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != rank:
            return
        for end in _ends_of_rank:
            end.close()
        torch.set_num_threads(1)
        self._maker.worker, self._maker.note = self.number, self._write_note
        try:
            while True:
                place, positions = pipe.recv()
                self._maker.use(self._memory[place])
                try:
                    message = "made", self._maker.pack(self._maker.make(positions))
                except Exception as error:
                    if not isinstance(error, DataError):
                        error.add_note(traceback.format_exc())
                    message = "raised", error
                pipe.send(message)
        except (EOFError, OSError):  # the rank is gone
            return

    def _write_note(self, text: str) -> None:
        line = text.encode(errors="replace")[: _NOTE_BYTES - 1] + b"\0"
        self._note[: len(line)] = line


def _shared(shape: Sequence[int]) -> Tensor:
    """Bytes that forked processes share.

    Raises: OutOfMemory.
    """
    num_bytes = torch.Size(shape).numel()
    try:
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).view(*shape)
    except OSError as error:
        raise OutOfMemory(
            f"{num_bytes / 2**20:.0f} MiB for a batch that a data process shares with its rank: {error.strerror}",
            fix=f"fewer --workers (each has {PREFETCHED + 1} of them), or a smaller --micro-batch-size",
        ) from None


@functools.cache  # before the first step, not again at an evaluation
def check_open_files(num_workers: int) -> None:
    """Let this process, and those it starts, open as many files as the system allows, and see that they are enough.

    Raises: ConfigError with the number needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_open = len(os.listdir("/proc/self/fd"))
    needed = -(-4 * (num_open + 2 * num_workers + _SPARE_FILES) // 3)  # a quarter is for shards
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"a process may open {hard} files, and this one with {num_workers} data processes needs {needed}",
            fix=f"ulimit -n {max(1024, needed)}  (docker run --ulimit nofile={max(1024, needed)}), or fewer --workers",
            on_one_rank=True,
        )
