"""Starts the ranks of a job as plain processes, as a launcher would, and waits for them."""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that nobody has, and that nobody is given in the seconds until a rank that is starting takes it.

    The kernel gives out those of its range alone, some twenty to a job of two ranks, so this one is of those below it;
    tests that run beside these choose among others.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(
        10_000 + number, first if first > 20_000 else 60_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    )
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port := secrets.choice(ports)))
            return port


def start_ranks(
    command: list[str],
    world_size: int,
    stdin: int | None = None,
    within: Sequence[str] = (),
    **environment: str,
) -> list[subprocess.Popen]:
    """One process a rank, in RANK order; stderr goes to stdout. A single rank gets no launcher variables at all.

    `within` is a command that runs another one in some place of its own, such as ip netns exec NAME.
    """
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    leaving = ["tests/workers/run_and_leave.py"] if command[0].startswith("tests/workers/") else []
    processes = []
    for rank in range(world_size):
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        if world_size > 1:
            env |= launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                [*within, sys.executable, *leaving, *command],
                env=env,
                cwd=ROOT,
                text=True,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return processes


def run_ranks(
    command: list[str],
    world_size: int,
    exit_code: int | None = 0,
    timeout_s: float = 600,
    within: Sequence[str] = (),
    **environment: str,
) -> list[str]:
    """Run all ranks to their end and return what each printed; `exit_code` None accepts any."""
    processes = start_ranks(command, world_size, within=within, **environment)
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if exit_code is not None:
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == exit_code, f"exit {process.returncode}:\n{output[-6000:]}"
    return outputs


def last_json(output: str) -> dict:
    """The last line of a worker's output that is a JSON object."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
