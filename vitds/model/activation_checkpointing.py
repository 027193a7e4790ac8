"""Activation checkpointing: which blocks forget what they computed in forward and compute it again in backward.

| mode      | kept of a block                                           | computed twice                           |
|-----------|-----------------------------------------------------------|------------------------------------------|
| none      | everything                                                | nothing                                  |
| selective | its input, results of matmuls, convolutions and attention | norms, GELU, dropout, the cheap rest     |
| full      | its input                                                 | the whole block                          |
| K         | as `full` for every K-th block, else all                  | every K-th block                         |

Blocks are the encoder's, and a hybrid's root and bottleneck units, counted on their own. Losses and gradients are those
of `none`: the random state is restored for the second pass. Recomputation goes through the modules' own calls, so that
ZeRO stage 3 gathers their parameters again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from vitds.errors import ConfigError

# What selective mode keeps: every operator that spends its time in matrix products.
_COSTLY = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_mm.default,  # of 8 bits
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


class _CostlyAlone(TorchDispatchMode):
    """Shows torch's selective modes nothing but the costly operators.

    They count every operator, and refuse one that backward adds, as gathering weights at ZeRO stage 3 does.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in _COSTLY:
            return self._mode.__torch_dispatch__(operator, types, args, kwargs)
        return operator(*args, **(kwargs or {}))


def _keep_costly() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of forward and of its second pass."""
    forward, again = _mark_costly()
    return _CostlyAlone(forward), _CostlyAlone(again)


def _mark_costly() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The same for the compiler, which takes marks of every operator, and gathers no weights inside of a block."""
    return create_selective_checkpoint_contexts(list(_COSTLY))


@dataclass(frozen=True)
class ActivationCheckpointing:
    """How blocks are run; build it with `parse`."""

    every: int = 0  # recompute blocks 0, every, 2 * every, ...; 0: none
    selective: bool = False
    offload_to_cpu: bool = False  # the saved block inputs wait in host memory

    @classmethod
    def parse(cls, mode: str | int, offload_to_cpu: bool = False) -> ActivationCheckpointing:
        """Read a mode of the table above; K is a positive integer, as a number or as text.

        Raises: ConfigError for another mode, or for offloading when nothing is recomputed.
        """
        if mode in ("none", "full", "selective"):
            every = 0 if mode == "none" else 1
        else:
            try:
                every = int(mode)
            except ValueError:
                every = 0
            if every < 1 or isinstance(mode, bool):
                raise ConfigError(
                    f'activation checkpointing "{mode}" is not a mode',
                    fix="none, selective, full, or K to recompute every K-th block",
                )
        if offload_to_cpu and not every:
            raise ConfigError(
                "activations are to be offloaded to the CPU, but activation checkpointing is none",
                fix="only the inputs of recomputed blocks are offloaded: choose full, selective or K",
            )
        return cls(every, mode == "selective", offload_to_cpu)

    def run(self, blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Run the blocks on x, one after the other, as the mode says."""
        for index, block in enumerate(blocks):
            is_recomputed = self.every and index % self.every == 0 and torch.is_grad_enabled()
            by_itself = getattr(block, "recomputes_itself", False)
            x = self.run_twice(block, x) if is_recomputed and not by_itself else block(x)
        return x

    def run_twice(self, block: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        """Run one block, and once more in backward, on x and whatever else it takes."""
        contexts: Callable = noop_context_fn
        if self.selective:
            contexts = _mark_costly if torch.compiler.is_compiling() else _keep_costly
        offload = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if self.offload_to_cpu else nullcontext()
        with offload:
            return checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
