"""Goes on from a run's checkpoints with DeepSpeed alone; prints the losses of the next steps, a list a directory.

plain_deepspeed_continue.py BATCHES.pt RUN_DIR ...   with BATCHES [step][rank][micro-batch] = (images, targets)
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
import torch

from vitds import create_model
from vitds.schedule import lr_factor

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled
deepspeed.init_distributed("gloo", verbose=False)
batches, runs = torch.load(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
rank, losses = deepspeed.comm.get_rank(), []

for run in runs:
    config = json.loads((run / "config.resolved.json").read_text())
    ours = config.pop("vitds")
    model = create_model(ours["model"], ours["image_size"], ours["num_classes"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ours["train"] == "all" or name.startswith(("blocks.2.", "norm.", "head.")))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], **config.pop("optimizer")["params"]
    )
    schedule = config.pop("scheduler")["params"]
    factor = lr_factor("cosine", schedule["warmup_num_steps"], schedule["total_num_steps"])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped, factor=factor: torch.optim.lr_scheduler.LambdaLR(wrapped, factor),
        config=config,
    )
    path, _ = engine.load_checkpoint(str(run / "checkpoints"))
    assert path is not None
    of_run = []
    for step in batches:
        total = torch.zeros((), dtype=torch.float64)
        for images, targets in step[rank]:
            logits = engine(images.to(engine.get_data_types()[0])).float()
            loss = torch.nn.functional.cross_entropy(logits, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(step[rank])
        deepspeed.comm.all_reduce(total)
        of_run.append(total.item() / deepspeed.comm.get_world_size())
    losses.append(of_run)
if rank == 0:
    print(json.dumps({"losses": losses}))
