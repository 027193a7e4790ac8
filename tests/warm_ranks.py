"""Ranks that run many commands of launch/ in the same processes: a start costs seconds once, not once a command.

What a process itself does (signals, kills, its real exit code) is tested with `rank_processes`; here an exit code is
what the command gave to `sys.exit`. A ZeRO stage 3 engine patches torch for the rest of its process: run it last.
"""

import json
import subprocess
import threading
from dataclasses import dataclass

from rank_processes import start_ranks


@dataclass
class Answer:
    """What a command gave: the exit code of every rank (they agree), and what rank 0 printed."""

    exit_code: int
    output: str


class WarmRanks:
    """`world_size` processes that wait for commands; a context manager that ends them."""

    def __init__(self, world_size: int, worker: str = "tests/workers/warm_ranks.py", **environment: str) -> None:
        self.processes = start_ranks([worker], world_size, stdin=subprocess.PIPE, **environment)

    def __enter__(self) -> "WarmRanks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def run(self, command: list[object], exit_code: int = 0, timeout_s: float = 300) -> Answer:
        """Run a command on every rank and check that all of them leave it with the exit code."""
        self.start(command)
        return self.finish(exit_code, timeout_s)

    def start(self, command: list[object]) -> None:
        """Begin a command on every rank."""
        order = json.dumps([str(part) for part in command]) + "\n"
        for process in self.processes:
            process.stdin.write(order)
            process.stdin.flush()

    def finish(self, exit_code: int = 0, timeout_s: float = 300) -> Answer:
        """Wait for the command's end and check its exit code on every rank; of the ranks, only the first may speak."""
        outputs = self.finish_all(exit_code, timeout_s)
        assert not any(outputs[1:]), "\n".join(output[-6000:] for output in outputs)
        return Answer(exit_code, outputs[0])

    def finish_all(self, exit_code: int = 0, timeout_s: float = 300) -> list[str]:
        """Wait for the command's end, check its exit code on every rank and return what each printed."""
        answers = [self._answer(process, timeout_s) for process in self.processes]
        codes = [answer["exit_code"] for answer in answers]
        shown = "\n".join(answer["output"][-6000:] for answer in answers)
        assert set(codes) == {exit_code}, f"exit codes {codes}:\n{shown}"
        return [answer["output"] for answer in answers]

    @staticmethod
    def _answer(process: subprocess.Popen, timeout_s: float) -> dict:
        watchdog = threading.Timer(timeout_s, process.kill)
        watchdog.start()
        seen = ""
        try:
            for line in process.stdout:
                if line.startswith('{"exit_code"'):
                    return json.loads(line)
                seen += line
        finally:
            watchdog.cancel()
        raise AssertionError(f"a rank ended with exit {process.wait()}:\n{seen[-6000:]}")
