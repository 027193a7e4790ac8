"""Watching over the other ranks: a run whose rank died or hangs ends soon, and says which rank and where it was.

A side thread of each rank tells rank 0 a few times a second where its main thread is, over a TCP connection that does
nothing else. A connection that ends without a goodbye is a rank that died. One that falls silent is a rank that is
stopped, or cut off. When no rank moves, the one with the least progress hangs, for the others wait for it in a
collective. The main thread only writes attributes; it may be blocked in C++, which releases Python's lock to wait.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NoReturn

from vitds import collectives
from vitds.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_LOST, RankLost, VitdsError
from vitds.faults import fault_of
from vitds.verdict import verdict
from vitds.world import World

_BEAT_S = 0.25
_MEETING_S = 30.0  # in which all ranks reach rank 0's port at the start
_FIRST_WORD_S = 2.0  # a rank that leaves with an error speaks before the others end
_SAME_WORD_S = 20.0  # an error that is no single rank's reaches every rank; this is for one that is blocked
_VERDICT_S = 5.0  # a dead rank's connections break at once, but not in a fixed order
_END_S = 1.0  # from the verdict to the end of the last rank
_AGAIN = "start again: training goes on from the last checkpoint, or at step 0 if there is none"


class Watchdog:
    """Says where this rank is, and ends the process when another rank is lost; a context manager around a run.

    A phase may stand still for most of `hang_timeout_s`, or five times as long as it stood the last time; a save, and
    what was never finished (a first step compiles), for ten times `hang_timeout_s`. Ticks, and bytes that reach a disk,
    are motion; so is waiting for data processes, over which the loader has a watch of its own.
    """

    def __init__(self, world: World, hang_timeout_s: float) -> None:
        """Connect the ranks' watchdogs; collective. A single rank has nobody to watch."""
        self.phase, self.step = "load", 0
        self.steps_begun = 0  # by this process
        self.on_enter: Callable[[str, int | None], None] = lambda phase, step: None  # hears of each phase too
        self.on_begin_again: Callable[[], NoReturn] = _cannot_begin_again  # replaces this process
        self._world = world
        self._num_phases = self._num_ticks = 0
        self._moved, self._longest_s = time.monotonic(), 0.0  # of this phase: its last motion, and its longest rest
        self._rests_s, self._disk = dict[str, float](), _disk_bytes()  # the longest rest of each phase's last time
        self._still_s = max(0.9 * hang_timeout_s - _END_S, 0.5 * hang_timeout_s)
        self._silence_s = max(5.0, 0.5 * hang_timeout_s)
        self._first_time_s = 10 * hang_timeout_s
        self._main = threading.get_ident()
        self._leaving, self._ending, self._again = threading.Event(), threading.Event(), threading.Event()
        self._goodbye: dict[str, Any] = {}
        self._unwound: BaseException | None = None  # what took the main thread from where it was
        self._links = _meet(world) if world.world_size > 1 else {}
        self._now = 0.0  # this thread's own time: it stands still while this process is stopped or starved
        self._seen = {rank: _Seen() for rank in (world.rank, *self._links)}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._links:
            self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None:
            self.leave(EXIT_DONE)
            return
        fault = error if isinstance(error, VitdsError) else fault_of(error, self._world.rank)
        self._unwound = error
        if isinstance(fault, RankLost) and self._ending.wait(_VERDICT_S):
            self._thread.join()  # it knows more than the broken connection says, and ends the process
        if fault is not None:
            self.leave(fault.exit_code, str(fault), alone=fault.on_one_rank)
        elif isinstance(error, KeyboardInterrupt):
            self.leave(EXIT_INTERRUPTED, alone=True)
        else:
            self.leave(EXIT_BUG, f"{type(error).__name__}: {error}", alone=True)

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread begins a phase: load, data, forward, backward, update, log, evaluate, save or profile."""
        self._tick()
        self._rests_s[self.phase], self._longest_s, self.phase = self._longest_s, 0.0, phase
        self._num_phases += 1
        if step is not None:
            self.steps_begun += step != self.step
            self.step = step
        self.on_enter(phase, step)

    def ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items; each one is a sign that a long phase moves."""
        for item in items:
            self._tick()
            yield item

    def waits_for_data(self) -> None:
        """The loader waits for its data processes, and looks after them: not a hang of this rank.

        Batches to come are waited for in other phases too, in a thread, and say nothing of the main one. Where this
        process is about to be replaced, its data processes were ended, and none shall be started again: no return.
        """
        if self._again.is_set():
            threading.Event().wait()
        if self.phase in ("data", "evaluate"):
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self._longest_s, self._moved = max(self._longest_s, now - self._moved), now
        self._num_ticks += 1

    def leave(self, code: int, said: str = "", alone: bool = False) -> None:
        """Tell the other ranks that this one goes, and why, so that none takes it for dead."""
        who = f"rank {self._world.rank} failed in {self.place}"
        self._goodbye = {"who": who, "code": code, "said": said, "alone": alone}
        self._leaving.set()
        if self._links:
            self._thread.join(timeout=_FIRST_WORD_S)

    @property
    def place(self) -> str:
        """Where the main thread is: its phase and its step."""
        return _place(self.phase, self.step)

    @property
    def can_begin_again(self) -> bool:
        """Whether all ranks can be told to."""
        return bool(self._links) or self._world.world_size == 1

    def begin_again(self) -> NoReturn:
        """Replace the processes of all ranks, wherever they are."""
        self._again.set()
        if self._links:
            self._thread.join()
        _end_workers()
        self.on_begin_again()

    def _watch(self) -> None:
        """The side thread, to this rank's goodbye."""
        before = time.monotonic()
        while not self._leaving.wait(_BEAT_S):
            now = time.monotonic()
            self._now, before = self._now + min(now - before, 1.0), now
            self._beat()
            self._listen()
            if self._again.is_set():
                self._all_begin_again()
            self._judge()
        self._tell(self._goodbye)
        for link in self._links.values():
            link.close()

    def _beat(self) -> None:
        seen = self._seen[self._world.rank]
        if (disk := _disk_bytes()) != self._disk:
            self._disk = disk
            self._tick()
        beat = {
            "rank": self._world.rank,
            "phase": self.phase,
            "step": self.step,
            "num_phases": self._num_phases,
            "motion": self._num_ticks,
            "limit_s": self._limit_s(self.phase),
        }
        if self._now - seen.moved > 1.0:
            beat |= _place_of(self._main)
        seen.note(beat, self._now)
        self._tell(beat)

    def _limit_s(self, phase: str) -> float:
        known = phase in self._rests_s and phase != "save"  # which waits for disks without a sign that they work
        return max(self._still_s if known else self._first_time_s, 5 * self._rests_s.get(phase, 0.0))

    def _listen(self) -> None:
        """Take in what the other ranks sent; rank 0 passes on what concerns the rest."""
        for rank, link in list(self._links.items()):
            for message in link.receive():
                if "verdict" in message:
                    self._end(EXIT_RANK_LOST, message["verdict"])
                elif "again" in message:
                    self._again.set()
                elif "code" in message:
                    self._part_from(rank, message)
                else:
                    self._seen[rank].note(message, self._now)

    def _all_begin_again(self) -> NoReturn:
        """Tell the other ranks and go: rank 0 first, for the others would meet its old process."""
        self._tell({"again": True})
        if self._world.is_main:
            time.sleep(2 * _BEAT_S)  # the others read it before the connection breaks
        else:
            deadline = time.monotonic() + _MEETING_S
            while not self._links[0].is_broken and time.monotonic() < deadline:
                time.sleep(_BEAT_S)
                self._links[0].receive()
        _end_workers()
        self.on_begin_again()

    def _part_from(self, rank: int, goodbye: dict[str, Any]) -> None:
        """A rank said goodbye: a run that goes on without it cannot, unless it is at its end."""
        del self._seen[rank]
        self._links.pop(rank).close()
        if goodbye["code"] == EXIT_DONE:
            return
        self._tell(goodbye)
        self._ending.set()
        if self._leaving.wait(_FIRST_WORD_S if goodbye["alone"] else _SAME_WORD_S):
            return  # this rank has an ending of its own
        if goodbye["code"] != EXIT_BUG:
            self._end(goodbye["code"], "" if goodbye["alone"] or self._world.rank else goodbye["said"], stacks=False)
        self._end(EXIT_RANK_LOST, str(RankLost(f"{goodbye['who']}: {goodbye['said']}", fix=_AGAIN)), stacks=False)

    def _judge(self) -> None:
        """End the run when a rank died, is silent, or hangs."""
        if gone := [rank for rank, link in self._links.items() if link.is_broken]:
            self._leaving.wait(_BEAT_S)  # who dies with it is named with it
            self._listen()
            gone = [rank for rank, link in self._links.items() if link.is_broken] or gone
            what = " and ".join(
                f"rank {rank} died, last seen in {self._seen[rank].place}" for rank in gone if rank in self._seen
            )
            self._lose(what, "look above and in its host's kernel log for the reason, often a lack of memory")
        silent = [rank for rank in self._links if self._now - self._seen[rank].heard > self._silence_s]
        if silent:
            of = " and ".join(f"rank {rank}, last seen in {self._seen[rank].place}" for rank in silent)
            self._lose(f"no answer for {self._silence_s:.0f} s from {of}", "stopped, or cut off from this host")
        if self._world.is_main and self._links:
            self._judge_motion()

    def _judge_motion(self) -> None:
        least = min(seen.num_phases for seen in self._seen.values())
        last = {rank: seen for rank, seen in self._seen.items() if seen.num_phases == least}
        # In the same phase some may wait in a collective for one that does not come to it.
        hung = {rank: seen for rank, seen in last.items() if not seen.beat.get("waits")} or last
        if any(self._now - seen.heard > 1.0 for seen in hung.values()):
            return  # it is silent, which is another matter
        still_s = self._now - max(seen.moved for seen in self._seen.values())
        if still_s > max(seen.beat.get("limit_s", self._first_time_s) for seen in hung.values()):
            what = " and ".join(f"rank {rank} hangs in {seen.place}{seen.line}" for rank, seen in hung.items())
            self._lose(
                f"{what}; no rank has moved for {still_s:.0f} s",
                "a longer vitds.hang_timeout_s lets slower work, or a debugger, have its time",
            )

    def _lose(self, what: str, hint: str) -> NoReturn:
        self._end(EXIT_RANK_LOST, str(RankLost(what, fix=f"{hint}\n{_AGAIN}")))

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            link.send(message)

    def _end(self, code: int, said: str, stacks: bool = True) -> NoReturn:
        """Tell the other ranks, say it here with what all threads are doing, and end this process at once."""
        self._ending.set()
        if code == EXIT_RANK_LOST:
            self._tell({"verdict": said})
        if said:
            who = f"rank {self._world.rank}: " if self._world.rank else ""
            _say(f"{who}{said}\n" + (self._stacks() if stacks else ""))
        verdict.record(code, said)
        time.sleep(2 * _BEAT_S)  # the others read it before the connection breaks
        _end_workers()
        os._exit(code)

    def _stacks(self) -> str:
        unwound = traceback.format_tb(self._unwound.__traceback__) if self._unwound else []
        before = "".join(["where its main thread was:\n", *unwound]) if unwound else ""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return f"stacks of rank {self._world.rank}:\n{before}{file.read().decode(errors='replace')}"


class _Seen:
    """What is known of one rank: its last beat, and when, by the watching thread's time, it was heard and moved."""

    def __init__(self) -> None:
        self.beat: dict[str, Any] = {}
        self.heard = self.moved = 0.0

    def note(self, beat: dict[str, Any], now: float) -> None:
        if beat["motion"] != self.beat.get("motion"):
            self.moved = now
        self.beat, self.heard = beat, now

    @property
    def num_phases(self) -> int:
        return self.beat.get("num_phases", 0)

    @property
    def place(self) -> str:
        return _place(self.beat.get("phase", "load"), self.beat.get("step", 0))

    @property
    def line(self) -> str:
        return f" ({self.beat['line']})" if "line" in self.beat else ""


def _end_workers() -> None:
    """They would look for their rank every few seconds only."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1.0)


def _cannot_begin_again() -> NoReturn:
    raise AssertionError("nobody said how to begin again")


def _place(phase: str, step: int) -> str:
    return f"{phase} at step {step}" if step else phase


class _Link:
    """A connection that carries a JSON object a line and never blocks."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._unsent, self._unread = connected, b"", b""
        self.is_broken = False
        _links.add(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send what goes through; a peer that does not read misses beats, and nothing else."""
        if len(self._unsent) < 4096 or "motion" not in message:
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # a broken connection shows when it is read
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def receive(self) -> list[dict[str, Any]]:
        try:
            received = self._socket.recv(1 << 20)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            received = b""
        self.is_broken = not received
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._socket.close()


_links: weakref.WeakSet[_Link] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked data worker: it lives for seconds after its rank was killed, and would hold the connection."""
    for link in _links:
        link.close()


os.register_at_fork(after_in_child=_close_copies)


def _meet(world: World) -> dict[int, _Link]:
    """Connect every rank with rank 0, by its number; collective. Nothing when a rank cannot reach rank 0's port.

    Only who knows a secret, spread through the process group, is let in, and none after the start.
    """
    host = os.environ["MASTER_ADDR"]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(host)) if world.is_main else None
        mine = (listener.getsockname()[1], secrets.token_hex(16)) if listener else None
        port, secret = collectives.broadcast(mine)
        links = _admit(listener, secret, world.world_size - 1) if listener else _reach(host, port, secret, world.rank)
    complete = len(links) == (world.world_size - 1 if world.is_main else 1)
    absent = [rank for rank, ok in enumerate(collectives.gather(complete)) if not ok]
    if not absent:
        return links
    for link in links.values():
        link.close()
    if world.is_main:
        _say(f"warning  rank {absent[-1]} cannot reach {host}:{port}, so nobody watches for ranks that die or hang\n")
    return {}


def _listener(host: str) -> socket.socket:
    """A port on the interface that the launcher named; on all where that address is a forwarded one."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((host, 0), family=family)
    except OSError:
        return socket.create_server(("", 0), family=family)


def _admit(listener: socket.socket, secret: str, num_peers: int) -> dict[int, _Link]:
    admitted: dict[int, _Link] = {}
    strangers: list[_Link] = []
    deadline = time.monotonic() + _MEETING_S
    while len(admitted) < num_peers and (left_s := deadline - time.monotonic()) > 0:
        ready = multiprocessing.connection.wait([listener.fileno(), *(one.fileno() for one in strangers)], left_s)
        if listener.fileno() in ready:
            strangers.append(_Link(listener.accept()[0]))
        for one in [stranger for stranger in strangers if stranger.fileno() in ready]:
            try:
                words = one.receive()
                known = [w["rank"] for w in words if secrets.compare_digest(w["secret"], secret)]
            except (ValueError, TypeError, KeyError):
                known, words = [], [{}]
            if known:
                admitted[known[0]] = one
            elif words or one.is_broken:
                one.close()
            else:
                continue
            strangers.remove(one)
    for one in strangers:
        one.close()
    return admitted


def _reach(host: str, port: int, secret: str, rank: int) -> dict[int, _Link]:
    try:
        link = _Link(socket.create_connection((host, port), timeout=_MEETING_S))
    except OSError:
        return {}
    link.send({"secret": secret, "rank": rank})
    return {0: link}


def _place_of(thread: int) -> dict[str, Any]:
    """The line that a thread is at, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return {}
    line = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
    waits = False
    for _ in range(6):  # a wrapper or two stand between a wait and what is called from here
        if frame is None:
            break
        waits |= any(place in frame.f_code.co_filename for place in ("torch/distributed/", "deepspeed/comm/"))
        frame = frame.f_back
    return {"line": line, "waits": waits}


def _disk_bytes() -> int:
    """Bytes that this process moved to or from a disk, as Linux counts them; 0 elsewhere."""
    try:
        with open("/proc/self/io") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("read_bytes", "write_bytes")))
    except OSError:
        return 0


def _say(text: str) -> None:
    """Write to stderr in one piece, past any lock that the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
