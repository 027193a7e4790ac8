"""The launcher that started this rank, and whether it is still there.

`deepspeed` starts DeepSpeed's launch.py, which starts the ranks. SIGTERM or SIGUSR1 ends the `deepspeed` command alone,
and SIGKILL launch.py alone: what is below goes on as orphans, unless it looks after who is above. torchrun forwards
what it catches and may be killed all the same. A shell above them may end as it likes (`nohup deepspeed ... &`).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vitds.process_tree import ancestors, command_line, parent_of

_TORCHRUN = {"torchrun", "torch.distributed.run", "torch.distributed.launch"}


@dataclass(frozen=True)
class Launcher:
    """Who must be whose parent for as long as the launcher lives: pairs of a process and its parent."""

    links: tuple[tuple[int, int], ...] = ()
    was_gone: bool = False  # before this rank looked for it

    def is_gone(self) -> bool:
        """Whether a process between this one and the launcher's topmost has lost its parent; cheap."""
        return self.was_gone or any(parent_of(child) != parent for child, parent in self.links)


def find_launcher(pid: int, environ: Mapping[str, str] = os.environ) -> Launcher:
    """The launcher above a rank that was started with `environ`; one without links when none started it."""
    by_deepspeed, by_torchrun = "CROSS_RANK" in environ, "TORCHELASTIC_RUN_ID" in environ
    if not (by_deepspeed or by_torchrun) or not parent_of(pid):
        return Launcher()
    line = [pid, *ancestors(pid)]
    for place, above in enumerate(line[1:], 1):
        words = command_line(above)
        if by_deepspeed and "deepspeed.launcher.launch" in words:
            is_runner = len(line) > place + 1 and _is_runner(command_line(line[place + 1]))
            top = place + 1 if is_runner else place
            return Launcher(tuple(pairwise(line[: top + 1])), _is_local(words) and not is_runner)
        if by_torchrun and _TORCHRUN & {Path(word).name for word in words[:8]}:
            return Launcher(tuple(pairwise(line[: place + 1])))
    if by_torchrun:  # by whatever name: an agent of torch's is the parent of its ranks
        return Launcher(tuple(pairwise(line[:2])))
    return Launcher(was_gone=True)


def _is_runner(words: list[str]) -> bool:
    """Whether a command line is `deepspeed`'s."""
    return bool(
        {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"} & {Path(word).name for word in words[:4]}
    )


def _is_local(words: list[str]) -> bool:
    """Whether launch.py was started for this machine alone, which only the `deepspeed` command does."""
    for word in words:
        if word.startswith("--world_info="):
            try:
                return list(json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))) == ["localhost"]
            except ValueError:
                return False
    return False
