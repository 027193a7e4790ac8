"""The memory of this machine's GPUs, asked of the driver's own library: no torch, no CUDA context."""

from __future__ import annotations

import ctypes


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def smallest_gpu_memory_bytes(library: str = "libnvidia-ml.so.1") -> int | None:
    """Bytes of the GPU with the least memory, so that all ranks of a machine come to one answer; None without a GPU.

    A part of a GPU (MIG) is taken for the whole. Source: NVIDIA's NVML, nvmlDeviceGetMemoryInfo.
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        sizes = []
        for index in range(count.value):
            device, memory = ctypes.c_void_p(), _Memory()
            if not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) and not nvml.nvmlDeviceGetMemoryInfo(
                device, ctypes.byref(memory)
            ):
                sizes.append(int(memory.total))
        return min(sizes, default=None)
    finally:
        nvml.nvmlShutdown()
