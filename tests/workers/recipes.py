"""Train two steps of each given recipe on a small model, one after another in this rank's process.

recipes.py DATA OUTPUT_DIR CONFIG.json ...  ->  OUTPUT_DIR/<recipe>/, as launch/train.py leaves it
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

from deepspeed.accelerator import get_accelerator

from vitds.preflight import plan_run
from vitds.train import train

# DeepSpeed refuses fp16 on most CPUs for its speed; its loss scaler is the same code everywhere.
type(get_accelerator()).is_fp16_supported = lambda self: True

data, output, *recipes = sys.argv[1:]
# The sizes of the recipes' own models would take hours here.
shrink = ["--model", "custom:width=32,depth=2,heads=2,mlp=64,patch=4", "--image-size", "16", "--workers", "0"]
length = ["--num-steps", "2", "--warmup-steps", "1", "--log-every", "1", "--save-every", "2", "--eval-every", "2"]
for recipe in recipes:
    arguments = ["--deepspeed_config", recipe, "--data", data, "--output-dir", output, "--name", Path(recipe).stem]
    content = json.loads(Path(recipe).read_text())
    if "train_micro_batch_size_per_gpu" in content:  # two a step: many small ones take their time on a CPU
        micro_batch = content["train_batch_size"] // (2 * int(os.environ["WORLD_SIZE"]))
        arguments += ["--micro-batch-size", str(micro_batch)]
    assert train(plan_run([*arguments, *shrink, *length])) == 0
