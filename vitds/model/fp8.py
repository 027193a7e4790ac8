"""Linear layers that multiply in 8 bits: what is multiplied is rounded to fp8, what comes out is in bfloat16.

Inputs and weights become e4m3 (4 bits of exponent, 3 of mantissa), gradients e5m2, in all three matrix products of a
layer. Each tensor is scaled as a whole by its own largest number, of now: no history has to be saved and resumed.
Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitds.errors import ConfigError, first_line
from vitds.model.registry import ModelSpec, num_tokens

_NUMBERS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-20  # largest number of a tensor below which it counts as zeros: scales stay finite
# Of the norm of what fp32 gives. Rounding to e4m3 and e5m2 is off by 2.6 and 5.3 % (root mean square): 4 % of a result,
# 6 % of a gradient.
_TOLERANCE = 0.1

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x times the weight transposed plus bias, in bfloat16; products, forward and backward, in 8 bits.

    The weight may be gone between forward and backward, as at ZeRO stage 3, and in 8 bits is not kept.

    Shapes: x (R, K), weight (N, K), bias (N,) -> (R, N); K and N are multiples of 16, R is any number.
    """
    return _Fp8Linear.apply(x, weight, bias)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x8, x_scale = _rounded(x, _NUMBERS)
        ctx.save_for_backward(x8, x_scale, weight)
        # Hopper's fast sums keep fewer bits between partial sums: good enough for a result, not for gradients.
        return _product((x8, x_scale), _rounded(weight, _NUMBERS), bias=bias, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, weight = ctx.saved_tensors
        gradient8, scale = _rounded(gradient, _GRADIENTS)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            weight8, weight_scale = _rounded(weight, _NUMBERS)
            of_x = _product((gradient8, scale), (_transposed(weight8), weight_scale))
        if ctx.needs_input_grad[1]:
            of_weight = _product((_transposed(gradient8), scale), (_transposed(x8), x_scale))
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and the fp32 number that these are to be multiplied by.

    That is a power of two, so that scaling itself rounds nothing. What is not finite stays so, and spoils the rest.
    """
    largest = x.abs().amax().float().clamp(min=_SMALLEST)
    factor = torch.finfo(dtype).max / largest
    factor = (factor.view(torch.int32) & 0x7F800000).view(torch.float32)  # exponent alone: down to a power of two
    return (x * factor).to(dtype), factor.reciprocal()


def _transposed(x8: Tensor) -> Tensor:
    """With zeros up to a multiple of 16, since the rows will be summed over. Shapes: (R, K) -> (K, R')."""
    return F.pad(x8.t(), (0, -len(x8) % 16)).contiguous()


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """Both have the axis that is summed over last, as the hardware wants it. Shapes: (R, K), (N, K) -> (R, N)."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=torch.bfloat16, **options)


def check_fp8(spec: ModelSpec, image_size: tuple[int, int], device: torch.device) -> None:
    """Compare a layer in 8 bits with one in fp32, result and gradients, at each shape of the model's blocks.

    Raises: ConfigError when this device has no such products, or they are off by more than rounding explains.
    """
    num_rows, width = 2 * num_tokens(spec, image_size), spec.width
    for in_features, out_features in {(width, 3 * width), (width, width), (width, spec.mlp), (spec.mlp, width)}:
        try:
            deviation = deviation_of(fp8_linear, num_rows, in_features, out_features, device)
            fault = "" if deviation <= _TOLERANCE else f"are off by {deviation:.2g} of their norm"
        except RuntimeError as error:
            fault = f"do not run on this device: {first_line(error)}"
        if fault:
            what = f"products in 8 bits {fault}; {num_rows} rows of {in_features} to {out_features}"
            raise ConfigError(what, where='"vitds.fp8"', fix="false multiplies in 16 bits")


def deviation_of(linear: Linear, num_rows: int, in_features: int, out_features: int, device: torch.device) -> float:
    """How far a layer's result and gradients are from those in fp32, each relative to its norm."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    shapes = (num_rows, in_features), (out_features, in_features), (out_features,), (num_rows, out_features)
    tensors = [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]

    def result_and_gradients(function: Linear, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors[:3]]
        result = function(*inputs)
        return [result.detach(), *torch.autograd.grad(result, inputs, tensors[3].to(dtype))]

    pairs = zip(
        result_and_gradients(linear, torch.bfloat16), result_and_gradients(F.linear, torch.float32), strict=True
    )
    return float(torch.stack([(found - expected).norm() / expected.norm() for found, expected in pairs]).max())
