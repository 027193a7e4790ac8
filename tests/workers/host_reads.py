"""Run a command of launch/ and write down wherever its main thread makes the host wait for the device, step by step.

host_reads.py PLACES.json SCRIPT [ARGUMENT ...]

PLACES.json holds a list a step of training, from behind the lines of the step before to its own: each entry is
[what, place, in_step], where `place` is the innermost file of vitds or DeepSpeed and its function, "vitds/engine.py
step", and `in_step` says whether Engine.step had been called. What waits is

    read         a value of a tensor comes to Python, or decides about a shape: .item(), bool(), .tolist(), nonzero ...
    upload       a tensor is made on the device from numbers of Python, or copied to it from memory that is not pinned
    synchronize  DeepSpeed waits for all that the device, or a stream or an event of it, has to do
    cuda         what torch.cuda.set_sync_debug_mode saw, on a GPU

On a CPU nothing waits; there an operation is known by what it would do on a GPU, and of a tensor in host memory by
its place alone. DeepSpeed is told that the CPU works behind the program in streams, or it would leave out its waits.
Copies with `to` are told in vitds' code only: DeepSpeed has many of what lies on the device already.
"""

import json
import os
import runpy
import sys
import threading
import traceback
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitds import errors
from vitds.engine import get_accelerator
from vitds.log import RunLog

errors.end_process = sys.exit  # what stands below is still to be written
OUT, *sys.argv = sys.argv[1:]
ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
COPIES = {"tolist", "numpy", "cpu", "__array__"}  # methods of a tensor that dispatch nothing on a CPU
steps: list[list[tuple[str, str, bool]]] = [[]]


def note(what):
    if threading.current_thread() is not threading.main_thread():
        return
    calls = [(own_path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    place = next((call for call in reversed(calls) if call[0]), ("elsewhere", calls[-3][1]))
    steps[-1].append((what, " ".join(place), ("vitds/engine.py", "step") in calls))


def own_path(file):
    """From "vitds/" or "deepspeed/" on; empty for all other files."""
    if file.startswith(f"{ROOT}/vitds/"):
        return file.removeprefix(f"{ROOT}/")
    inside = file.rpartition("site-packages/")[2]
    return inside if inside.startswith("deepspeed/") else ""


def is_on_device(tensor):
    return tensor.is_cuda or not ON_GPU


class Operations(TorchDispatchMode):
    """Sees what torch runs, also what C++ asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, values = func.overloadpacket.__name__, args[0] if args else None
        reads = name in READS or str(func) == "aten.repeat_interleave.Tensor"
        if name in ("index", "index_put", "index_put_"):
            reads = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if reads and not Calls.in_one_hot and is_on_device(values):
            note("read")
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Sees what Python calls."""

    in_one_hot = False  # which looks at the smallest and the largest label, on a CPU only

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in COPIES and is_on_device(args[0]):
            note("read")
        elif name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            note("upload")
        elif name in ("to", "cuda") and not kwargs.get("non_blocking"):
            is_ours = own_path(sys._getframe(1).f_code.co_filename).startswith("vitds/")
            is_move = any(isinstance(one, torch.device | str | int) for one in (*args[1:], kwargs.get("device")))
            if is_ours and is_move:
                note("upload")
        Calls.in_one_hot = name == "one_hot"
        try:
            return func(*args, **kwargs)
        finally:
            Calls.in_one_hot = False


def end_step(log, step):
    steps.append([])
    return advance(log, step)


def see_warning(message, *_):
    if "synchroniz" in str(message):
        note("cuda")


class Stream:
    """A stream, or an event, of a device that has none; only to wait for it is of interest."""

    def synchronize(self):
        note("synchronize")

    def record_event(self, *_):
        return Stream()

    def query(self):
        return True

    def do_nothing(self, *_):
        pass

    wait_event = wait_stream = wait = record = do_nothing


def behave_like_a_gpu(stack):
    accelerator = type(get_accelerator())
    answers = {
        "resolves_data_dependency": lambda _: False,
        "is_synchronized_device": lambda _: False,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "Stream": property(lambda _: lambda *_, **__: Stream()),
        "Event": property(lambda _: lambda *_, **__: Stream()),
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(accelerator, name, answer))
    stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))


advance = RunLog.advance
with ExitStack() as stack:
    stack.enter_context(mock.patch.object(RunLog, "advance", end_step))
    stack.enter_context(mock.patch.object(type(get_accelerator()), "synchronize", lambda *_: note("synchronize")))
    if ON_GPU:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = see_warning
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
    else:
        behave_like_a_gpu(stack)
    try:
        with Calls(), Operations():
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(OUT).write_text(json.dumps(steps[:-1]))
