"""Which of torch's back ends computes attention: left to torch, or chosen, and then checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitds.errors import ConfigError, first_line
from vitds.model.registry import ModelSpec, num_tokens

_SWITCHES: dict[str, Callable[[bool], None]] = {  # of the whole process, the CPU's back ends too
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
BACK_ENDS = ("auto", *_SWITCHES)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # a few roundings, of the largest number


def choose_attention(
    name: str, spec: ModelSpec, image_size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Let torch take one back end for attention from here on in this process, or any of them ("auto").

    Not by a context around each call: what activation checkpointing computes again must be the same. Before a back end
    is used, its result and gradients at the model's own shape are compared with attention by its formula in fp32.

    Raises: ConfigError when it cannot compute that here, or computes something else.
    """
    switch_attention(name)
    if name == "auto":
        return
    shape_BNTK = 2, spec.heads, num_tokens(spec, image_size), spec.width // spec.heads
    try:
        deviation = deviation_of(F.scaled_dot_product_attention, shape_BNTK, dtype, device)
        fault = "" if deviation <= _TOLERANCE[dtype] else f"is off by {deviation:.2g} of the largest number"
    except RuntimeError as error:
        fault = f"does not run on this device: {first_line(error)}"
    if fault:
        switch_attention("auto")
        what = f"{name} attention {fault}; queries {shape_BNTK}, {str(dtype).removeprefix('torch.')}"
        raise ConfigError(what, where='"vitds.attention"', fix="auto lets torch choose")


def switch_attention(name: str) -> None:
    """The same unchecked, for a back end that has been checked."""
    for other, enable in _SWITCHES.items():
        enable(name in (other, "auto"))


def deviation_of(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape_BNTK: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """How far attention and its gradients are from the formula in fp32, each relative to its largest number."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    tensors = [torch.randn(shape_BNTK, generator=generator, device=device).to(dtype) for _ in range(4)]

    def result_and_gradients(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(kind).requires_grad_() for tensor in tensors[:3]]
        result = function(*inputs)
        return [result.detach(), *torch.autograd.grad(result, inputs, tensors[3].to(kind))]

    def formula(q_BNTK: Tensor, k_BNTK: Tensor, v_BNTK: Tensor) -> Tensor:
        return (q_BNTK @ k_BNTK.transpose(-2, -1) / math.sqrt(shape_BNTK[-1])).softmax(dim=-1) @ v_BNTK

    pairs = zip(result_and_gradients(attend, dtype), result_and_gradients(formula, torch.float32), strict=True)
    deviations = [(found - expected).abs().max() / expected.abs().max() for found, expected in pairs]
    return float(torch.stack(deviations).max())  # NaN when one of them is
