"""How a run ended: `exit.json` in its directory, for the supervisor that restarts it and for people who look later.

{"exit_code", "step", "reason", "time"}; the code is null while the run goes on, and stays so when all ranks are killed
together. Any rank may write it: the first verdict stands, but a lost rank (7) is only what the others see of a cause
that a rank may still name. A supervisor on this machine gets the same file where VITDS_EXIT_FILE says, also of a start
that ended before it had a run directory.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitds.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RANK_LOST, EXIT_STOPPED

EXIT_FILE_VARIABLE = "VITDS_EXIT_FILE"
EXIT_NAME = "exit.json"
BEFORE_TRAINING = "stopped before training began"  # the reason of a start that ended before its ranks had met

_REASONS = {EXIT_DONE: "done", EXIT_STOPPED: "stopped on request", EXIT_INTERRUPTED: "interrupted"}


class Verdict:
    """The verdict of the run in this process."""

    def __init__(self) -> None:
        self.step: int | None = None  # the last whole one; None before training
        self._run_file: Path | None = None

    def begin(self) -> None:
        """A rank starts, as a supervisor is to know; whether the run takes it is not known yet."""
        self.step = self._run_file = None
        supervisors = _supervisors_file()
        if supervisors and not supervisors.exists():
            self._write(supervisors, None, "")

    def belongs_to(self, run_dir: Path, is_main: bool) -> None:
        """This rank goes on with the run in `run_dir`; a start that was refused leaves the verdict there as it was."""
        self._run_file = run_dir / EXIT_NAME
        if is_main:
            self._write(self._run_file, None, "")

    def record(self, exit_code: int, reason: str) -> None:
        """Write how the run ended, unless that is known; a disk that cannot take it must not change the end."""
        reason = reason or _REASONS.get(exit_code, "")
        for path in filter(None, (self._run_file, _supervisors_file())):
            before = read_verdict(path).get("exit_code")
            if before is None or (before == EXIT_RANK_LOST != exit_code):
                self._write(path, exit_code, reason)

    def _write(self, path: Path, exit_code: int | None, reason: str) -> None:
        text = json.dumps({"exit_code": exit_code, "step": self.step, "reason": reason, "time": time.time()})
        temporary = path.with_name(f".{path.name}.{os.getpid()}")  # ranks may write at the same time
        with suppress(OSError):
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict file's content; empty when it is missing or no verdict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_supervised() -> bool:
    """Whether a supervisor is there, who reads the verdict and says it when the ranks cannot."""
    return EXIT_FILE_VARIABLE in os.environ


def _supervisors_file() -> Path | None:
    path = os.environ.get(EXIT_FILE_VARIABLE)
    return Path(path) if path else None


verdict = Verdict()  # a process has one end
