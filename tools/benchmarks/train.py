"""Measure training steps of vitds beside plain PyTorch, timm and Hugging Face's ViT, on one device.

All variants hold the same weights, take the same batch, clip at norm 1 and update with fused AdamW; before any time is
taken each makes three updates, and their losses must agree. They differ in the model (vitds', timm's, Hugging Face's)
and in the loop:

  ZeRO-N       vitds' engine, DeepSpeed, at this stage: in 16 bits with fp32 masters
  plain loop   the same without DeepSpeed, as one writes it in PyTorch
  timm's loop  fp32 parameters under autocast, as timm's train.py has it; in fp32 that is the plain loop

With --token-drop and --drop-path, vitds' model runs in the plain loop once more with each: what they leave out is to
save time, and their losses are others.
With --compile vitds' model is there twice, with blocks that are compiled and with blocks that are not; with --fp8 once
more in 8 bits, checked first, and compiled where the others are: its losses may be others, too.

Beside them run the matrix products of the blocks' linear layers, forward and backward, at the model's shapes: what this
device makes of nothing else. Operations are counted by vitds/flops.py, three forwards an image. On a GPU the wall time
counts, on a CPU the CPU time; memory is measured on a GPU only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.rounds import Costs, Figure, check_losses, interleaved, median_figure, rate, ratios, speedup
from vitds.arguments import positive
from vitds.engine import Engine, start_ranks
from vitds.errors import UsageError, first_line
from vitds.flops import TRAINING_FACTOR, forward_flops, peak_flops
from vitds.loss import cross_entropy
from vitds.model.attention_backend import BACK_ENDS, choose_attention
from vitds.model.fp8 import check_fp8
from vitds.model.precision import DTYPES
from vitds.model.registry import ModelSpec, get_spec, num_tokens
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.run_directory import device_name
from vitds.weights.create import create_model
from vitds.weights.export.target import export_weights
from vitds.weights.open import OpenWeights
from vitds.weights_header import WeightsHeader
from vitds.world import World

_NUM_CLASSES = 1000
_ADAMW = {"lr": 1e-3, "weight_decay": 0.05}
_CLIP = 1.0
_NUM_CHECKED = 3  # updates before the first round, whose losses are compared
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}  # relative, between those losses
_PRODUCTS = "matrix products"
_TAX_BOUND = {"cuda": 2.0, "cpu": 10.0}  # percent that the engine may add to a step

Step = Callable[[], Tensor]  # makes one update, and gives the loss before it


@dataclass
class Variant:
    """A model in a loop, the losses of its first steps, and the memory that it has between steps and at most in one."""

    step: Step
    losses: list[float]
    state_bytes: int
    peak_bytes: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="ViT-B_16", help="which is trained (ViT-B_16)")
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="pixels (224)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="images of a step (8)")
    parser.add_argument("--precision", default="bf16", choices=tuple(DTYPES), help="(bf16)")
    parser.add_argument(
        "--zero-stages", type=int, nargs="+", default=[1], choices=range(4), help="of the engine, each a variant (1)"
    )
    parser.add_argument(
        "--activation-checkpointing", default="none", metavar="MODE", help="none, selective, full or K; peers: full"
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        type=lambda mode: "default" if mode == "true" else mode,
        choices=("default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"),
        metavar="MODE",
        help="variants of vitds with compiled blocks too, by torch.compile's default or one of its modes"
        " max-autotune-no-cudagraphs, reduce-overhead and max-autotune; the last two have CUDA graphs, which training"
        " refuses",
    )
    parser.add_argument("--fp8", action="store_true", help="variants of vitds whose blocks multiply in 8 bits too")
    parser.add_argument("--attention", default="auto", choices=BACK_ENDS, help="of all variants, checked first (auto)")
    parser.add_argument(
        "--token-drop", type=float, default=0.0, metavar="R", help="a variant that leaves out tokens (0)"
    )
    parser.add_argument("--drop-path", type=float, default=0.0, metavar="R", help="two more: by sample, by subset (0)")
    parser.add_argument("--steps", type=positive, default=1, metavar="N", help="of a variant in a round (1)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="variants with one of these in their name, as ZeRO-1"
    )


def measure(args: argparse.Namespace, progress: Progress) -> list[Figure]:
    """Run everything, and give the table's lines.

    Raises: VitdsError when variants that compute the same see other losses.
    """
    if 0 in args.zero_stages and args.precision != "fp32":
        raise UsageError("stage 0 in 16 bits updates wrongly in DeepSpeed", where="--zero-stages 0", fix="use stage 1")
    if args.fp8 and args.precision != "bf16":
        raise UsageError("fp8 is for bf16", where=f"--precision {args.precision}", fix="--precision bf16, or no --fp8")
    torch.manual_seed(0)
    device = start_ranks(World())
    spec = get_spec(args.model)
    choose_attention(args.attention, spec, (args.image_size, args.image_size), DTYPES[args.precision], device)
    if args.fp8:
        check_fp8(spec, (args.image_size, args.image_size), device)
    variants = _build(args, device, progress)
    alike = {name: variant.losses for name, variant in variants.items() if _computes_the_same(name, args)}
    if alike:
        check_losses(alike, _TOLERANCE[args.precision])
    products, num_product_flops = _matrix_products(spec, args, device)
    runs = {name: _run_of(variant, args.steps, device) for name, variant in variants.items()} | {_PRODUCTS: products}
    task = progress.add_task("training steps", total=(args.rounds + 1) * len(runs))
    costs = interleaved(runs, args.rounds, lambda: progress.advance(task))
    return _figures(args, spec, device, variants, costs, num_product_flops)


def _build(args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Variant]:
    """Every variant that was asked for, and whose model can be had, each in its own memory."""
    weights = _weights(args)
    images = torch.randn(args.batch, weights.header.spec.in_channels, args.image_size, args.image_size, device=device)
    batch = images, torch.randint(_NUM_CLASSES, (args.batch,), device=device)

    def engine(model: Callable[..., nn.Module], stage: int) -> Callable[[], Step]:
        return lambda: _engine_loop(model(weights, args), args, stage, device, *batch)

    def plain(model: Callable[..., nn.Module], is_autocast: bool = False) -> Callable[[], Step]:
        return lambda: _plain_loop(model(weights, args), args, is_autocast, device, *batch)

    makers = {f"vitds, ZeRO-{stage}": engine(_vitds, stage) for stage in args.zero_stages}
    makers |= {"vitds, plain loop": plain(_vitds), "timm, plain loop": plain(_timm)}
    if args.compile is not None:
        makers |= {f"vitds compiled, ZeRO-{stage}": engine(_compiled_vitds, stage) for stage in args.zero_stages}
        makers["vitds compiled, plain loop"] = plain(_compiled_vitds)
    if args.fp8:
        makers |= {f"vitds fp8, ZeRO-{stage}": engine(_fp8_vitds, stage) for stage in args.zero_stages}
        makers["vitds fp8, plain loop"] = plain(_fp8_vitds)
    if args.precision != "fp32":
        makers |= {"vitds, timm's loop": plain(_vitds, True), "timm, timm's loop": plain(_timm, True)}
    for what, options in _leaving_out(args).items():
        makers[f"vitds, plain loop, {what}"] = plain(partial(_vitds, **options))
    makers[f"Hugging Face, ZeRO-{args.zero_stages[0]}"] = engine(_hugging_face, args.zero_stages[0])

    makers = {name: make for name, make in makers.items() if any(text in name for text in args.only)}
    variants = {}
    for name, make in makers.items():
        others_bytes = _allocated_bytes(device)
        try:
            step = make()
        except (ImportError, UsageError) as error:
            get = f"; pip install {error.name}" if isinstance(error, ImportError) else ""
            progress.console.print(f"left out  {name}: {first_line(error)}{get}")
            continue
        losses = [float(step()) for _ in range(_NUM_CHECKED)]
        variants[name] = Variant(step, losses, _allocated_bytes(device) - others_bytes)
    if not variants:
        raise UsageError("no variant is left", where=f"--only {' '.join(args.only)}")
    return variants


def _weights(args: argparse.Namespace) -> OpenWeights:
    """Initial weights; the head's are not zero, or every loss would be that of a uniform guess."""
    model = create_model(args.model, args.image_size, _NUM_CLASSES)
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)
    arrays = {name: parameter.numpy() for name, parameter in model.state_dict().items()}
    return OpenWeights(arrays, WeightsHeader(model.spec, model.image_size, _NUM_CLASSES, None, "safetensors"))


def _leaving_out(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What vitds' model may leave out in training, by name, as options of it."""
    found: dict[str, dict[str, Any]] = {}
    if args.token_drop:
        found[f"token_drop {args.token_drop:g}"] = {"token_drop": args.token_drop}
    if args.drop_path:
        found[f"drop_path {args.drop_path:g}"] = {"drop_path": args.drop_path}
        found[f"drop_path {args.drop_path:g} by subset"] = {"drop_path": args.drop_path, "drop_path_subset": True}
    return found


def _left_out(name: str, args: argparse.Namespace) -> bool:
    return name.removeprefix("vitds, plain loop, ") in _leaving_out(args)


def _computes_the_same(name: str, args: argparse.Namespace) -> bool:
    return not _left_out(name, args) and not name.startswith("vitds fp8, ")


def _vitds(weights: OpenWeights, args: argparse.Namespace, **options: Any) -> VisionTransformer:
    model = create_model(args.model, args.image_size, _NUM_CLASSES, **options)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.arrays.items()})
    model.set_activation_checkpointing(args.activation_checkpointing)
    return model


def _compiled_vitds(weights: OpenWeights, args: argparse.Namespace) -> VisionTransformer:
    model = _vitds(weights, args)
    model.compile_blocks(args.compile)
    return model


def _fp8_vitds(weights: OpenWeights, args: argparse.Namespace) -> VisionTransformer:
    model = _vitds(weights, args) if args.compile is None else _compiled_vitds(weights, args)
    model.use_fp8()
    return model


def _timm(weights: OpenWeights, args: argparse.Namespace) -> nn.Module:
    """Raises: ImportError without timm, UsageError for an architecture that it lacks."""
    import timm

    with tempfile.TemporaryDirectory(prefix="vitds-timm-") as scratch:
        export_weights(weights, Path(scratch) / "weights", "timm")
        model = timm.create_model(f"local-dir:{scratch}/weights", pretrained=True)
    model.set_grad_checkpointing(args.activation_checkpointing != "none")
    return model


def _hugging_face(weights: OpenWeights, args: argparse.Namespace) -> nn.Module:
    """Raises: ImportError without transformers, UsageError for an architecture that it lacks."""
    from transformers import ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="vitds-hf-") as scratch:
        export_weights(weights, Path(scratch) / "weights", "hf")
        model = ViTForImageClassification.from_pretrained(f"{scratch}/weights")
    if args.activation_checkpointing != "none":
        model.gradient_checkpointing_enable()
    return _Logits(model)


class _Logits(nn.Module):
    """A model of Hugging Face that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, L)."""
        return self.model(images).logits


def _engine_loop(
    model: nn.Module, args: argparse.Namespace, stage: int, device: torch.device, images: Tensor, targets: Tensor
) -> Step:
    """As vitds/train.py runs it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": _CLIP,
        "zero_optimization": {"stage": stage},
    }
    if args.precision != "fp32":
        config |= {args.precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    groups = parameter_groups(model, _ADAMW["weight_decay"], "all")
    linear = nn.functional.linear
    engine = Engine(model, build_optimizer("AdamW", _ADAMW, groups), groups, None, config, device)
    own_linear, nn.functional.linear = nn.functional.linear, linear  # stage 3 sets one for the whole process
    images = images.to(engine.dtype)

    def step() -> Tensor:
        nn.functional.linear = own_linear
        engine.train()
        loss = cross_entropy(engine(images), targets)
        engine.backward(loss)
        engine.step()
        nn.functional.linear = linear
        return loss.detach()

    return step


def _plain_loop(
    model: nn.Module,
    args: argparse.Namespace,
    is_autocast: bool,
    device: torch.device,
    images: Tensor,
    targets: Tensor,
) -> Step:
    """In fp32 or under autocast the parameters are the masters, else masters stand beside parameters in 16 bits."""
    dtype = DTYPES[args.precision]
    masters = parameters = list(model.to(device).train().parameters())
    if not is_autocast and dtype is not torch.float32:
        masters = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        for master in masters:
            master.grad = torch.empty_like(master)
        parameters = list(model.to(dtype).parameters())
        images = images.to(dtype)
    optimizer = build_optimizer("AdamW", _ADAMW, [{"params": masters}])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=is_autocast):
            loss = cross_entropy(model(images), targets)
        scaler.scale(loss).backward()
        if parameters is not masters:
            torch._foreach_copy_([master.grad for master in masters], [p.grad for p in parameters])
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters, _CLIP)
        scaler.step(optimizer)
        scaler.update()
        if parameters is not masters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        model.zero_grad()
        return loss.detach()

    return step


def _matrix_products(spec: ModelSpec, args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], int]:
    """The linear layers of all blocks in one step: forward and both gradients, and their operations."""
    num_rows = args.batch * num_tokens(spec, (args.image_size, args.image_size))
    shapes = [(spec.width, out) for out in (3 * spec.width, spec.width, spec.mlp)] + [(spec.mlp, spec.width)]
    random = partial(torch.randn, dtype=DTYPES[args.precision], device=device)
    layers = [(random(num_rows, k), random(n, k), random(num_rows, n)) for k, n in shapes]

    def run() -> None:
        for _ in range(args.steps * spec.depth):
            for inputs, weight, gradient in layers:
                torch.mm(inputs, weight.t())
                torch.mm(gradient, weight)
                torch.mm(gradient.t(), inputs)
        _wait(device)

    return run, args.steps * spec.depth * sum(3 * 2 * num_rows * k * n for k, n in shapes)


def _run_of(variant: Variant, num_steps: int, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        others_bytes = _allocated_bytes(device) - variant.state_bytes
        for _ in range(num_steps):
            variant.step()
        _wait(device)
        if device.type == "cuda":
            variant.peak_bytes = max(variant.peak_bytes, torch.cuda.max_memory_allocated() - others_bytes)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _figures(
    args: argparse.Namespace,
    spec: ModelSpec,
    device: torch.device,
    variants: dict[str, Variant],
    costs: Costs,
    num_product_flops: int,
) -> list[Figure]:
    on_gpu = device.type == "cuda"
    clock, second = ("wall_s", "s") if on_gpu else ("cpu_s", "CPU s")
    num_images = args.steps * args.batch
    num_flops = TRAINING_FACTOR * forward_flops(spec, (args.image_size, args.image_size), _NUM_CLASSES) * num_images
    peak = peak_flops(device_name())

    figures = [rate(costs, _PRODUCTS, num_product_flops / 1e12, f"TFLOP/{second}", clock)]
    for name, variant in variants.items():
        figures.append(rate(costs, name, num_images, f"images/{second}", clock))
        if _left_out(name, args):
            continue  # it makes fewer operations
        figures.append(rate(costs, name, num_flops / 1e12, f"TFLOP/{second}", clock))
        if peak is not None:
            figures.append(rate(costs, name, 100 * num_flops / peak, f"% of {peak / 1e12:g} TFLOP/s", clock))
        shares = [100 * num_flops / num_product_flops * ratio for ratio in ratios(costs, name, _PRODUCTS, clock)]
        figures.append(median_figure(name, shares, f"% of the {_PRODUCTS}'"))
        if on_gpu:
            figures.append(Figure(f"{name}, peak memory", variant.peak_bytes / 2**30, "GiB"))

    plain, autocast = "plain loop", "plain loop" if args.precision == "fp32" else "timm's loop"
    engines = [f"vitds, ZeRO-{stage}" for stage in args.zero_stages]
    for engine in engines:
        if {engine, f"vitds, {plain}"} <= variants.keys():
            tax = [100 * (ratio - 1) for ratio in ratios(costs, f"vitds, {plain}", engine, clock)]
            figures.append(median_figure(f"{engine} adds to the plain loop", tax, "%", _TAX_BOUND[device.type]))
    pairs: dict[tuple[str, str], float | None] = {
        (f"vitds, {plain}", f"timm, {plain}"): 1.0,
        (f"vitds, {autocast}", f"timm, {autocast}"): 1.0,
        (engines[0], f"timm, {autocast}"): 1.5 if on_gpu else None,
        (engines[0], f"Hugging Face, ZeRO-{args.zero_stages[0]}"): None,
    }
    pairs |= {(f"vitds, plain loop, {what}", "vitds, plain loop"): None for what in _leaving_out(args)}
    loops = [*(f"ZeRO-{stage}" for stage in args.zero_stages), plain]
    pairs |= {(f"vitds compiled, {loop}", f"vitds, {loop}"): None for loop in loops}
    in_16_bits = "vitds" if args.compile is None else "vitds compiled"
    pairs |= {(f"vitds fp8, {loop}", f"{in_16_bits}, {loop}"): None for loop in loops}
    for (ours, theirs), bound in pairs.items():
        if {ours, theirs} <= variants.keys():
            figures.append(speedup(costs, ours, theirs, bound=bound, clock=clock))
    return figures
