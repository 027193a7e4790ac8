"""A snapshot is what torch.save would have written at its moment, whatever becomes of the tensors afterwards."""

import copy
from collections import OrderedDict

import psutil
import pytest
import torch
from torch import nn

from vitds.snapshot import HostBuffers, Snapshot, available_memory


class Scaler:
    scale = 2.0


def a_state():
    flat = torch.arange(24.0)
    module = OrderedDict(a=flat[:12].view(3, 4), b=flat[12:].view(4, 3).t(), tied=flat[:12].view(3, 4))
    module._metadata = OrderedDict(version=1)
    scaler = Scaler()
    scaler.scale = 8.0
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    moments = [(torch.zeros(0), torch.full((2,), 3, dtype=torch.int64)), [parameter]]
    return flat, {"module": module, "moments": moments, "scaler": scaler, "step": 7, "nothing": None}


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
        assert one.requires_grad == other.requires_grad
    elif isinstance(one, dict):
        assert one.keys() == other.keys() and vars_of(one) == vars_of(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert vars_of(one) == vars_of(other) and (one == other or vars_of(one))


def vars_of(value):
    return getattr(value, "__dict__", {})


@pytest.mark.parametrize("num_saves", [1, 3])
def test_a_copy_stays_what_it_was_and_what_shared_memory_still_does(tmp_path, num_saves):
    buffers, scripts = HostBuffers(), {"zero_to_fp32.py": b"print()\n"}
    for _ in range(num_saves):  # the second on use the first one's memory
        flat, state = a_state()
        expected = copy.deepcopy(state)
        snapshot = Snapshot(buffers, scripts)
        snapshot.files["model_states.pt"] = state
        num_bytes = snapshot.num_bytes
        assert snapshot.copy_to_host(num_ranks=1)
        assert snapshot.num_bytes == num_bytes == 24 * 4 + 2 * 8 + 3 * 2 + 8
        flat.zero_()
        state["scaler"].scale = 1.0
        with torch.no_grad():
            state["moments"][1][0].zero_()
        snapshot.write(tmp_path, "global_step7")
        written = torch.load(tmp_path / "global_step7/model_states.pt", weights_only=False)
        assert_same(written, expected)
        assert written["module"]["a"].data_ptr() == written["module"]["tied"].data_ptr()
        assert (tmp_path / "zero_to_fp32.py").read_bytes() == scripts["zero_to_fp32.py"]
        snapshot.release()


def test_without_memory_for_a_copy_the_live_state_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 200}))
    flat, state = a_state()
    snapshot = Snapshot(HostBuffers(), {})
    snapshot.files["model_states.pt"] = state
    assert not snapshot.copy_to_host(num_ranks=1)
    flat.fill_(5)
    snapshot.write(tmp_path, "tag")
    assert torch.load(tmp_path / "tag/model_states.pt", weights_only=False)["module"]["a"].eq(5).all()


def test_a_limit_of_the_container_or_the_job_counts(tmp_path):
    """Version 2 of control groups, with the limit on a level above; version 1; and none."""
    write = lambda path, text: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text(text))  # noqa: E731
    inside, whole = tmp_path / "sys/fs/cgroup/job/step", available_memory(tmp_path)
    assert whole > 2**20
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    for level, limit in ((inside, "max"), (inside.parent, "1000000")):
        write(level / "memory.max", limit + "\n")
        write(level / "memory.current", "700000\n")
        write(level / "memory.stat", "anon 600000\ninactive_file 50000\n")
    assert available_memory(tmp_path) == 350_000
    old = tmp_path / "sys/fs/cgroup/memory/pod"
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/pod\n")
    assert available_memory(tmp_path) > 2**20
    write(old / "memory.limit_in_bytes", "1000")
    write(old / "memory.usage_in_bytes", "3000")
    write(old / "memory.stat", "cache 5\n")
    assert available_memory(tmp_path) == 0
