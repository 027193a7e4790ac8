"""Who this process is among the ranks: read from the environment, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

START_VARIABLE = "VITDS_START"  # how often the ranks have begun again in place; a store may outlive them


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
    """Read RANK, LOCAL_RANK and WORLD_SIZE as `deepspeed` and `torchrun` set them."""
    if "WORLD_SIZE" not in environ:
        return World()
    size = int(environ["WORLD_SIZE"])
    local_size = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or size)
    return World(int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0)), size, local_size)
