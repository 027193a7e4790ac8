"""Train small ViTs on digits, in plain PyTorch or at ZeRO stages, and print the losses; one job, a process a rank.

engine_losses.py {"NAME": {"stage": "plain"|0..3, "accumulation": 1, ...}, ...} [GRADIENTS]

`DEFAULTS` has the other keys of a run. The file GRADIENTS gets {NAME: {parameter: gradient of the first global batch}}
of every run without accumulation. Stage 3 patches torch in its process, so its runs come last.
"""

import json
import sys

import torch
from deepspeed.utils import safe_get_full_grad
from sklearn.datasets import load_digits
from torch._dynamo.utils import counters

from vitds.collectives import mean_over_ranks
from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.schedule import lr_factor
from vitds.world import world_from_env

DEFAULTS = {
    "model": "custom:width=32,depth=3,heads=4,mlp=64,patch=2",
    "image_size": 8,
    "steps": 20,
    "accumulation": 1,
    "activation_checkpointing": "none",
    "compile": None,  # dynamo's back end
    "compile_mode": "default",  # of inductor
    "fp8": False,
    "model_options": {},
    "config": {},
}
GLOBAL_BATCH = 16
PARAMS = {"lr": 1e-3, "weight_decay": 0.05}

world = world_from_env()
device = start_ranks(world)
digits = load_digits()
images_BCHW = torch.tensor(digits.images, dtype=torch.float32).sub(8).div(8)[:, None].expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


def new_model(run):
    """No parameter starts at zero, so that every one has a gradient."""
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(run["model"]), (run["image_size"],) * 2, 10, **run["model_options"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.set_activation_checkpointing(run["activation_checkpointing"])
    if run["fp8"]:
        model.use_fp8()
    if run["compile"] is not None:
        model.compile_blocks(run["compile_mode"], run["compile"])
    return model


def batch_of(run, step, part, parts):
    torch.manual_seed(step * GLOBAL_BATCH + part)  # what the model draws is the micro-batch's, as in training
    size, scale = GLOBAL_BATCH // parts, run["image_size"] // 8
    start = step * GLOBAL_BATCH + part * size
    images = images_BCHW[start : start + size].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return images.to(device), labels[start : start + size].to(device)


def plain(run):
    model, steps, accumulation = new_model(run).to(device), run["steps"], run["accumulation"]
    optimizer = build_optimizer("AdamW", PARAMS, parameter_groups(model, PARAMS["weight_decay"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", 5, steps))
    losses, gradients = [], {}
    for step in range(steps):
        total = 0.0
        for part in range(accumulation):
            images, targets = batch_of(run, step, part, accumulation)
            loss = cross_entropy(model(images), targets) / accumulation
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, gradients


def under_deepspeed(run):
    model, steps, accumulation = new_model(run), run["steps"], run["accumulation"]
    groups = parameter_groups(model, PARAMS["weight_decay"])
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": run["stage"]},
        **run["config"],
    }
    engine = Engine(
        model, build_optimizer("AdamW", PARAMS, groups), groups, lr_factor("cosine", 5, steps), config, device
    )
    losses, gradients = [], {}
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for index in range(accumulation):
            part = world.rank * accumulation + index
            images, targets = batch_of(run, step, part, world.world_size * accumulation)
            loss = cross_entropy(engine(images.to(engine.dtype)), targets)
            engine.backward(loss)
            if step == 0 and accumulation == 1:
                of = safe_get_full_grad if run["stage"] else lambda parameter: parameter.grad
                gradients = {name: of(p) / engine.loss_scale for name, p in engine.module.named_parameters()}
            engine.step()
            total += loss.detach().cpu() / accumulation
        losses.append(mean_over_ranks(total))
    return losses, gradients


losses, gradients = {}, {}
for name, changes in json.loads(sys.argv[1]).items():
    run = DEFAULTS | changes
    torch.compiler.reset()
    counters.clear()
    if run["stage"] != "plain":
        losses[name], gradients[name] = under_deepspeed(run)
    elif world.rank == 0:
        losses[name], gradients[name] = plain(run)
    assert bool(counters["stats"]["unique_graphs"]) == bool(run["compile"]), name
if world.rank == 0:
    if len(sys.argv) > 2:
        torch.save(
            {run: {name: g.float().cpu() for name, g in of.items()} for run, of in gradients.items()}, sys.argv[2]
        )
    print(json.dumps(losses))
