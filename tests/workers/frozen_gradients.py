"""At every ZeRO stage, after one backward: which parameters have a gradient. Prints {"STAGE TRAIN": [names, ...], ...}.

One job, one process a rank; stage 3 comes last, for it patches torch in its process.
"""

import json

import torch
from deepspeed.utils import safe_get_full_grad

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups, select_trainable
from vitds.world import world_from_env

world = world_from_env()
device = start_ranks(world)
found = {}
for stage in (0, 1, 2, 3):
    for train in ("head", "last-1"):
        torch.manual_seed(0)
        model = VisionTransformer(get_spec("custom:width=32,depth=3,heads=4,mlp=64,patch=4"), (8, 8), 10)
        model.set_activation_checkpointing("full")
        select_trainable(model, train, 3)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        groups = parameter_groups(model, 0.05)
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
        engine = Engine(model, build_optimizer("AdamW", {"lr": 1e-3}, groups), groups, None, config, device)
        engine.backward(cross_entropy(engine(torch.randn(2, 3, 8, 8)), torch.tensor([1, 2])))
        of_stage = []
        for name, parameter in engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if stage and parameter.requires_grad else parameter.grad
            if gradient is not None and gradient.abs().sum() > 0:
                of_stage.append(name)
        found[f"{stage} {train}"] = of_stage
if world.is_main:
    print(json.dumps(found))
