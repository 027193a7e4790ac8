"""Run a command on a disk that is full once: the first file of one rank that outgrows a size is cut there.

full_disk.py RANK MAX_BYTES SCRIPT [ARGUMENT ...]
"""

import os
import resource
import runpy
import signal
import sys

rank, max_bytes, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
before = resource.getrlimit(resource.RLIMIT_FSIZE)


def make_room(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


if os.environ.get("RANK", "0") == rank:
    signal.signal(signal.SIGXFSZ, make_room)  # comes with the write that fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    make_room()
