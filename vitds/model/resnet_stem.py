"""The ResNet stem of the hybrid models: image -> feature map, as Google's BiT-style ResNet computes it.

Source: google-research/vision_transformer, vit_jax/models_resnet.py and the root in models_vit.py. Modules carry the
names of Google's parameter tree (conv_root, block1.unit1.gn3, ...), so that conversion is renaming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill a kernel as flax does by default: truncated normal with variance 1 / fan_in.

    Source: jax.nn.initializers.lecun_normal; 0.8796 is the standard deviation left after cutting at two sigma.
    """
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad height and width as XLA's SAME does: ceil(size / stride) come out, an odd pixel goes right and below."""

    def sides(size: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    padding = (*sides(x.shape[-1]), *sides(x.shape[-2]))
    return F.pad(x, padding, value=value) if any(padding) else x


def _last_digits_count(module: nn.Module, x: Tensor) -> bool:
    """True for inference in float32, which is held to Google's numbers; training is held to speed and memory."""
    is_training = module.training and torch.is_grad_enabled()
    return not is_training and x.dtype == torch.float32 and x.device.type in ("cpu", "cuda")


class StdConv(nn.Conv2d):
    """A convolution without bias whose kernel is standardised per output channel before use."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def reset_parameters(self) -> None:
        """Draw the kernel as flax does."""
        lecun_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        # Google adds epsilon to the deviation, not to the variance. 16 bits could not hold the difference.
        exact = torch.float64 if _last_digits_count(self, self.weight) else torch.float32
        weight = self.weight.to(torch.promote_types(self.weight.dtype, exact))
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = ((weight - mean) / (std + 1e-5)).to(self.weight.dtype)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class GroupNorm(nn.GroupNorm):
    """Group normalisation as flax has it by default: 32 groups, epsilon 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C, H, W)."""
        if not _last_digits_count(self, x):
            return super().forward(x)
        # torch's own kernel is faster and saves memory, but folds the mean into the offset: two large numbers that
        # nearly cancel. Over fifty layers that costs a third of the digits that hybrids are promised.
        groups = x.unflatten(1, (self.num_groups, -1))
        var, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
        weight, bias = (p.view(1, self.num_groups, -1, 1, 1) for p in (self.weight, self.bias))
        return ((groups - mean) * (torch.rsqrt(var + self.eps) * weight) + bias).flatten(1, 2)


class BottleneckUnit(nn.Module):
    """A post-activation bottleneck: 1x1, 3x3 (strided), 1x1 to four times `inner` channels, plus the residual."""

    def __init__(self, in_channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = 4 * inner
        self.conv1, self.gn1 = StdConv(in_channels, inner, 1), GroupNorm(inner)
        self.conv2, self.gn2 = StdConv(inner, inner, 3, stride), GroupNorm(inner)
        self.conv3, self.gn3 = StdConv(inner, outer, 1), GroupNorm(outer)
        nn.init.zeros_(self.gn3.weight)  # a new unit is the identity on its residual
        self.projects = in_channels != outer or stride != 1
        if self.projects:
            self.conv_proj, self.gn_proj = StdConv(in_channels, outer, 1, stride), GroupNorm(outer)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, 4 * inner, H / stride, W / stride)."""
        residual = self.gn_proj(self.conv_proj(x)) if self.projects else x
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return F.relu(residual + y)


class ResNetStem(nn.Sequential):
    """Root (7x7 convolution, max-pool) and stages of bottleneck units; `out_channels` is the width of its map."""

    def __init__(self, in_channels: int, width: int, stages: tuple[int, ...]) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv_root=StdConv(in_channels, width, 7, stride=2), gn_root=GroupNorm(width), pool_root=_RootPool()
        )
        channels = width
        for stage, num_units in enumerate(stages):
            inner = width * 2**stage
            units: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(num_units):
                stride = 2 if stage > 0 and unit == 0 else 1
                units[f"unit{unit + 1}"] = BottleneckUnit(channels, inner, stride)
                channels = 4 * inner
            layers[f"block{stage + 1}"] = nn.Sequential(units)
        super().__init__(layers)
        self.out_channels = channels

    def blocks(self) -> list[Callable[[Tensor], Tensor]]:
        """The root and every unit, in order: run one after the other they are `forward`."""
        conv, norm, pool, *stages = self.children()
        return [lambda x: pool(norm(conv(x))), *(unit for stage in stages for unit in stage.children())]


class _RootPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(pad_same(F.relu(x), 3, 2, value=-torch.inf), kernel_size=3, stride=2)
