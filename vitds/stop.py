"""Stopping on request: the ranks agree on the step at which all of them stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from vitds.errors import EXIT_STOPPED
from vitds.stop_signals import listener


class StopRequest:
    """Spreads requests to stop: `agreed()` is true on every rank at the same step.

    The vote of step k is collected while step k + 1 runs, over a CPU group of its own, so no step waits for it and no
    GPU is synchronised; a request therefore takes effect one step later. A second one tears no save.
    """

    def __init__(self) -> None:
        """From here on requests wait for the ranks to agree; collective."""
        self._listener = listener()
        self._listener.ranks_have_met()
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._agreed_on = 0
        many = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if many else None

    def agreed_before_training(self) -> bool:
        """Call on every rank before the first step: whether a request came while the run was built."""
        self._begin_vote()
        return self._outcome()

    def agreed(self) -> bool:
        """Call once a step on every rank: whether all ranks stop here."""
        if self._group is None:
            return self.agreed_before_training()
        if self._pending is not None and self._outcome():
            return True
        self._begin_vote()
        return False

    def _begin_vote(self) -> None:
        self._vote[0] = self._listener.request
        if self._group is not None:
            self._pending = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _outcome(self) -> bool:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        self._agreed_on = int(self._vote.item())
        return bool(self._agreed_on)

    @property
    def exit_code(self) -> int:
        """75 after a request to stop, 130 after Ctrl-C; the same on every rank."""
        return self._agreed_on or EXIT_STOPPED
