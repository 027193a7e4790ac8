"""The content of a DeepSpeed model file for weights that no run has written: what plain DeepSpeed reads module-only."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor


def model_states(state_dict: dict[str, Tensor], info: dict[str, Any]) -> dict[str, Any]:
    """What mp_rank_00_model_states.pt holds for fp32 weights alone; `info`, the manifest's, lies under "vitds".

    `load_checkpoint(..., load_module_only=True)` of plain DeepSpeed takes it at ZeRO stages 0 to 2; at stage 3 it loads
    nothing from any checkpoint that way.

    Source: deepspeed/runtime/engine.py, _save_checkpoint.
    """
    return {
        # Tensors of their own: a view would drag the whole of its storage into the file.
        "module": {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state_dict.items()},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(tensor.shape) for name, tensor in state_dict.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": 0,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version("deepspeed"),
        "vitds": dict(info),
    }
