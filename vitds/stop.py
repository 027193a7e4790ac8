"""Stopping on request: signals set a flag, and the ranks agree on the step at which all of them stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from vitds.errors import EXIT_INTERRUPTED, EXIT_STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Catches stop signals and spreads them: `agreed()` is true on every rank at the same step.

    The vote of step k is collected while step k + 1 runs, over a CPU group of its own, so no step waits for it and no
    GPU is synchronised; a signal therefore takes effect one step later. A second signal changes nothing: the save
    goes on.
    """

    def __init__(self) -> None:
        """Install the handlers; collective."""
        self._received = 0
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        many = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if many else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._received = max(self._received, 2 if number == signal.SIGINT else 1)

    def agreed(self) -> bool:
        """Call once a step on every rank: whether all ranks stop here."""
        if self._group is None:
            self._vote[0] = self._received
            return bool(self._received)
        if self._pending is not None:
            self._pending.wait()
            if self._vote.item():
                return True
        self._vote[0] = self._received
        self._pending = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    @property
    def exit_code(self) -> int:
        """75 after a request to stop, 130 after Ctrl-C; the same on every rank."""
        return EXIT_INTERRUPTED if self._vote.item() == 2 else EXIT_STOPPED
