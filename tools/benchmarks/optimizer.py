"""Measure what layer-wise learning-rate decay, an average of the weights, and contiguous memory do to an update.

One rank, AdamW, engines side by side, which take turns: an update (engine.step) follows a forward and a backward of two
images. Under ZeRO each parameter group is a flat vector with its own kernels, and layer-wise decay makes up to
2 x (depth + 2) groups of two; the average is one more vector that every update reads and writes. Gradients lie in one
piece of memory with "contiguous_gradients", or each by itself.

Without ZeRO, torch's AdamW in its three forms (a loop over the parameters, "foreach", "fused") updates the model's
parameters as they are, and the same numbers as one contiguous tensor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.rounds import Figure, interleaved, median_figure, speedup
from vitds.engine import Engine, start_ranks
from vitds.optim import build_optimizer, decay_by_layer, parameter_groups
from vitds.weights.create import create_model
from vitds.world import World

_LR = 1e-4
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradients not contiguous": {"zero": {"contiguous_gradients": False}},
    "layer decay": {"layer_decay": 0.75},
    "average": {"ema_decay": 0.999},
    "layer decay and average": {"layer_decay": 0.75, "ema_decay": 0.999},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="ViT-B_16", help="which is trained (ViT-B_16)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels (224)")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(1, 2, 3), help="of the engine (1)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the weights (fp32)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    device = start_ranks(World())
    engines = {name: _engine(args, device, **changes) for name, changes in _VARIANTS.items()}
    images = torch.zeros(2, 3, args.image_size, args.image_size, device=device)
    updates_s: dict[str, list[float]] = {name: [] for name in engines}
    steps_s: dict[str, list[float]] = {name: [] for name in engines}
    task = progress.add_task("updates", total=(args.rounds + 1) * len(engines))
    names = list(engines)
    for number in range(-1, args.rounds):  # the first one makes the moments, and is not counted
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            engine, start = engines[name], _now(device)
            engine.backward(engine(images.to(engine.dtype)).float().square().mean())
            middle = _now(device)
            engine.step()
            end = _now(device)
            if number >= 0:
                updates_s[name].append(end - middle)
                steps_s[name].append(end - start)
            progress.advance(task)
    figures = [median_figure(f"update, {name}", updates_s[name], "s") for name in names]
    for name in names[1:]:
        ratios = [ours / plain for ours, plain in zip(updates_s[name], updates_s["plain"], strict=True)]
        figures.append(median_figure(f"update, {name} over plain", ratios, "times"))
    for name in names[1:]:
        added = [
            100 * (ours - plain) / step
            for ours, plain, step in zip(updates_s[name], updates_s["plain"], steps_s["plain"], strict=True)
        ]
        figures.append(median_figure(f"{name} adds to a step of two images", added, "%"))
    return figures + _without_zero(args, device, progress)


def _without_zero(args: argparse.Namespace, device: torch.device, progress: Progress) -> list[Figure]:
    """Updates of separate parameters and of one contiguous tensor, in fp32, with gradients that stay as they are."""
    model = create_model(args.model, image_size=args.image_size, num_classes=1000)
    separate = list(model.parameters())
    one = [torch.cat([parameter.detach().flatten() for parameter in separate])]

    def updates(parameters: list[torch.Tensor], form: str) -> Callable[[], None]:
        own = [parameter.detach().clone().to(device).requires_grad_() for parameter in parameters]
        for parameter in own:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(own, lr=_LR, foreach=form == "foreach", fused=form == "fused")
        return lambda: (optimizer.step(), _now(device), None)[-1]

    forms = ("loop", "foreach", "fused")
    runs = {f"{form} AdamW, separate": updates(separate, form) for form in forms}
    runs |= {f"{form} AdamW, one tensor": updates(one, form) for form in forms}
    task = progress.add_task("updates without ZeRO", total=(args.rounds + 1) * len(runs))
    costs = interleaved(runs, args.rounds, lambda: progress.advance(task))
    times = [median_figure(name, [cost.wall_s for cost in costs[name]], "s") for name in runs]
    pairs = ((f"{form} AdamW, one tensor", f"{form} AdamW, separate") for form in forms)
    return times + [speedup(costs, ours, theirs, clock="wall_s") for ours, theirs in pairs]


def _engine(
    args: argparse.Namespace,
    device: torch.device,
    layer_decay: float = 1.0,
    ema_decay: float = 0.0,
    zero: dict[str, bool] | None = None,
) -> Engine:
    model = create_model(args.model, image_size=args.image_size, num_classes=1000)
    groups = decay_by_layer(parameter_groups(model, 0.05), model, model.spec.depth, _LR, layer_decay)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.zero_stage} | (zero or {}),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": args.precision == "bf16"},
    }
    return Engine(model, build_optimizer("AdamW", {"lr": _LR}, groups), groups, None, config, device, ema_decay)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
