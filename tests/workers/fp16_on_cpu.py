"""Run a script with fp16 allowed on the CPU: only DeepSpeed's check is patched, its loss scaler and kernels are real.

fp16_on_cpu.py SCRIPT [ARGUMENT ...]
"""

import runpy
import sys

import vitds.engine

type(vitds.engine.get_accelerator()).is_fp16_supported = lambda self: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
