"""Measure the layers of a model one by one, forward and backward, at the shapes that training gives them.

The linear layers of a block as bare matrix products, each as a share of the fastest; attention by each back end of
torch that computes it here; and the patch embedding as vitds has it, a matrix product, beside the convolution that it
equals. What is measured here decides how the model is written and which `attention` a recipe should name. On a GPU the
wall time counts, on a CPU the CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from benchmarks.rounds import Clock, Costs, Figure, interleaved, median_figure, rate, ratios, speedup
from vitds.arguments import positive
from vitds.engine import start_ranks
from vitds.errors import ConfigError
from vitds.model.attention_backend import BACK_ENDS, choose_attention, switch_attention
from vitds.model.precision import DTYPES
from vitds.model.registry import ModelSpec, get_spec, grid_size, num_tokens
from vitds.model.vit import PatchEmbed
from vitds.world import World

Run = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="ViT-B_16", help="whose layers (ViT-B_16)")
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="pixels (224)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="images of a micro-batch (8)")
    parser.add_argument("--precision", default="bf16", choices=tuple(DTYPES), help="(bf16)")
    parser.add_argument("--steps", type=positive, default=1, metavar="N", help="of a layer in a round (1)")


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines."""
    torch.manual_seed(0)
    device = start_ranks(World())
    clock: Clock = "wall_s" if device.type == "cuda" else "cpu_s"
    second = "s" if device.type == "cuda" else "CPU s"
    spec, size = get_spec(args.model), (args.image_size, args.image_size)
    tera: dict[str, float] = {}  # operations of a round, in 1e12
    runs: dict[str, Run] = {}
    for part in (_products, _attention, _patch_embeddings):
        for name, (run, num_flops) in part(spec, size, args, device, progress).items():
            tera[name] = args.steps * num_flops / 1e12
            runs[name] = partial(_repeat, run, args.steps, device)
    task = progress.add_task("layers", total=(args.rounds + 1) * len(runs))
    costs = interleaved(runs, args.rounds, lambda: progress.advance(task))

    figures = [rate(costs, name, tera[name], f"TFLOP/{second}", clock) for name in runs]
    fastest = max(_PRODUCTS, key=lambda name: next(one.value for one in figures if one.name == name))
    figures += [_share(costs, name, fastest, tera, clock) for name in _PRODUCTS if name != fastest]
    chosen = [name for name in runs if name.startswith("attention, ") and name != "attention, auto"]
    figures += [speedup(costs, name, "attention, auto", clock=clock) for name in chosen]
    return [*figures, speedup(costs, "patches, product", "patches, convolution", clock=clock)]


_PRODUCTS = ("qkv", "proj", "fc1", "fc2")


def _share(costs: Costs, name: str, fastest: str, tera: dict[str, float], clock: Clock) -> Figure:
    values = [tera[name] / tera[fastest] * ratio for ratio in ratios(costs, name, fastest, clock)]
    return median_figure(f"{name}, its rate by that of {fastest}", values, "times")


def _repeat(run: Run, num_times: int, device: torch.device) -> None:
    for _ in range(num_times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _products(
    spec: ModelSpec, size: tuple[int, int], args: argparse.Namespace, device: torch.device, _: Progress
) -> dict[str, tuple[Run, float]]:
    """Of each linear layer of a block: the product and the two of its gradients."""
    num_rows = args.batch * num_tokens(spec, size)
    random = partial(torch.randn, dtype=DTYPES[args.precision], device=device)
    width, mlp = spec.width, spec.mlp
    found = {}
    for name, (k, n) in zip(_PRODUCTS, ((width, 3 * width), (width, width), (width, mlp), (mlp, width)), strict=True):
        inputs, weight, gradient = random(num_rows, k), random(n, k), random(num_rows, n)

        def run(inputs: Tensor = inputs, weight: Tensor = weight, gradient: Tensor = gradient) -> None:
            torch.mm(inputs, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), inputs)

        found[name] = run, 3 * 2.0 * num_rows * k * n
    return found


def _attention(
    spec: ModelSpec, size: tuple[int, int], args: argparse.Namespace, device: torch.device, progress: Progress
) -> dict[str, tuple[Run, float]]:
    """By each back end that computes it here as its formula says; two products forward, five backward are counted."""
    tokens = num_tokens(spec, size)
    shape = args.batch, spec.heads, tokens, spec.width // spec.heads
    dtype = DTYPES[args.precision]
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype, device=device)
    found = {}
    for name in BACK_ENDS:
        try:
            choose_attention(name, spec, size, dtype, device)
        except ConfigError as error:
            progress.console.print(f"left out  {error.what}")
            continue

        def run(name: str = name) -> None:
            switch_attention(name)
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

        found[f"attention, {name}"] = run, 7 * 2.0 * args.batch * spec.width * tokens**2
    switch_attention("auto")
    return found


def _patch_embeddings(
    spec: ModelSpec, size: tuple[int, int], args: argparse.Namespace, device: torch.device, _: Progress
) -> dict[str, tuple[Run, float]]:
    """Forward, and backward to its weights: images need no gradient."""
    (rows, columns), patch = grid_size(spec, size), spec.patch_size
    channels = spec.in_channels if spec.resnet is None else 4 * spec.resnet_width * 2 ** (len(spec.resnet) - 1)
    product = PatchEmbed(channels, spec.width, patch).to(device, DTYPES[args.precision])
    maps = torch.randn(args.batch, channels, rows * patch, columns * patch, dtype=product.weight.dtype, device=device)
    gradient = torch.randn(args.batch, rows * columns, spec.width, dtype=product.weight.dtype, device=device)
    parameters = list(product.parameters())

    def convolution(images: Tensor) -> Tensor:
        return F.conv2d(images, product.weight, product.bias, stride=patch).flatten(2).transpose(1, 2)

    def of(embed: Callable[[Tensor], Tensor]) -> Run:
        return lambda: (torch.autograd.grad(embed(maps), parameters, gradient), None)[1]

    num_flops = 2 * 2.0 * args.batch * rows * columns * channels * patch**2 * spec.width
    return {"patches, product": (of(product), num_flops), "patches, convolution": (of(convolution), num_flops)}
