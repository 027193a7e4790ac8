"""What a transformer block is made of: dense layers, attention, MLP, and the pooling head that attends.

Numbers follow Google's ViT: LayerNorm before each half with epsilon 1e-6, tanh GELU, dropout after the attention's
output, after the GELU and after the second dense layer, and none on the attention probabilities.
Source: google-research/vision_transformer, vit_jax/models_vit.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitds.model.activation_checkpointing import ActivationCheckpointing
from vitds.model.fp8 import fp8_linear
from vitds.model.registry import ModelSpec, draws_subset
from vitds.model.resnet_stem import NORM_EPS


class Dense(nn.Linear):
    """A linear layer with Google's initial values: xavier-uniform kernel, bias zero or nearly so.

    `fused` is the number of matrices stacked in the weight (3: query, key, value); each is drawn as if it stood alone.
    With `is_fp8` set, training multiplies in 8 bits.
    """

    is_fp8 = False

    def __init__(self, in_features: int, out_features: int, fused: int = 1, bias_std: float = 0.0) -> None:
        self.fused, self.bias_std = fused, bias_std  # before super(), which draws the initial values
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the initial values."""
        bound = math.sqrt(6 / (self.in_features + self.out_features / self.fused))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.normal_(self.bias, std=self.bias_std)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in_features) -> (..., out_features)."""
        # As one matrix: with more axes, DeepSpeed's linear of ZeRO stage 3 adds the bias in place to the product. That
        # product is what selective activation checkpointing keeps, so the second pass would add the bias once more.
        rows = x.flatten(0, -2)
        is_fp8 = self.is_fp8 and self.training
        result = fp8_linear(rows, self.weight, self.bias) if is_fp8 else super().forward(rows)
        return result.unflatten(0, x.shape[:-1])


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis; the default epsilon is Google's."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__(width, eps=eps)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch, which starts small."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Draw the samples that keep a residual branch; `add_branch` leaves it out for the others.

    Each sample is drawn by itself, and the branch computed for all; `by_subset`, where the rate is above 0.1, a part of
    a fixed size is drawn, and the branch computed for no other sample.
    Source: Huang et al., "Deep Networks with Stochastic Depth" (2016); facebookresearch/dinov2, layers/block.py.
    """

    def __init__(self, rate: float, by_subset: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.by_subset = by_subset and draws_subset(rate)

    def forward(self, x: Tensor) -> Tensor | None:
        """What `add_branch` takes beside the samples x (B, ...); None where all keep the branch."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        if self.by_subset:
            num_kept = max(round(len(x) * keep), 1)  # never none: a rank without the branch would leave collectives out
            return torch.randperm(len(x), device=x.device)[:num_kept]
        is_kept = torch.rand(len(x), 1, 1, device=x.device) < keep
        return is_kept.to(torch.promote_types(x.dtype, torch.float32)) / keep  # 16 bits would round the mean off


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor | None) -> Tensor:
    """x plus a residual branch, for the samples that `DropPath` drew, scaled up to keep the mean.

    Shapes: x (B, T, D); kept (B, 1, 1) factors of the branch, or (B',) numbers of the samples that it is computed for;
    -> (B, T, D).
    """
    if kept is None:
        return x + branch(x)
    if kept.dtype == torch.int64:
        return x.index_add(0, kept, (branch(x[kept]) * (len(x) / len(kept))).to(x.dtype))
    return (x + branch(x) * kept).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value in one matrix."""

    def __init__(self, spec: ModelSpec, dropout: float = 0.0) -> None:
        super().__init__()
        width, heads = spec.width, spec.heads
        self.heads = heads
        self.qkv = Dense(width, 3 * width, fused=3)
        self.q_norm = LayerNorm(width // heads, spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width // heads, spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.proj = Dense(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, D) -> (B, T, D)."""
        q_BNTK, k_BNTK, v_BNTK = self._project(x)
        out_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        return self.dropout(self.proj(_merge_heads(out_BNTK)))

    def probabilities(self, x: Tensor) -> Iterator[Tensor]:
        """One head's attention matrix after the other: how much each token (row) takes from each (column).

        `forward` never builds them; for a large image all heads together would be gigabytes.

        Shapes: (B, T, D) -> N times (B, T, T).
        """
        q_BNTK, k_BNTK, _ = self._project(x)
        for q_BTK, k_BTK in zip(q_BNTK.unbind(1), k_BNTK.unbind(1), strict=True):
            yield (q_BTK @ k_BTK.transpose(-2, -1) / math.sqrt(q_BTK.shape[-1])).softmax(dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTK, k_BNTK, v_BNTK = _split_heads(self.qkv(x), 3, self.heads)
        return self.q_norm(q_BNTK), self.k_norm(k_BNTK), v_BNTK


class Mlp(nn.Module):
    """Two dense layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Dense(width, hidden, bias_std=1e-6)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = Dense(hidden, width, bias_std=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D)."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm encoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    `recomputes_itself` is True where activation checkpointing is part of what was compiled.
    """

    def __init__(self, spec: ModelSpec, dropout: float = 0.0, drop_path: float = 0.0, by_subset: bool = False) -> None:
        super().__init__()
        width, scale = spec.width, spec.layer_scale
        self.norm1 = LayerNorm(width, spec.norm_eps)
        self.attn = Attention(spec, dropout)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = LayerNorm(width, spec.norm_eps)
        self.mlp = Mlp(width, spec.mlp, spec.gelu, dropout)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path = DropPath(drop_path, by_subset)
        self._compiled: Callable[..., Tensor] | None = None
        self.recomputes_itself = False

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, D) -> (B, T, D)."""
        kept = self.drop_path(x), self.drop_path(x)
        if self._compiled is None or not self.training:
            return self._compute(x, *kept)
        for drawn in kept:
            if drawn is not None and drawn.dtype == torch.int64:
                torch._dynamo.mark_dynamic(drawn, 0)  # each block has a length of its own
        return self._compiled(x, *kept)

    def compile_training(self, checkpointing: ActivationCheckpointing, **options: Any) -> None:
        """Compile in place what the block computes in training, with options of `torch.compile`.

        Names and state stay as they are. Drop-path draws outside, so that blocks of any rate share their code; so do
        the hooks by which ZeRO stage 3 gathers parameters. Selective checkpointing, which sees operators one by one as
        they run, is compiled too.
        """

        def compute(x: Tensor, *kept: Tensor | None) -> Tensor:
            if checkpointing.selective:
                return checkpointing.run_twice(self._compute, x, *kept)
            return self._compute(x, *kept)

        if checkpointing.selective:  # torch warns of operators that work in place, of which a block has none
            logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        # Shapes are fixed or dynamic from the start: torch would choose by what earlier calls, and runs, were given.
        self._compiled = torch.compile(compute, fullgraph=True, dynamic=False, **options)
        self.recomputes_itself = checkpointing.selective

    @property
    def is_compiled(self) -> bool:
        """Whether `compile_training` was called."""
        return self._compiled is not None

    def _compute(self, x: Tensor, kept_attn: Tensor | None, kept_mlp: Tensor | None) -> Tensor:
        x = add_branch(x, lambda x: self.ls1(self.attn(self.norm1(x))), kept_attn)
        return add_branch(x, lambda x: self.ls2(self.mlp(self.norm2(x))), kept_mlp)


class AttentionPool(nn.Module):
    """One learned query attends over all tokens, followed by an MLP with a residual.

    Source: google-research/big_vision, models/vit.py, MAPHead; parameter names as in timm's AttentionPoolLatent.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        bound = math.sqrt(6 / (1 + spec.width))  # xavier-uniform over (1, D)
        self.latent = nn.Parameter(torch.empty(1, 1, spec.width).uniform_(-bound, bound))
        self.q = Dense(spec.width, spec.width)
        self.kv = Dense(spec.width, 2 * spec.width, fused=2)
        self.proj = Dense(spec.width, spec.width)
        self.norm = LayerNorm(spec.width, spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp, spec.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, D) -> (B, D)."""
        q_BN1K, k_BNTK, v_BNTK = self._project(x)
        pooled = self.proj(_merge_heads(F.scaled_dot_product_attention(q_BN1K, k_BNTK, v_BNTK)))[:, 0]
        return pooled + self.mlp(self.norm(pooled))

    def probabilities(self, x: Tensor) -> Tensor:
        """How much the query takes from each token. Shapes: (B, T, D) -> (B, N, T)."""
        q_BN1K, k_BNTK, _ = self._project(x)
        return (q_BN1K @ k_BNTK.transpose(-2, -1) / math.sqrt(q_BN1K.shape[-1])).softmax(dim=-1)[:, :, 0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (q_BN1K,) = _split_heads(self.q(self.latent.expand(x.shape[0], -1, -1)), 1, self.heads)
        k_BNTK, v_BNTK = _split_heads(self.kv(x), 2, self.heads)
        return q_BN1K, k_BNTK, v_BNTK


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Shapes: (B, T, parts * D) -> `parts` times (B, N, T, K)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(x_BNTK: Tensor) -> Tensor:
    """Shapes: (B, N, T, K) -> (B, T, D)."""
    return x_BNTK.transpose(1, 2).flatten(2)
