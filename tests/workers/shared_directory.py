"""A rank that opens its run directory and looks for rank 0 in it: shared_directory.py DIRECTORY_OF_RANK_0 ..."""

import sys
from pathlib import Path

import torch.distributed as dist

from vitds.errors import exit_with
from vitds.run_directory import RunLock
from vitds.world import world_from_env

world = world_from_env()


def main() -> None:
    """Open, and check."""
    with RunLock(Path(sys.argv[1 + world.rank]), world) as lock:
        lock.check_shared()


dist.init_process_group("gloo")
exit_with(main)
