"""A checkpoint's files in memory: assembled by DeepSpeed on the spot, copied to host memory, written at leisure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, UntypedStorage, nn


class HostBuffers:
    """Host memory that one copy after the other uses; pinned for copies from a GPU.

    It costs a rank one copy of the state that it saves, kept from its first save on.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[UntypedStorage]] = {}

    def have_room(self, storages: list[UntypedStorage], num_ranks: int) -> bool:
        """Whether copies of these fit the memory of a machine that `num_ranks` ranks share, half of it left free."""
        held = sum(size * len(free) for (size, _), free in self._free.items())
        return sum(s.nbytes() for s in storages) - held <= available_memory() / 2 / num_ranks

    def copy(self, storage: UntypedStorage) -> UntypedStorage:
        """The same bytes in host memory; on a GPU's stream, so wait for it before they are read."""
        is_pinned = storage.device.type == "cuda"
        free = self._free.get((storage.nbytes(), is_pinned))
        if free:
            twin = free.pop()
        else:
            twin = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_pinned).untyped_storage()
        return twin.copy_(storage, non_blocking=is_pinned)

    def give_back(self, storages: list[UntypedStorage], is_pinned: bool) -> None:
        """Take copies that nobody reads any more, in place of those from before."""
        self._free = {}
        for storage in storages:
            self._free.setdefault((storage.nbytes(), is_pinned), []).append(storage)


class Snapshot:
    """What a rank has to write for one checkpoint: a state dictionary by file name, and DeepSpeed's scripts by name.

    It refers to the live tensors until `copy_to_host`.
    """

    def __init__(self, buffers: HostBuffers, scripts: dict[str, bytes]) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self._scripts = scripts
        self._buffers = buffers
        self._copies: dict[int, UntypedStorage] = {}  # by the address of what was copied

    @property
    def num_bytes(self) -> int:
        """About how much will be written."""
        return sum(storage.nbytes() for storage in _storages(self.files)) + sum(map(len, self._scripts.values()))

    def copy_to_host(self, num_ranks: int) -> bool:
        """Copy every tensor, so that training may go on before the files are written.

        False, and nothing is copied, when the memory that `num_ranks` ranks share would not hold it.
        """
        storages = _storages(self.files)
        if not self._buffers.have_room(storages, num_ranks):
            return False
        self._copies = {storage._cdata: self._buffers.copy(storage) for storage in storages}
        self.files = {name: self._twin(state) for name, state in self.files.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return True

    def write(self, directory: Path, tag: str) -> None:
        """Write the files to directory/tag, and the scripts to `directory`.

        Raises: OSError, or RuntimeError where torch has no better word for a full disk.
        """
        (directory / tag).mkdir(exist_ok=True)
        for name, script in self._scripts.items():
            (directory / name).write_bytes(script)
            (directory / name).chmod(0o755)
        for name, state in self.files.items():
            try:
                with open(directory / tag / name, "wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # torch's words for a write that failed; the system's own are behind them
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def release(self) -> None:
        """Forget the state; the next snapshot uses the memory again."""
        self.files = {}
        if self._copies:
            self._buffers.give_back(list(self._copies.values()), torch.cuda.is_available())
            self._copies = {}

    def _twin(self, value: Any) -> Any:
        """The same value over the copied memory; what shares memory still does."""
        if isinstance(value, Tensor):
            storage = self._copies[value.untyped_storage()._cdata]
            twin = torch.empty(0, dtype=value.dtype)
            twin.set_(storage, value.storage_offset(), value.size(), value.stride())
            if isinstance(value, nn.Parameter):
                return nn.Parameter(twin, value.requires_grad)
            return twin.requires_grad_(value.requires_grad)
        if isinstance(value, dict):
            twins = copy.copy(value)  # an OrderedDict of torch has attributes
            for key, item in value.items():
                twins[key] = self._twin(item)
            return twins
        if type(value) in (list, tuple):
            return type(value)(map(self._twin, value))
        return copy.deepcopy(value)  # a loss scaler goes on changing


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, or of a container or job with a limit of its own.

    Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst. Pages of files count as free: they give way.
    """
    room = [psutil.virtual_memory().available]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                mount, names = "sys/fs/cgroup", ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                mount, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            group = root / mount / path.lstrip("/")
            for level in (group, *group.parents):  # a container may see its own group as the topmost
                with suppress(OSError, ValueError):  # "max" is no number: no limit at this level
                    limit, used = (int((level / name).read_text()) for name in names)
                    stat = dict(entry.split() for entry in (level / "memory.stat").read_text().splitlines())
                    room.append(limit - used + int(stat.get("inactive_file", 0)))
                if level == root / mount:
                    break
    return max(min(room), 0)


def _storages(value: Any) -> list[UntypedStorage]:
    """Every piece of memory behind the tensors once, whole as torch.save writes it."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(value)}
    return list(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
