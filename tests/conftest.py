"""Shared fixtures: real digits as shards, made once a session through the tool."""

import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import ROOT

from vitds import errors


@pytest.fixture(autouse=True)
def commands_end_by_an_exception(monkeypatch):
    """A command that a test calls in its own process raises `SystemExit`, also once deepspeed is imported."""
    monkeypatch.setattr(errors, "end_process", sys.exit)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The 1,797 handwritten digits as a dataset directory (1,437 train, 360 val)."""
    directory = tmp_path_factory.mktemp("data") / "digits"
    subprocess.run(
        [sys.executable, "tools/shard_imagenet.py", "digits", directory], cwd=ROOT, check=True, capture_output=True
    )
    return directory


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, with the reason, where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
