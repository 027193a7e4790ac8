"""launch/train.py where preflight sees a large GPU on rank 0 and a tiny one on the others: unlike_gpus.py FLAGS."""

import os
import runpy

from vitds import preflight

preflight.smallest_gpu_memory_bytes = lambda: 2**37 if os.environ["RANK"] == "0" else 2**20
runpy.run_path("launch/train.py", run_name="__main__")
