"""Spoil a weight inside a block that is compiled, and print where the search for it ends.

compiled_diagnosis.py STAGE MODULE
"""

import sys
from types import SimpleNamespace

import torch

from vitds.divergence import first_non_finite
from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.world import World

stage, name = int(sys.argv[1]), sys.argv[2]
device = start_ranks(World())
model = VisionTransformer(get_spec("custom:width=32,depth=3,heads=4,mlp=64,patch=4"), (8, 8), 10)
model.compile_blocks(backend="aot_eager")
groups = parameter_groups(model, 0.0)
config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
engine = Engine(model, build_optimizer("AdamW", {"lr": 1e-3}, groups), groups, None, config, device)
micro_batch = SimpleNamespace(images=torch.randn(4, 3, 8, 8), targets=torch.arange(4))


def loss_of(micro_batch):
    return cross_entropy(engine.module(micro_batch.images), micro_batch.targets)


engine.train()
engine.backward(loss_of(micro_batch))
engine.step()
next(engine.module.get_submodule(name).parameters()).data.fill_(float("nan"))
print(first_non_finite(engine, [micro_batch], loss_of))
