"""Run a worker's script and end the process at once: run_and_leave.py SCRIPT [ARGUMENTS].

At an ordinary exit a rank now and then aborts over C++ threads that outlive the interpreter; see `errors.end_process`.
"""

import os
import runpy
import sys
import traceback

sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as leaving:
    code = leaving.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
