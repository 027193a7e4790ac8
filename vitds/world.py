"""Who this process is among the ranks: read from the environment, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Rank, world size and their local counterparts; one rank when nothing launched us."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes what belongs to the whole run."""
        return self.rank == 0


def world_from_env(environ: Mapping[str, str] = os.environ) -> World:
    """Read RANK, LOCAL_RANK, WORLD_SIZE as `deepspeed` and `torchrun` set them, else what Slurm tells a task."""
    if "WORLD_SIZE" in environ:
        size = int(environ["WORLD_SIZE"])
        local_size = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or size)
        return World(int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0)), size, local_size)
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        size = int(environ["SLURM_NTASKS"])
        local_size = int(environ.get("SLURM_NTASKS_PER_NODE", size))
        return World(int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), size, local_size)
    return World()
