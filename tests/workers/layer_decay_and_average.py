"""Train a small ViT with layer-wise decay and an average of its weights, by hand and at ZeRO stages; a process a rank.

layer_decay_and_average.py OUT_DIR {"NAME": {"stage": "plain"|0..3, ...}, ...}

`DEFAULTS` has the other keys of a run. "plain" is the textbook in fp32: AdamW written out, a rate for each parameter,
no groups. Rank 0 writes OUT_DIR/NAME.pt: {"losses", "lr", "num_groups", "figures", "master", "ema"}; the last two are
read from a checkpoint that the engine saved. Stage 3 patches torch in its process, so its runs come last.
"""

import json
import math
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from vitds.checkpoint import CheckpointStore
from vitds.collectives import mean_over_ranks
from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, decay_by_layer, parameter_groups, select_trainable
from vitds.schedule import lr_factor
from vitds.weights.zero import open_checkpoint
from vitds.world import world_from_env

DEFAULTS = {
    "model": "custom:width=24,depth=3,heads=3,mlp=40,patch=2",
    "image_size": 8,
    "train": "all",
    "layer_decay": 0.6,
    "ema_decay": 0.9,
    "evaluate_every": 0,  # with the average, between the steps
    "config": {},
    "optimizer": "AdamW",  # null: DeepSpeed's own
}
STEPS, GLOBAL_BATCH, DEPTH = 8, 16, 3
LR, WEIGHT_DECAY, BETAS = 3e-3, 0.1, (0.9, 0.999)
EPS = 1e-4  # some gradients are zero but for rounding (of the keys' biases), and Adam would make whole steps of that

out, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
world = world_from_env()
device = start_ranks(world)
digits = load_digits()
images_BCHW = torch.tensor(digits.images, dtype=torch.float32).sub(8).div(8)[:, None].expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


def new_model(run):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(run["model"]), (run["image_size"],) * 2, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    select_trainable(model, run["train"], DEPTH)
    return model


def batch_of(run, step, rank=0, ranks=1):
    size, scale = GLOBAL_BATCH // ranks, run["image_size"] // 8
    part = slice(step * GLOBAL_BATCH + rank * size, step * GLOBAL_BATCH + (rank + 1) * size)
    images = images_BCHW[part].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return images.to(device), labels[part].to(device)


def textbook_rate(name, layer_decay):
    """MAE's table, written out by hand: what comes before the blocks, the blocks, what comes after them."""
    if name.startswith("blocks."):
        return LR * layer_decay ** (DEPTH - int(name.split(".")[1]))
    return LR if name.startswith(("norm", "head")) else LR * layer_decay ** (DEPTH + 1)


def plain(run):
    model, factor = new_model(run), lr_factor("cosine", 3, STEPS)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, second = ({n: torch.zeros_like(p) for n, p in trainable.items()} for _ in range(2))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        images, targets = batch_of(run, step)
        loss = cross_entropy(model(images), targets)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in trainable.values()))
            for name, p in trainable.items():
                grad, lr = p.grad * min(1.0, 1 / (norm + 1e-6)), textbook_rate(name, run["layer_decay"]) * factor(step)
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * grad
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * grad**2
                mean, square = (
                    m / (1 - b ** (step + 1)) for m, b in ((first[name], BETAS[0]), (second[name], BETAS[1]))
                )
                if name.endswith("weight") and p.ndim >= 2:
                    p -= lr * WEIGHT_DECAY * p
                p -= lr * mean / (square.sqrt() + EPS)
                ema[name] += (1 - run["ema_decay"]) * (p - ema[name])
    master = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "master": master, "ema": ema}


def under_deepspeed(run, name):
    model = new_model(run)
    groups = parameter_groups(model, WEIGHT_DECAY, "matrices")
    groups = decay_by_layer(groups, model, DEPTH, LR, run["layer_decay"])
    params = {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": BETAS, "eps": EPS}
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": run["stage"]},
        **run["config"],
    }
    optimizer = build_optimizer(run["optimizer"], params, groups) if run["optimizer"] else None
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": params | {"torch_adam": True}}
    engine = Engine(model, optimizer, groups, lr_factor("cosine", 3, STEPS), config, device, run["ema_decay"])
    losses, rates, figures = [], [], []
    for step in range(STEPS):
        images, targets = batch_of(run, step, world.rank, world.world_size)
        engine.train()
        rates.append(engine.lr)
        loss = cross_entropy(engine(images.to(engine.dtype)), targets)
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss.detach().double().cpu()))
        if run["evaluate_every"] and step % run["evaluate_every"] == 0:
            engine.train(False)
            with torch.no_grad(), engine.averaged():
                figures.append(mean_over_ranks(cross_entropy(engine(images.to(engine.dtype)), targets).double().cpu()))
    store = CheckpointStore(out / name, world)
    directory = store.save(engine.snapshot({}).write, STEPS, {})
    result = {"losses": losses, "lr": rates, "figures": figures, "num_groups": len(groups)}
    if world.rank == 0:
        for state in ("master", *(["ema"] if run["ema_decay"] else [])):
            result[state] = {
                key: torch.from_numpy(array.copy()) for key, array in open_checkpoint(directory, state).items()
            }
    return result


for name, changes in runs.items():
    run = DEFAULTS | changes
    result = under_deepspeed(run, name) if run["stage"] != "plain" else plain(run)
    if world.rank == 0:
        torch.save(result, out / f"{name}.pt")
