"""Which parameters train, with which weight decay, under which optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def select_trainable(model: nn.Module, train: str, depth: int) -> None:
    """Freeze what `train` does not name: "all", "head", or "last-K" (the last K of `depth` blocks and what follows)."""
    if train == "all":
        return
    prefixes = ["head."]
    if train.startswith("last-"):
        first = depth - int(train.removeprefix("last-"))
        prefixes += ["norm.", "attn_pool."] + [f"blocks.{index}." for index in range(first, depth)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))


def parameter_groups(model: nn.Module, weight_decay: float, decay_on: str = "matrices") -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group, by the order of `named_parameters`.

    "matrices" decays the kernels of linear and convolution layers, and neither gains, biases, tokens nor position
    embeddings; "all" decays every parameter.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = name.endswith("weight") and parameter.ndim >= 2
            (decayed if is_matrix or decay_on == "all" else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(kind: str, params: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A fused torch optimizer: "AdamW", "Adam" or "SGD", with torch's parameter names.

    DeepSpeed runs it on each rank's flat fp32 partition, so "fused" is one kernel a group, and nothing is compiled.
    """
    optimizers = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
    return optimizers[kind](groups, fused=True, **params)
