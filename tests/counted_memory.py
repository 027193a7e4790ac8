"""Counting of the bytes that tensors hold: what is alive is asked of torch's own storages, nothing is assumed."""

from collections.abc import Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Every storage that an operator under it makes, for as long as it lives; those of `known` tensors do not count.

    It sees what autograd saves and what selective activation checkpointing stores alike, also where the hooks of
    torch.autograd.graph.saved_tensors_hooks do not.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        """Bytes alive."""
        self._found = {key: one for key, one in self._found.items() if not one[0].expired()}
        return sum(num_bytes for _, num_bytes in self._found.values())

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage._cdata not in self._known:
            self._found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self.add(value)
        self.peak = max(self.peak, self.now())
        return made
