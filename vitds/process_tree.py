"""Which process started which, as Linux's /proc says; elsewhere nothing is known."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def parent_of(pid: int) -> int:
    """The parent's process id; 0 when the process is gone, a zombie, or has none."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])


def command_line(pid: int) -> list[str]:
    """The words that a process was started with; none when it is gone."""
    return _zero_ended(pid, "cmdline")


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone or another user's."""
    return dict(line.split("=", 1) for line in _zero_ended(pid, "environ") if "=" in line)


def ancestors(pid: int) -> list[int]:
    """Parent, grandparent and so on, up to the first process."""
    found = []
    while pid := parent_of(pid):
        found.append(pid)
    return found


def descendants(pid: int) -> dict[int, int]:
    """The living processes below one, each with its parent."""
    parents = {}
    with suppress(OSError):
        parents = {int(entry.name): parent_of(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit()}
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return {child: parents[child] for child in sorted(family - {pid})}


def _zero_ended(pid: int, name: str) -> list[str]:
    try:
        return (_PROC / str(pid) / name).read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
