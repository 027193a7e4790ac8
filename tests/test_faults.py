"""Errors of torch that become a user's, whatever their text is."""

import pytest
import torch
import torch._dynamo.exc as compiler

from vitds.errors import ConfigError, OutOfMemory, RankLost
from vitds.faults import fault_of


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "InternalTorchDynamoError"), ("\n \n", "InternalTorchDynamoError"), ("\n\n  no g++\n", "no g++")],
)
def test_a_failed_compilation_is_named_by_its_first_words_or_by_its_type(text, reason):
    fault = fault_of(compiler.InternalTorchDynamoError(text), rank=0)
    assert isinstance(fault, ConfigError) and fault.what == f"torch.compile failed: {reason}"
    assert "--compile false" in str(fault)


@pytest.mark.parametrize(
    ("error", "kind", "what"),
    [
        (torch.OutOfMemoryError(), OutOfMemory, "no memory left"),
        (MemoryError(), OutOfMemory, "no memory left"),
        (
            RuntimeError("[enforce fail at a.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: 2. Error 12"),
            OutOfMemory,
            "DefaultCPUAllocator: can't allocate memory: 2",
        ),
        (
            RuntimeError("\n\nNCCL error: remote process exited"),
            RankLost,
            "rank 1 lost contact with another rank: NCCL",
        ),
    ],
)
def test_a_fault_says_something_where_the_error_says_nothing_in_its_first_line(error, kind, what):
    fault = fault_of(error, rank=1)
    assert isinstance(fault, kind) and fault.what.startswith(what)


@pytest.mark.parametrize("error", [RuntimeError(), ValueError("NCCL")])
def test_other_errors_are_left_as_they_are(error):
    assert fault_of(error, rank=0) is None
