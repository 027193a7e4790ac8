"""A rank that stays: runs one command of launch/ after another in one process, each a JSON list on a line of stdin.

Answers each with a line {"exit_code": N, "output": TEXT}. torch and deepspeed are imported once, not once a command.
"""

import contextlib
import gc
import io
import json
import runpy
import sys
import traceback

from vitds import errors

errors.end_process = sys.exit  # this process goes on
answers = sys.stdout
for line in sys.stdin:
    sys.argv = json.loads(line)
    output, exit_code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as leaving:
            exit_code = leaving.code
        except Exception:  # what the interpreter would print before it ends with 1
            traceback.print_exc()
            exit_code = 1
    gc.collect()
    print(json.dumps({"exit_code": exit_code, "output": output.getvalue()}), file=answers, flush=True)
