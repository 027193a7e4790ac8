"""The run directory: one process at a time works in it, and it says what the run is."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import re
import secrets
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import torch

import vitds
from vitds import collectives
from vitds.data.decode import jpeg_decoder
from vitds.errors import CheckpointError
from vitds.preflight import Plan
from vitds.world import World

COMMITTED_NAME = ".committed"  # there once a checkpoint was, whatever became of it
_RECORDED_PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "numpy", "pyarrow", "pillow")


class RunLock:
    """Rank 0 makes the run directory and holds its lock until the process ends.

    Raises: CheckpointError when it cannot be written, or another process trains in it.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir, self._world = run_dir, world

    def __enter__(self) -> RunLock:
        if not self._world.is_main:
            return self
        where = str(self._run_dir)
        try:
            (self._run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._file = open(self._run_dir / ".lock", "w")
        except OSError as error:
            raise CheckpointError(f"the run directory cannot be written: {error.strerror}", where=where) from None
        try:
            # Unlike flock's, this lock is not shared with the data workers, which outlive a killed rank for seconds.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError("another process trains in it", where=where, fix="choose another --name") from None
        return self

    def check_shared(self) -> None:
        """See that every rank finds in the run directory what rank 0 wrote there; collective.

        Raises: CheckpointError, on all ranks, when another host has a directory of its own by that name.
        """
        token = collectives.broadcast(secrets.token_hex(8) if self._world.is_main else None)
        failure, fix = None, "put --output-dir on a file system that all hosts share"
        if self._world.is_main:
            try:
                self._file.write(token)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                failure = f"the run directory cannot be written: {error.strerror}"
        if failure := collectives.broadcast(failure):
            fix = "make room, or choose another --output-dir; then the same command"
        sees = self._world.is_main or self._reads(token)
        hosts = [host for host, ok in collectives.gather((platform.node(), sees)) if not ok]
        if failure or hosts:
            raise CheckpointError(
                failure or f"{hosts[0]} does not see what rank 0 writes to the run directory",
                where=str(self._run_dir),
                fix=fix,
            )

    def _reads(self, token: str) -> bool:
        try:
            return (self._run_dir / ".lock").read_text() == token
        except OSError:
            return False

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._world.is_main:
            self._file.close()


@functools.cache
def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def describe_run(plan: Plan) -> None:
    """Write config.resolved.json, classes.json, env.json and command.txt; for rank 0."""
    environment = {
        "vitds": vitds.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _RECORDED_PACKAGES},
        "jpeg_decoder": jpeg_decoder(),
        "host": platform.node(),
        "device": device_name(),
        "world_size": plan.world.world_size,
    }
    resolved = plan.resolved()
    # "sources" says where each value came from; it lies where DeepSpeed, and this file given back to vitds, ignore it.
    (plan.run_dir / "config.resolved.json").write_text(json.dumps(resolved, indent=1) + "\n")
    (plan.run_dir / "config.sources.json").write_text(json.dumps(plan.sources, indent=1) + "\n")
    (plan.run_dir / "classes.json").write_text(json.dumps(plan.classes, indent=0) + "\n")
    (plan.run_dir / "env.json").write_text(json.dumps(environment, indent=1) + "\n")
    with open(plan.run_dir / "command.txt", "a") as commands:
        commands.write(shlex.join([sys.executable, *sys.argv]) + "\n")
