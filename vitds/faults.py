"""Faults that a user can act on, recognised in what torch raises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vitds.errors import ConfigError, OutOfMemory, RankLost, VitdsError, first_line

# How torch's back ends say that a peer is gone, and that a CPU's memory is full.
_LOST_CONTACT = ("closed by peer", "Connection reset", "Broken pipe", "NCCL", "Timed out waiting")
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


@contextmanager
def faults_named(rank: int, explain: Callable[[OutOfMemory], None] | None = None) -> Iterator[None]:
    """Give out of memory, a lost peer and a failed compilation their names and exit codes.

    `explain` adds to out of memory where it was and what would fit.
    Raises: OutOfMemory, RankLost, ConfigError; whatever else comes passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        fault = fault_of(error, rank)
        if fault is None:
            raise
        if explain is not None and isinstance(fault, OutOfMemory):
            explain(fault)
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
            f"torch.compile failed: {first_line(error)}",
            fix="it needs a C++ compiler on a CPU (g++, or CXX=PATH), and Triton on a GPU; VITDS_TRACE=1 shows more\n"
            "--compile false trains without it (DeepSpeed's Muon cannot)",
        )
    if any(sign in str(error) for sign in _LOST_CONTACT):
        return RankLost(
            f"rank {rank} lost contact with another rank: {first_line(error)}",
            fix="unless another rank names a reason, start again: training goes on from its checkpoint",
        )
    return None


def _out_of_memory(error: BaseException) -> OutOfMemory:
    sentences = [text for text in str(error).split(". ") if not text.startswith("[enforce fail")]  # a line of torch's
    return OutOfMemory(
        next(iter(sentences), "") or "no memory left",
        fix="lower --micro-batch-size (the global batch stays), or add --activation-checkpointing full\n"
        "in an evaluation, lower --batch-size",
    )
