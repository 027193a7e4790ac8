import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitds.data.processes import in_processes
from vitds.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_every_task_is_done_once_and_progress_adds_up(num_workers):
    told = []

    def square(task: int, advance) -> int:
        advance(2)
        advance(1)
        return task * task

    results = list(in_processes(square, range(7), num_workers, told.append))
    assert sorted(results) == [task * task for task in range(7)]
    assert sum(told) == 21
    assert list(in_processes(square, [], num_workers)) == []


def test_a_worker_s_error_and_its_death_reach_the_parent():
    def fail(task: int, advance) -> None:
        if task == 3:
            raise DataError("broken", where="here", fix="mend it")
        if task == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError) as caught:
        list(in_processes(fail, range(8), 2))
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("broken", "here", "mend it")
    with pytest.raises(DataError, match="worker process died"):
        list(in_processes(fail, [9, 1, 2], 2))


ORPHANS = """
import sys, time
from vitds.data.processes import in_processes
def work(task, advance):
    while True:
        time.sleep(0.01)
        advance(1)
list(in_processes(work, range(2), 2, lambda num: print(num, flush=True)))
"""


@pytest.mark.ranks
def test_workers_end_when_their_parent_is_killed():
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
