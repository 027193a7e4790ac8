"""Google's .npz arrays to our parameters: renaming and moving axes, never arithmetic, so that every bit survives.

`vitds.weights_header.google_layout` says which array is which parameter; here stands how its axes move.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitds.errors import WeightError
from vitds.model.registry import ModelSpec
from vitds.weights_header import GoogleArray, google_layout


def load_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an .npz, without unpickling anything; `read_header` has checked names, shapes and types before.

    Raises: WeightError when an array is damaged, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, AttributeError) as error:
        raise WeightError(f"cannot be read: {error}", where=str(path)) from None


def state_dict_from_npz(arrays: dict[str, np.ndarray], spec: ModelSpec) -> dict[str, Tensor]:
    """Our state dict of `spec`, from arrays in Google's layout with any grid, classes and pre_logits."""
    num_positions = arrays["Transformer/posembed_input/pos_embedding"].shape[1]
    pre_logits = arrays["pre_logits/bias"].shape[0] if "pre_logits/bias" in arrays else None
    parts = defaultdict(list)
    for entry in google_layout(spec, num_positions, arrays["head/bias"].shape[0], pre_logits):
        parts[entry.name].append(_to_parameter(arrays[entry.key].reshape(entry.shape), entry))
    # Query, key and value come in this order, and each fills its run of rows, head by head.
    return {name: torch.from_numpy(np.concatenate(rows)) for name, rows in parts.items()}


def _to_parameter(array: np.ndarray, entry: GoogleArray) -> np.ndarray:
    """Move the axes of one array; q, k and v are thirds of a fused parameter's rows.

    Shapes: convolution (H, W, I, O) -> (O, I, H, W); dense (I, O) -> (O, I); query (I, N, K) -> (N*K, I);
    out (N, K, O) -> (O, N*K); query bias (N, K) -> (N*K,); GroupNorm (1, 1, 1, C) -> (C,); cls, positions unchanged.
    """
    if not entry.key.endswith("kernel"):
        return array if entry.name in ("cls_token", "pos_embed") else array.reshape(-1)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    matrix = array.reshape(-1, array.shape[-1]) if entry.heads_first else array.reshape(array.shape[0], -1)
    return matrix.T
