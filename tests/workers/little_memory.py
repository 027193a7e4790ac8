"""launch/train.py with LITTLE_MEMORY="RANK:MIB:STEP:SIGNAL:PHASES" from that step on: little_memory.py FLAGS.

Only that rank (-1: none) has so little more than it holds when it comes there, in those phases alone (with commas; as a
GPU does not hold what reads data and saves), and gets the signal before, if one is named. A process that begins again
has the same room anew, and says at once which children it has, dead ones too.
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

rank, room_mib, first_step, name, phases = os.environ["LITTLE_MEMORY"].split(":")
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
limit = hard
enter = Watchdog.enter


def enter_with_limit(watch, phase, step=None):
    global limit
    enter(watch, phase, step)
    is_limited = phase in phases.split(",") and watch.step >= int(first_step) and os.environ.get("RANK", "0") == rank
    if is_limited and limit == hard:
        if name and START_VARIABLE not in os.environ:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(1)  # a thread hears it
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        limit = in_use + int(room_mib) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if is_limited else hard, hard))


Watchdog.enter = enter_with_limit
runpy.run_path("launch/train.py", run_name="__main__")
