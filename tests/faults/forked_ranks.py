"""Ranks for hundreds of kills: real processes that start in a second, since their parent has imported torch already."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from rank_processes import ROOT, free_port


class ForkedRanks:
    """Starts, kills and waits for the ranks of one command at a time; a context manager that leaves no process."""

    def __init__(self, world_size: int, worker: str = "tests/workers/forked_ranks.py", **environment: str) -> None:
        self.world_size = world_size
        self.pids: list[int] = []
        self._groups: list[int] = []
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        clean = {name: value for name, value in os.environ.items() if name not in launcher}
        self._parent = subprocess.Popen(
            [sys.executable, worker],
            env=clean | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "ForkedRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.kill()
        self._parent.communicate()
        for group in self._groups:  # ranks and their loaders' workers
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def start(self, command: list[str], output: Path, *environments: dict[str, str]) -> None:
        """Fork the ranks; what they print is appended to `output`. `environments` are additions by rank."""
        port = str(free_port())
        for rank in range(self.world_size):
            environment = dict(environments[rank]) if environments else {}
            if self.world_size > 1:  # a single rank gets no launcher variables at all
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world_size)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            order = {"argv": command, "environment": environment, "output": str(output)}
            self.pids.append(self._ask(order)["pid"])
        self._groups += self.pids

    def kill(self) -> list[int]:
        """SIGKILL every rank and give the exit codes by rank: -9 for those that still ran."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # they are not waited for yet, so their ids are theirs
        return self.wait()

    def kill_after(self, rank: int, timeout_s: float = 300) -> int:
        """Wait until `rank` has ended, SIGKILL the others, and give its exit code."""
        waited = [self.pids.pop(rank)]
        others, self.pids = self.pids, waited
        code = self.wait(timeout_s)[0]
        self.pids = others
        self.kill()
        return code

    def wait(self, timeout_s: float = 300) -> list[int]:
        """Wait for the end of all ranks and give their exit codes; those that take too long are killed."""
        pids, self.pids = self.pids, []
        alarms = [threading.Timer(timeout_s, os.kill, (pid, signal.SIGKILL)) for pid in pids]
        codes = []
        for pid, alarm in zip(pids, alarms, strict=True):
            alarm.start()
            codes.append(self._ask({"wait": pid})["exit_code"])
            alarm.cancel()
        return codes

    def run(self, command: list[str], output: Path, timeout_s: float = 300) -> None:
        """Run the command to its end, which must be a good one."""
        self.start(command, output)
        codes = self.wait(timeout_s)
        assert set(codes) == {0}, f"exit codes {codes}:\n{output.read_text()[-6000:]}"

    def _ask(self, order: dict) -> dict:
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the parent of the ranks has ended"
        return json.loads(answer)
