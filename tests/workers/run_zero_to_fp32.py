"""Run the zero_to_fp32.py of each checkpoints directory as its user would: DIR -> DIR/fp32/pytorch_model.bin.

run_zero_to_fp32.py DIR ...
"""

import os
import runpy
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
for directory in sys.argv[1:]:
    sys.argv = [f"{directory}/zero_to_fp32.py", directory, f"{directory}/fp32"]
    runpy.run_path(sys.argv[0], run_name="__main__")
