"""DeepSpeed's own learning rates: the rate of each update, from deepspeed.initialize and a JSON file's sections.

deepspeed_lr_trace.py STEPS CONFIG.json ...  ->  {CONFIG.json: [lr, ...], ...}
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled

traces = {}
for path in sys.argv[2:]:
    config = json.loads(Path(path).read_text())
    config["optimizer"]["params"]["torch_adam"] = True  # torch's AdamW instead of a compiled one: the rate is the same
    model = torch.nn.Linear(4, 2)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    images = torch.ones(engine.train_micro_batch_size_per_gpu(), 4, dtype=model.weight.dtype)
    rates = []
    while engine.global_steps < int(sys.argv[1]):
        if engine.is_gradient_accumulation_boundary():
            rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.backward(engine(images).float().mean())
        engine.step()
    traces[path] = rates
print(json.dumps(traces))
