"""Train under the engine and in a plain PyTorch loop, 20 clipped steps of SGD: prints what each step was, by case.

precision_levels.py {"CASE": {"config": {...}, "optimizer": "SGD" | null, "clip": 0.1, "steps": 20}, ...}

`config` is what launch/train_fp16.sh makes of its recipe; "optimizer" null is the one in it, DeepSpeed's. The plain
loop keeps fp32 masters, multiplies the loss by the engine's scale of the step, and divides before it takes the norm.
"""

import json
import math
import sys

import torch
from sklearn.datasets import load_digits

from vitds.collectives import mean_over_ranks
from vitds.ds_config import is_float16_autocast
from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, layer_of, parameter_groups
from vitds.world import world_from_env

world = world_from_env()
device = start_ranks(world)
digits = load_digits()
images_BCHW = torch.tensor(digits.images, dtype=torch.float32).sub(8).div(8)[:, None].expand(-1, 3, -1, -1).to(device)
labels = torch.tensor(digits.target, device=device)
DEPTH = 2
SGD = {"lr": 0.1, "momentum": 0.9}


def new_model():
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(f"custom:width=16,depth={DEPTH},heads=2,mlp=32,patch=4"), (8, 8), 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(device)


def micro_batches(order, step):
    """This rank's share of the step's micro-batches, and all of them."""
    config, size = order["config"], order["config"]["train_micro_batch_size_per_gpu"]
    start = step % (len(labels) // config["train_batch_size"]) * config["train_batch_size"]
    share = config["gradient_accumulation_steps"]
    everything = [slice(start + i * size, start + (i + 1) * size) for i in range(share * world.world_size)]
    return everything[world.rank * share : (world.rank + 1) * share], everything


class PlainLoop:
    """The same numbers by hand: fp32 masters behind a model in fp16, or in fp32 with or without autocast."""

    def __init__(self, order, dtype):
        self.model, self.order, self.dtype = new_model(), order, dtype
        self.masters = [p.detach().clone() for p in self.model.parameters()]
        self.model.to(dtype)
        self.optimizer = torch.optim.SGD(self.masters, **SGD)
        self.autocast = is_float16_autocast(order["config"].get("torch_autocast", {}))

    def step(self, number, scale, is_applied):
        """Returns the loss, gradient norms before clipping of the whole and by block, and the norm that is applied.

        It skips what the engine skips: the gradients of one rank, before the mean over ranks, overflow sooner than its.
        """
        everything = micro_batches(self.order, number)[1]
        total = 0.0
        for part in everything:
            with torch.autocast(device.type, torch.float16, enabled=self.autocast):
                logits = self.model(images_BCHW[part].to(self.dtype))
            loss = cross_entropy(logits, labels[part])
            (loss * (scale / len(everything))).backward()
            total += loss.item() / len(everything)
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float() / scale, None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.order["clip"])
        if is_applied:
            self.optimizer.step()
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.data.copy_(master)
        clipped = torch.nn.utils.get_total_norm([m.grad for m in self.masters]).item()
        squares = [0.0] * (DEPTH + 2)
        for (name, _), master in zip(self.model.named_parameters(), self.masters, strict=True):
            squares[layer_of(name, DEPTH)] += (master.grad * (norm / clipped)).double().square().sum().item()
        return {"loss": total, "norm": norm.item(), "clipped": clipped, "blocks": [math.sqrt(s) for s in squares]}


def run(order):
    config = order["config"] | {"gradient_clipping": order["clip"], "zero_allow_untested_optimizer": True}
    model = new_model()
    groups = parameter_groups(model, 0.0)
    optimizer = build_optimizer("SGD", SGD, groups) if order["optimizer"] == "SGD" else None
    engine = Engine(model, optimizer, groups, None, config, device)
    seen = {"gradients": set(), "master gradients": set()}
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen["gradients"].add(str(gradient.dtype)))
    masters = [master for master, _ in engine._masters()]
    applied = []

    def note(inner, *_):  # ZeRO steps one group after the other
        divisor = getattr(inner, "grad_scale", 1.0)  # which clips them in the kernel
        for gradient in (master.grad for group in inner.param_groups for master in group["params"]):
            if gradient is not None:
                seen["master gradients"].add(str(gradient.dtype))
                applied.append((gradient / divisor).double().square().sum())

    engine.follow_block_norms(lambda name: layer_of(name, DEPTH), DEPTH + 2)
    inner = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
    inner.register_step_pre_hook(note)
    plain, steps = PlainLoop(order, engine.dtype), []
    for number in range(order["steps"]):
        applied.clear()
        scale, total = engine.loss_scale, torch.zeros((), dtype=torch.float64, device=device)
        mine, _ = micro_batches(order, number)
        for part in mine:
            loss = cross_entropy(engine(images_BCHW[part].to(engine.dtype)), labels[part])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(mine)
        (is_applied,) = engine.outcomes()
        square = mean_over_ranks(sum(applied)) if is_applied else math.nan
        square *= 1 if engine.zero_stage == 0 else world.world_size  # a rank applies its part
        got = {"loss": mean_over_ranks(total), "norm": engine.grad_norm, "clipped": math.sqrt(square)}
        got["blocks"] = list(engine.block_norms().values())
        steps.append(
            {"engine": got, "plain": plain.step(number, scale, is_applied), "scale": scale, "applied": is_applied}
        )
    parameters = {str(getattr(p, "ds_tensor", p).dtype) for p in model.parameters()}
    dtypes = {"parameters": sorted(parameters), "masters": sorted({str(m.dtype) for m in masters})}
    finite = all(bool(torch.isfinite(master).all()) for master in masters)
    return {"steps": steps, "dtypes": dtypes | {k: sorted(v) for k, v in seen.items()}, "finite": finite}


told = {case: run(order) for case, order in json.loads(sys.argv[1]).items()}
print(json.dumps(told))
