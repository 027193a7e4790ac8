"""Which parameters train, at which rate, with which weight decay, under which optimizer."""

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


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter: 0 is all before the first block, i + 1 is block i, depth + 1 what follows the last.

    Source: BEiT (optim_factory.py, get_num_layer_for_vit) and MAE (util/lr_decay.py). timm differs in one thing: the
    final norm has the rate of the last block there.
    """
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("norm.", "attn_pool.", "head.")) else 0


def decay_by_layer(
    groups: list[dict[str, Any]], model: nn.Module, depth: int, lr: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Split groups by layer, each with the learning rate lr * layer_decay ** (depth + 1 - layer); 1 splits nothing.

    At most len(groups) x (depth + 2) groups come back, by rising layer: under ZeRO every group is a flat vector with
    its own padding and communication, so there is none for a single parameter.
    Source: layer-wise learning rate decay as in BEiT (Bao et al. 2022) and MAE (He et al. 2022) fine-tuning.
    """
    if layer_decay == 1:
        return groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    split: list[dict[str, Any]] = []
    for layer in range(depth + 2):
        for group in groups:
            members = [parameter for parameter in group["params"] if layer_of(names[parameter], depth) == layer]
            if members:
                split.append(group | {"params": members, "lr": lr * layer_decay ** (depth + 1 - layer)})
    return split


def build_optimizer(kind: str, params: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A fused torch optimizer: "AdamW", "Adam" or "SGD", with torch's parameter names.

    DeepSpeed runs it on each rank's flat fp32 partition, so "fused" is one kernel a group, and nothing is compiled.
    """
    optimizers = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
    return optimizers[kind](groups, fused=True, **params)
