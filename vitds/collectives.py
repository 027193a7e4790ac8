"""What the ranks tell each other outside the engine: small objects, verdicts and sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 when no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank's number; 0 when no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_of_bits(value: int, device: torch.device) -> int:
    """The sum over the ranks of a number of 64 bits, modulo 2**64."""
    signed = (value + 2**63) % 2**64 - 2**63
    return int(sum_over_ranks(torch.tensor(signed, device=device)).item()) % 2**64


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over the ranks, in float64."""
    return sum_over_ranks(value.detach().to(torch.float64).reshape(())).item() / world_size()
