"""Train a small ViT on digits for some steps and print the losses: plain PyTorch, or a ZeRO stage; a process a rank.

engine_losses.py {"stage": "plain"|0..3, "steps": 20, "cases": [[accumulation, activation_checkpointing], ...]}
"""

import json
import sys

import torch
from sklearn.datasets import load_digits

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.schedule import lr_factor
from vitds.world import world_from_env

GLOBAL_BATCH = 16
PARAMS = {"lr": 1e-3, "weight_decay": 0.05}

order = json.loads(sys.argv[1])
world = world_from_env()
digits = load_digits()
images_BCHW = torch.tensor(digits.images, dtype=torch.float32).sub(8).div(8)[:, None].expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


def new_model(activation_checkpointing):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec("custom:width=32,depth=3,heads=4,mlp=64,patch=2"), (8, 8), 10)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    model.set_activation_checkpointing(activation_checkpointing)
    return model


def batch_of(step, part, parts):
    size = GLOBAL_BATCH // parts
    start = step * GLOBAL_BATCH + part * size
    return images_BCHW[start : start + size], labels[start : start + size]


def plain(accumulation, activation_checkpointing, steps):
    model = new_model(activation_checkpointing)
    optimizer = build_optimizer("AdamW", PARAMS, parameter_groups(model, PARAMS["weight_decay"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", 5, steps))
    losses = []
    for step in range(steps):
        total = 0.0
        for part in range(accumulation):
            images, targets = batch_of(step, part, accumulation)
            loss = cross_entropy(model(images), targets) / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def under_deepspeed(accumulation, activation_checkpointing, steps):
    model = new_model(activation_checkpointing)
    groups = parameter_groups(model, PARAMS["weight_decay"])
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": order["stage"]},
        **order.get("config", {}),
    }
    engine = Engine(
        model, build_optimizer("AdamW", PARAMS, groups), groups, lr_factor("cosine", 5, steps), config, device
    )
    losses = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for index in range(accumulation):
            part = world.rank * accumulation + index
            images, targets = batch_of(step, part, world.world_size * accumulation)
            loss = cross_entropy(engine(images.to(engine.dtype)), targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation
        losses.append(mean_over_ranks(total))
    return losses


train = plain
if order["stage"] != "plain":
    from vitds.collectives import mean_over_ranks

    device = start_ranks(world)
    train = under_deepspeed
if world.rank == 0:
    print(json.dumps({f"{a}-{c}": train(a, c, order["steps"]) for a, c in order["cases"]}))
else:
    for a, c in order["cases"]:
        train(a, c, order["steps"])
