"""fp16 steps with overflows put in on purpose: prints, per case, what the engine says after each step.

loss_scaling.py {"CASE": {"stage": 1, "fp16": {...}, "overflow_at": [2, ...], "steps": 6}, ...}   (under fp16_on_cpu.py)
"""

import json
import sys

import torch

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.world import world_from_env

device = start_ranks(world_from_env())
told = {}
for case, order in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    model = VisionTransformer(get_spec("custom:width=32,depth=2,heads=4,mlp=64,patch=4"), (8, 8), 10)
    groups = parameter_groups(model, 0.0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {"enabled": True} | order["fp16"],
        "zero_optimization": {"stage": order["stage"]},
    }
    optimizer = build_optimizer("AdamW", {"lr": 1e-3}, groups)
    engine = Engine(model, optimizer, groups, lambda step: 1 / (step + 1), config, device)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float16), torch.tensor([1, 2, 3, 4])
    steps = []
    for step in range(order["steps"]):
        lr, loss = engine.lr, cross_entropy(engine(images), labels)
        engine.backward(loss * float("inf") if step in order["overflow_at"] else loss)
        engine.step()
        (applied,) = engine.outcomes()
        steps.append(
            {
                "loss": loss.item(),
                "lr": lr,
                "applied": applied,
                "scale": engine.loss_scale,
                "skipped": engine.skipped_steps,
                "grad_norm": engine.grad_norm,
                "dtype": str(engine.dtype),
                "at_floor": engine.overflowed_at_floor,
            }
        )
    told[case] = steps
print(json.dumps(told))
