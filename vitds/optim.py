"""Which parameters train, with which weight decay, under which optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitds.errors import ConfigError


def select_trainable(model: nn.Module, train: str) -> None:
    """Freeze everything that `train` does not name: "all", "head", or "last-K" (the last K blocks, final norm, pooling and head).

    Raises: ConfigError when the model has fewer than K blocks.
    """
    if train == "all":
        return
    prefixes = ["head."]
    if train.startswith("last-"):
        depth, last = len(model.blocks), int(train.removeprefix("last-"))
        if not 0 < last <= depth:
            raise ConfigError(f'--train {train}: the model has {depth} blocks', fix=f"write last-1 to last-{depth}, head or all")
        prefixes += ["norm.", "attn_pool."] + [f"blocks.{index}." for index in range(depth - last, depth)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))


def parameter_groups(model: nn.Module, weight_decay: float, decay_on: str = "matrices") -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group, by the order of `named_parameters`.

    "matrices" decays the kernels of linear and convolution layers, and neither gains, biases, tokens nor position
    embeddings; "all" decays every parameter.
    """
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = name.endswith("weight") and parameter.ndim >= 2
            (decayed if is_matrix or decay_on == "all" else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(kind: str, params: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A fused torch optimizer from DeepSpeed's names: "AdamW", "Adam" (which DeepSpeed decouples unless adam_w_mode is false), "SGD".

    DeepSpeed runs it on each rank's flat fp32 partition, so "fused" is one kernel a group, and nothing is compiled.
    """
    params = dict(params)
    params.pop("torch_adam", None)
    params.pop("bias_correction", None)
    adam_w_mode = params.pop("adam_w_mode", True)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(
        kind.lower(), torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    )
    return optimizer(groups, fused=True, **params)
