"""Load a directory with DeepSpeed's own load_checkpoint(load_module_only=True) at stages 0 to 2 and say what arrived.

plain_deepspeed_load.py DIRECTORY MODEL IMAGE_SIZE NUM_CLASSES EXPECTED.pt  ->  {"0": true, "1": true, "2": true}
"""

import json
import os
import sys

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
import torch

import vitds

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled

directory, name, image_size, num_classes, expected = sys.argv[1:]
expected = torch.load(expected)
arrived = {}
for stage in (0, 1, 2):
    model = vitds.create_model(name, int(image_size), int(num_classes))
    before = all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    engine = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )[0]
    path, _ = engine.load_checkpoint(directory, load_module_only=True)
    state = engine.module.state_dict()
    same = state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    arrived[stage] = path is not None and same and not before
    engine.destroy()
print(json.dumps(arrived))
