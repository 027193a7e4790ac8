"""Readers given valid inputs that were changed at random: they read, or refuse in their own words, and nothing else."""

import json
import os
import subprocess
import sys

import pytest
from counts import record
from rank_processes import ROOT


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_changed_inputs_are_read_or_refused(tmp_path, count):
    path = os.pathsep.join([str(ROOT / "tests" / "faults"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tests/faults/fuzzed_inputs.py", str(tmp_path / "place"), str(count)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for result in results:
        wrong = result.get("wrong", 0)
        how = f"{result['reader']}: bytes flipped, cut, inserted, swapped; values of JSON exchanged"
        detail = f"{result['refused']:,} refused, {result.get('read', 0):,} read"
        record("input changed at random", how, count - wrong, count, detail)
    assert [result for result in results if result.get("wrong")] == []
    assert len(results) == 5 and all(result["refused"] > count / 2 for result in results)
