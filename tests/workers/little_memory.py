"""launch/train.py with LITTLE_MEMORY="RANK:MIB:STEP:SIGNAL" from that step's first forward on: little_memory.py FLAGS.

Only that rank has so little (-1: none), and gets the signal before, if one is named. The limit stays with a process
that begins again, as a GPU's memory does. Such a process says at once which children it has, dead ones too.
"""

import os
import resource
import runpy
import signal
import time

import psutil

from vitds.watchdog import Watchdog
from vitds.world import START_VARIABLE

if START_VARIABLE in os.environ:
    print(f"begins again with {len(psutil.Process().children())} children", flush=True)

rank, room_mib, first_step, name = os.environ["LITTLE_MEMORY"].split(":")
enter = Watchdog.enter


def enter_with_limit(watch, phase, step=None):
    enter(watch, phase, step)
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    is_time = phase == "forward" and watch.step >= int(first_step)
    if is_time and os.environ.get("RANK", "0") == rank and limit == hard:
        if name:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(1)  # a thread hears it
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + int(room_mib) * 2**20, hard))


Watchdog.enter = enter_with_limit
runpy.run_path("launch/train.py", run_name="__main__")
