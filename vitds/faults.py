"""Faults that a user can act on, recognised in what torch raises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vitds.errors import ConfigError, OutOfMemory, RankLost, VitdsError

# How torch's back ends say that a peer is gone, and that a CPU's memory is full.
_LOST_CONTACT = ("closed by peer", "Connection reset", "Broken pipe", "NCCL", "Timed out waiting")
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


@contextmanager
def faults_named(rank: int, memory_advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Give out of memory, a lost peer and a failed compilation their names and exit codes.

    `memory_advice` says what would fit.
    Raises: OutOfMemory, RankLost, ConfigError; whatever else comes passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        fault = fault_of(error, rank)
        if fault is None:
            raise
        if memory_advice is not None and isinstance(fault, OutOfMemory):
            fault.fix = memory_advice()
        raise fault from error


def fault_of(error: BaseException, rank: int) -> VitdsError | None:
    """The fault that an error of torch or Python means, None for any other error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return _out_of_memory(error)
    if not isinstance(error, RuntimeError):
        return None
    if any(sign in str(error) for sign in _NO_MEMORY):
        return _out_of_memory(error)
    compiler = sys.modules.get("torch._dynamo.exc")  # slow to import, and loaded where anything was compiled
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):
        return ConfigError(
            f"torch.compile failed: {_first_line(error)}",
            fix="it needs a C++ compiler on a CPU (g++, or CXX=PATH), and Triton on a GPU; VITDS_TRACE=1 shows more\n"
            "--compile false trains without it (DeepSpeed's Muon cannot)",
        )
    if any(sign in str(error) for sign in _LOST_CONTACT):
        return RankLost(
            f"rank {rank} lost contact with another rank: {_first_line(error)}",
            fix="unless another rank names a reason, start again: training goes on from its checkpoint",
        )
    return None


def _first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; the error's type where there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _out_of_memory(error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        str(error).split(". ")[0] or "no memory left",
        fix="lower --micro-batch-size (the global batch stays), or add --activation-checkpointing full\n"
        "in an evaluation, lower --batch-size",
    )
