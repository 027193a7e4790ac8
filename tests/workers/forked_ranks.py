"""A parent that has imported torch and DeepSpeed, and forks a rank of launch/train.py for every order on its stdin.

The ranks are processes of their own in all that counts (memory, threads, sockets, exit code, SIGKILL); they only skip
the seconds of importing. Orders and answers are JSON lines: {"argv", "environment", "output"} gives {"pid"}, and
{"wait": pid} gives {"exit_code"}, negative for a signal.
"""

import json
import os
import runpy
import sys

answers, sys.stdout = sys.stdout, sys.stderr  # importing DeepSpeed prints

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - every start comes to this one, and to torch's compiler

import vitds.train  # noqa: F401


def become_rank(order: dict) -> None:
    """Run launch/train.py in this new process, which ends with it."""
    os.setsid()
    os.environ.update(order["environment"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = answers  # descriptor 1
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = order["argv"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = {"exit_code": os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])}
    else:
        answer = {"pid": os.fork()}
        if answer["pid"] == 0:
            become_rank(order)
    print(json.dumps(answer), file=answers, flush=True)
