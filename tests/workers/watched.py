"""A rank that does nothing but phases and collectives, and one fault: watched.py FAULT RANK HANG_TIMEOUT_S."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from vitds.errors import DataUnavailable, Diverged, exit_with
from vitds.watchdog import Watchdog
from vitds.world import world_from_env

fault, faulty_rank, hang_timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
world = world_from_env()
is_faulty = world.rank == faulty_rank


def misbehave(step: int, watch: Watchdog) -> None:
    """What happens in phase `data` of step 20."""
    if fault in ("SIGKILL", "SIGSTOP") and is_faulty:
        for _ in range(30):  # its last beat is from here, also where the thread that beats gets its turn late
            watch.waits_for_data()  # or it would hang, rather than be still from then on
            time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "hang" and is_faulty:
        time.sleep(1000)
    elif fault == "slow data" and is_faulty:
        for _ in range(int(2.5 * hang_timeout_s)):
            watch.waits_for_data()
            time.sleep(1)
    elif fault == "bug" and is_faulty:
        raise TypeError("there is no such thing")
    elif fault == "data error" and is_faulty:
        raise DataUnavailable("the server is silent")
    elif fault == "same error":
        time.sleep(4.0 * is_faulty)
        raise Diverged(f"the loss is nan at step {step}")


def main() -> None:
    """Forty steps, if nothing happens."""
    with Watchdog(world, hang_timeout_s) as watch:
        if fault == "slow start" and is_faulty:
            time.sleep(1.5 * hang_timeout_s)
        for step in range(1, 41):
            watch.enter("data", step)
            if step == 20:
                misbehave(step, watch)
            watch.enter("backward")
            if step == 20 and fault == "hang in a phase of waiting" and is_faulty:
                time.sleep(1000)
            dist.all_reduce(torch.zeros(1))
            time.sleep(0.02)


dist.init_process_group("gloo")
exit_with(main)
