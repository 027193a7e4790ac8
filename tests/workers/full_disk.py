"""Run a command while no file of this rank may grow past a size, as on a full disk; other ranks are left alone.

full_disk.py RANK MAX_BYTES SCRIPT [ARGUMENT ...]
"""

import os
import resource
import runpy
import sys

rank, max_bytes, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
before = resource.getrlimit(resource.RLIMIT_FSIZE)
if os.environ.get("RANK", "0") == rank:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
