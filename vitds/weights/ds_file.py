"""DeepSpeed's files with torch: read without running code, and written for weights that no run has written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitds.errors import CheckpointError
from vitds.weights.zero import CHECKPOINT_STAND_INS, read_file

CHECKPOINT_SAFE_GLOBALS: list[Any] = [(stand_in, name) for name, stand_in in CHECKPOINT_STAND_INS.items()]


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


def safe_load(
    path: str | os.PathLike[str],
    map_location: Any = "cpu",
    safe_globals: Iterable[Any] = CHECKPOINT_SAFE_GLOBALS,
) -> Any:
    """Read one .pt file without running code from it; a resume passes DeepSpeed's real classes as `safe_globals`.

    Every name in it is looked up on our own closed list before torch's restricted unpickler, whose list is longer, sees
    it.

    Raises: CheckpointError when the file is missing or damaged, or holds an object that is not on the allow-list.
    """
    read_file(Path(path))
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            # Not mapped: what an engine on the CPU keeps of it would hold the file after its checkpoint was deleted.
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # of many kinds, and none of them means that the file is whole
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise CheckpointError(f"cannot be read: {reason}", where=str(path)) from None
