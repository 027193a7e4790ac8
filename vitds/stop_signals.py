"""Requests to stop that reach this process: signals, and the end of the launcher that started it.

They are heard by a thread, for the main thread may be importing torch or waiting in a collective. Until the ranks have
met, nothing is lost by leaving at once; from then on all of them leave together (`vitds.stop`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress

from vitds.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from vitds.launcher import find_launcher
from vitds.verdict import BEFORE_TRAINING, is_supervised, verdict

REQUEST_VARIABLE = "VITDS_STOP_REQUEST"  # what a process was asked before it replaced itself; 0: nothing
STOP_SIGNALS = {signal.SIGTERM: EXIT_STOPPED, signal.SIGUSR1: EXIT_STOPPED, signal.SIGINT: EXIT_INTERRUPTED}

_LOOK_EVERY_S = 0.5
_MEETING_S = 1.0  # ranks that were meeting when the request came have met by then, and leave together


class StopListener:
    """Hears requests from its creation on; `request` is 0, or the exit code that the strongest of them asks for."""

    def __init__(self) -> None:
        """Install the handlers; for the main thread."""
        self.request = 0
        self._requested_s = 0.0
        self._have_met = False
        self._lock = threading.Lock()
        self._launcher = find_launcher(os.getpid())  # before imports take seconds in which it may go
        self._heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what a worker hears is its own affair
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # the C part of a handler writes the number to the pipe
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()

    def start(self) -> None:
        """A command begins in this process: nothing was asked of it, but for what came before it began again."""
        self.request, self._have_met = int(os.environ.pop(REQUEST_VARIABLE, 0)), False

    def ranks_have_met(self) -> None:
        """From now on a request waits until the ranks agree on it."""
        with self._lock:
            self._have_met = True

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._heard], [], [], _LOOK_EVERY_S)
            for number in os.read(self._heard, 64) if ready else b"":
                self._note(STOP_SIGNALS.get(signal.Signals(number), 0))
            if not self.request and self._launcher.is_gone():
                self._note(EXIT_STOPPED)
            with self._lock:
                if self.request and not self._have_met and time.monotonic() - self._requested_s > _MEETING_S:
                    self._leave()

    def _note(self, exit_code: int) -> None:
        if exit_code and not self.request:
            self._requested_s = time.monotonic()
        self.request = max(self.request, exit_code)

    def _leave(self) -> None:
        verdict.record(self.request, BEFORE_TRAINING)
        if os.environ.get("RANK", "0") == "0" and not is_supervised():  # rank 0 may not hear yet
            with suppress(OSError):  # the terminal may be gone with the launcher
                print(
                    f"{BEFORE_TRAINING}; the same command starts again (exit {self.request})",
                    file=sys.stderr,
                    flush=True,
                )
        os._exit(self.request)


_listener: StopListener | None = None


def listener() -> StopListener:
    """This process's listener, which begins to listen at the first call."""
    global _listener
    if _listener is None:
        _listener = StopListener()
    return _listener
