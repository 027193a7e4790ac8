"""launch/train.py, and a rank whose main thread stops for ever in a phase: hanging_rank.py RANK PHASE STEP COMMAND."""

import os
import runpy
import sys
import time

from vitds.watchdog import Watchdog

rank, phase_of_hang, step_of_hang = sys.argv[1], sys.argv[2], int(sys.argv[3])
enter = Watchdog.enter


def enter_and_hang(watch, phase, step=None):
    enter(watch, phase, step)
    if (os.environ["RANK"], watch.phase, watch.step) == (rank, phase_of_hang, step_of_hang):
        print("HANGS", flush=True)
        time.sleep(100_000)


Watchdog.enter = enter_and_hang
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
