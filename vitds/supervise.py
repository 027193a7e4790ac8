"""Around a launcher: its ranks hear every signal, nothing is left of it, and its end is the run's own verdict.

The `deepspeed` command alone does neither: SIGTERM ends it and not its ranks, and it exits 0 when launch.py was killed.
Orphans become children of this process, so the run is over when this process has no child left.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from vitds.errors import EXIT_BUG, EXIT_RANK_LOST, EXIT_USAGE
from vitds.process_tree import descendants, environment
from vitds.stop_signals import STOP_SIGNALS
from vitds.verdict import BEFORE_TRAINING, EXIT_FILE_VARIABLE, EXIT_NAME, read_verdict

USAGE = """usage: python launch/supervise.py [--restarts N] [--patience S] deepspeed ... launch/train.py ...
  Passes SIGTERM, SIGUSR1 and SIGINT on to the ranks, leaves no process behind, and exits as the run did (exit.json).
  --restarts N  start again from the last checkpoint, up to N times, when a rank was lost (exit 7) [0]
  --patience S  seconds that processes may take to end once the launcher is gone or a signal came [600]"""

_LOOK_EVERY_S = 0.25
_LAUNCHER_ENDS_S = 5.0  # it looks for its ranks every second
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Supervisor:
    """Runs a launcher's command once or, when ranks are lost, again."""

    def __init__(self, command: list[str], restarts: int = 0, patience_s: float = 600.0) -> None:
        """Become the parent of orphans and catch the stop signals; for a process that does nothing else."""
        self._command, self._restarts, self._patience_s = command, restarts, patience_s
        self._received: list[signal.Signals] = []
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Start the command, again after a lost rank as often as allowed, and return the exit code of the last run."""
        for restarts_left in range(self._restarts, -1, -1):
            code, verdict = self._run_once()
            if code != EXIT_RANK_LOST or self._received or not restarts_left:
                break
            number = self._restarts - restarts_left + 1
            step = "" if verdict.get("step") is None else f" after step {verdict['step']}"
            _say(f"a rank was lost{step}; restart {number} of {self._restarts}, from the last checkpoint")
        return code

    def _run_once(self) -> tuple[int, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="vitds-") as directory:
            exit_file = Path(directory) / EXIT_NAME
            environ = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
            try:
                process = subprocess.Popen(
                    self._command,
                    env=environ | {EXIT_FILE_VARIABLE: str(exit_file)},
                    preexec_fn=_ignore_interrupts,
                )
            except OSError as error:
                _say(f"{self._command[0]}: {error.strerror}")
                return EXIT_USAGE, {}
            code_of_command = self._wait_for_all(process.pid)
            process.returncode = code_of_command  # it was waited for already
            verdict = read_verdict(exit_file)
            return self._judge(code_of_command, verdict), verdict

    def _wait_for_all(self, command: int) -> int:
        """Wait until no descendant is left, passing signals on; the command's exit code, negative after a signal."""
        code, told, deadline = None, dict[tuple[int, signal.Signals], float](), float("inf")
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                assert code is not None
                return code
            if pid == command:
                code = os.waitstatus_to_exitcode(status)
            if pid:
                continue
            requests = list(self._received)
            if code is not None and not requests:
                requests = [signal.SIGTERM]  # ranks without a launcher
            if requests:
                deadline = min(deadline, time.monotonic() + self._patience_s)
                _pass_on(requests, told)
            if time.monotonic() > deadline:
                left = descendants(os.getpid())
                _say(f"{len(left)} processes are left after {self._patience_s:g} s and are killed now")
                for pid in left:
                    _send(pid, signal.SIGKILL)
                deadline = time.monotonic() + self._patience_s
            time.sleep(_LOOK_EVERY_S)

    def _judge(self, code_of_command: int, verdict: dict[str, Any]) -> int:
        """The exit code of a run: its verdict, never the launcher's 0."""
        code = verdict.get("exit_code")
        asked_for = max((STOP_SIGNALS[number] for number in self._received), default=0)
        if isinstance(code, int):
            was_killed = code_of_command > 192 and 256 - code_of_command not in STOP_SIGNALS  # a rank, says launch.py
            if code in STOP_SIGNALS.values():
                if was_killed and verdict["step"] is None and not asked_for:
                    return EXIT_RANK_LOST  # launch.py stopped the other ranks, which had not begun
                code = max(code, asked_for)
                if verdict.get("reason") == BEFORE_TRAINING:
                    _say(f"{BEFORE_TRAINING}; the same command starts again (exit {code})")
            return code
        if not verdict and asked_for:
            _say(f"{BEFORE_TRAINING}; the same command starts again (exit {asked_for})")
            return asked_for
        if not verdict and EXIT_BUG <= code_of_command < 128:
            return code_of_command  # the launcher's own complaint: no rank began
        _say("the ranks are gone without a word; the last checkpoint is whole")
        return EXIT_RANK_LOST

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._received.append(signal.Signals(number))


def _pass_on(requests: list[signal.Signals], told: dict[tuple[int, signal.Signals], float]) -> None:
    """Give each signal once to each rank, also to one that appears later; while there is none, to our children.

    These were started deaf to Ctrl-C, and get SIGTERM as well; but not while they end by themselves, as they do soon
    after their ranks (launch.py prints a traceback of its exit that a signal meets).
    """
    ours = descendants(os.getpid())
    ranks = [pid for pid, parent in ours.items() if _has_rank(pid) and not (parent in ours and _has_rank(parent))]
    if not ranks:
        if told and time.monotonic() < max(told.values()) + _LAUNCHER_ENDS_S:
            return
        requests = [*requests, signal.SIGTERM]
    for pid in ranks or [pid for pid, parent in ours.items() if parent == os.getpid()]:
        for number in requests:
            if (pid, number) not in told:
                told[pid, number] = time.monotonic()
                _send(pid, number)


def _has_rank(pid: int) -> bool:
    return "LOCAL_RANK" in environment(pid)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole foreground group: the ranks catch it, and the command waits for them in silence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _say(text: str) -> None:
    try:
        print(f"supervisor  {text}", file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone
        pass


def parse(words: list[str]) -> tuple[list[str], int, float] | None:
    """The command, the number of restarts and the patience that a command line asks for; None when it is wrong."""
    values = {"--restarts": 0.0, "--patience": 600.0}
    while words and words[0].startswith("-"):
        name, equals, value = words[0].partition("=")
        rest = words[1:]
        if not equals and rest:
            value, rest = rest[0], rest[1:]
        if name not in values or not value.isdigit():
            return None
        values[name], words = float(value), rest
    return (words, int(values["--restarts"]), values["--patience"]) if words else None


def main(words: list[str]) -> int:
    """Supervise the command of `words`."""
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    parsed = parse(words)
    if parsed is None:
        print(f"usage error  {shlex.join(words) or 'a command is missing'}\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    if len(hosts := _hosts_by_ssh(parsed[0])) > 1:
        what = f"ranks that ssh starts on {hosts[0]}, {hosts[1]}... hear no signal from here, nor is their end known"
        fix = "start this on each host, with --no_ssh --node_rank K (launch/README.md); or `deepspeed` alone"
        print(f"usage error  {what}\n  {fix}", file=sys.stderr)
        return EXIT_USAGE
    return Supervisor(*parsed).run()


def _hosts_by_ssh(command: list[str]) -> list[str]:
    """The hosts on which `deepspeed` would start ranks by ssh or MPI; none when it starts them itself."""
    if Path(command[0]).name not in ("deepspeed", "ds") or "--no_ssh" in command:
        return []
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-H", "--hostfile", default="/job/hostfile")  # DeepSpeed's own default
    options.add_argument("--num_nodes", default="-1")
    try:
        found = options.parse_known_args(command[1:])[0]
        lines = Path(found.hostfile).read_text(errors="replace").splitlines()
    except (argparse.ArgumentError, OSError):
        return []
    names = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return names[:1] if found.num_nodes == "1" else names
