"""Weights of any kind with nothing loaded: a file in a known layout, or a checkpoint of any ZeRO stage. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vitds.errors import WeightError
from vitds.model.positions import sincos2d_positions
from vitds.model.registry import grid_size
from vitds.weights.convert import to_parameters
from vitds.weights.npz import load_npz
from vitds.weights.torch_files import open_arrays
from vitds.weights.zero import open_checkpoint
from vitds.weights_header import WeightsHeader, read_header, resolve_checkpoint

NOT_FINITE = "holds a NaN or an infinity: the run diverged, or the file is damaged"


@dataclass(frozen=True)
class OpenWeights:
    """fp32 parameters by our names, each made anew when it is looked up, and what they are of."""

    arrays: Mapping[str, np.ndarray]
    header: WeightsHeader


def open_weights(path: str | Path, model: str | None = None, *, ema: bool = False) -> OpenWeights:
    """Open a weights file or a checkpoint, `ema` for the average that its run kept; `model` as in `read_header`.

    Raises: WeightError or CheckpointError when it is missing, damaged, unsafe, or not of `model`, or keeps no average.
    """
    header = read_header(path, model)
    spec = header.spec
    if header.format == "checkpoint":
        parameters = open_checkpoint(resolve_checkpoint(path), "ema" if ema else "master")
    elif ema:
        raise WeightError("an average of the weights is in checkpoints only", where=str(path), fix="leave out --ema")
    else:
        stored = load_npz(header.files[0]) if header.format == "npz" else open_arrays(header)
        parameters = to_parameters(stored, header.arrays)
    if spec.positions == "sincos2d":  # a run in 16 bits keeps frozen parameters rounded
        grid_hw, has_class_token = grid_size(spec, header.image_size), spec.pooling == "token"
        parameters = parameters.replaced("pos_embed", partial(sincos2d_positions, grid_hw, spec.width, has_class_token))
    return OpenWeights(parameters, header)
