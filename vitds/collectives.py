"""What the ranks tell each other outside the engine: small objects, verdicts and sums."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# One rank may write for long while the others wait; a rank that is lost is found by the watchdog.
_PATIENCE = timedelta(hours=2)


def world_size() -> int:
    """Number of ranks; 1 when no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank's number; 0 when no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_group() -> Any:
    """A group of all ranks over the CPU, for the collectives of another thread; collective."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size() > 1 else None


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, group: Any = None) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
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
