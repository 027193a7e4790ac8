"""The DeepSpeed engine behind the few calls that the train loop needs: the only file that imports deepspeed.

DeepSpeed keeps what it is: ZeRO stage, precision, loss scaling, clipping and accumulation come from its JSON. Around
it stands what `deepspeed.initialize` does not promise: nothing is compiled on a CPU, fp32 master weights start as the
exact weights of the model, checkpoint files are read without running code, and a failed load is an error.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from vitds.ds_config import is_float16_autocast
from vitds.elastic import Fragment, fill, parts_of_rank, restore, runs_of_rank
from vitds.ema import WeightAverage
from vitds.errors import CheckpointError, ConfigError, first_line
from vitds.grad_norms import BlockNorms, named
from vitds.model.blocks import Block
from vitds.snapshot import HostBuffers, Snapshot
from vitds.update_gate import UpdateGate
from vitds.weights.ds_file import safe_load
from vitds.weights.zero import SavedState, read_checkpoint
from vitds.world import START_VARIABLE, World

# DeepSpeed prints "Setting accelerator to CPU" from every process unless it is told.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", os.environ.get("VITDS_DEEPSPEED_LOG", "error"))

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime import utils as deepspeed_norms
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler, LossScaler
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils import logger, set_z3_leaf_module
from deepspeed.utils.tensor_fragment import fragment_address

logger.setLevel(os.environ.get("VITDS_DEEPSPEED_LOG", "error").upper())
if "VITDS_DEEPSPEED_LOG" not in os.environ:  # torch 2.14 warns at every step of the collectives that DeepSpeed calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _mask_invalid(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """DeepSpeed's mark of a norm that is not finite, without the copy to the device that it makes for it each time."""
    norm.masked_fill_(~norm.isfinite(), val)


for _module in (deepspeed_norms, stage_1_and_2):
    _module.mask_nan_or_inf_with_val_inplace = _mask_invalid


def _member(kind: type[ZeroStageEnum], name: str) -> ZeroStageEnum:
    """Python 3.11.0 to 3.11.3 pickles a member of an enumeration as getattr(kind, name)."""
    if kind is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"Unsupported: attribute {name} of {kind.__name__}")
    return ZeroStageEnum[name]


# The only objects that a resume may create from a checkpoint file, beyond tensors and plain containers.
_SAFE_GLOBALS = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (_member, "builtins.getattr"))


def start_ranks(world: World, hang_timeout_s: float = 60.0) -> torch.device:
    """Join the process group and take this rank's device: its GPU, or the CPU with its share of the cores.

    A collective gives up after 20 times `hang_timeout_s`, late enough for the watchdog to find out why it waits.
    A single rank without a launcher needs no port: it meets itself in memory.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // world.local_world_size))
    # The shared-memory op would be compiled at the first start, for minutes and behind a lock; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products have it off already
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if world.world_size == 1:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            timeout = timedelta(seconds=max(600.0, 20 * hang_timeout_s))
            store, rank, world_size = next(rendezvous("env://", world.rank, world.world_size, timeout=timeout))
            # torchrun's store outlives the ranks of a start, and what they wrote there.
            store = dist.PrefixStore(f"start {os.environ.get(START_VARIABLE, 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        with _quiet():
            deepspeed.init_distributed(verbose=False)
    return device


class Engine:
    """One model under DeepSpeed: forward, backward, step, save, load, and what the step did."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        groups: list[dict[str, Any]],
        lr_factor: Callable[[int], float] | None,
        ds_config: dict[str, Any],
        device: torch.device,
        ema_decay: float = 0.0,
    ) -> None:
        """Wrap `model`; `optimizer` and `lr_factor` are None where DeepSpeed builds its own from `ds_config`.

        With `ema_decay` the optimizer keeps an average of the weights beside its moments.

        Raises: ConfigError when DeepSpeed does not do fp16 on this device.
        """
        _check_fp16(ds_config)
        is_autocast = is_float16_autocast(ds_config.get("torch_autocast", {}))
        if is_autocast:
            # DeepSpeed's own takes the norm and clips before it unscales, and changes every later engine's gradients.
            ds_config = {key: section for key, section in ds_config.items() if key != "torch_autocast"}
            model.forward = torch.autocast(device.type, torch.float16)(model.forward)  # type: ignore[method-assign]
        # DeepSpeed's throughput timer waits for the device twice a micro-batch, for a line that nobody sees.
        ds_config = {"timers": {"throughput": {"enabled": False}}} | ds_config
        sixteen_bit = any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        exact = _trainable_copies(model) if sixteen_bit else {}
        for module in model.modules():
            if isinstance(module, Block) and module.is_compiled:
                set_z3_leaf_module(module, True)  # stage 3 gathers it whole, by hooks outside of what is compiled
        scheduler = None
        if lr_factor is not None:
            scheduler = lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, lr_factor)  # noqa: E731
        with _quiet(), _naming_the_configuration(ds_config if optimizer is None else {}):
            self._engine, _, _, _ = deepspeed.initialize(
                model=model.to(device) if device.type == "cuda" else model,
                optimizer=optimizer,
                model_parameters=groups if optimizer is None else None,
                lr_scheduler=scheduler,
                config=ds_config,
            )
        self._engine.checkpoint_engine = _SafeCheckpointEngine()
        self._engine._copy_recovery_script = lambda directory: None  # a snapshot brings the scripts along
        folder = Path(deepspeed.__file__).parent / "utils"
        self._scripts = {name: (folder / name).read_bytes() for name in ("zero_to_fp32.py", "zero_to_torch.py")}
        self._buffers = HostBuffers()
        self.device = device
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self.dtype: torch.dtype = self._engine.get_data_types()[0]
        self.scales_loss = is_autocast or self.dtype == torch.float16
        if is_autocast:
            self._set_loss_scaler()
        self._outcomes: list[bool] = []  # of updates that the host decided
        self._gate = None if self.scales_loss else _gate(self._engine)
        if self._gate is None:
            _read_the_norm_alone(self._engine.optimizer)
        self.overflowed_at_floor = False  # in the last step, with a loss scale of float16 that cannot fall any more
        self._unsharded_norm: Tensor | None = None
        self._average = WeightAverage(self._inner_optimizer, ema_decay) if ema_decay else None
        self._block_norms: BlockNorms | None = None
        if exact:  # DeepSpeed copies the fp32 masters from the weights after it has rounded them to 16 bits
            for master, fragments in self._masters():
                fill(master, fragments, lambda name, start, numel: exact[name].flatten()[start : start + numel])

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's, which wraps none at stage 0."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _set_loss_scaler(self) -> None:
        """Give DeepSpeed's fp32 optimizer, which scales by 1, the loss scaler that its "fp16" section describes."""
        engine, optimizer = self._engine, self._engine.optimizer
        args = engine.dynamic_loss_scale_args()
        optimizer.loss_scaler = CreateLossScaler(torch.float16, engine.loss_scale(), engine.dynamic_loss_scale(), args)
        optimizer.dynamic_loss_scale = optimizer.loss_scaler.dynamic

    def follow_block_norms(self, block_of: Callable[[str], int], num_blocks: int) -> None:
        """Keep the gradient norm of each block from now on; `block_of` gives the block of a parameter by name."""
        parts = [
            (master, [(block_of(f.name), f.offset, f.offset + f.numel) for f in fragments if f.numel])
            for master, fragments in self._masters()
        ]
        self._block_norms = BlockNorms(self._inner_optimizer, parts, num_blocks)

    def block_norms(self) -> dict[str, float]:
        """The gradient norms of the last step by block, before clipping, if they are followed; collective."""
        if self._block_norms is None:
            return {}
        squares, norm = self._block_norms.squares.clone(), self.grad_norm
        if self.zero_stage:
            dist.all_reduce(squares)
        return named(squares.tolist(), norm)

    @classmethod
    def for_inference(cls, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The forward of a model whose weights are sharded over the ranks (ZeRO stage 3), without an optimizer."""
        section = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}.get(
            dtype, {}
        )
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **section}
        _check_fp16(config)
        with _quiet():
            engine, *_ = deepspeed.initialize(model=model.to(device), config=config)
        engine.eval()
        return engine

    @property
    def module(self) -> nn.Module:
        """The wrapped model."""
        return self._engine.module

    def __call__(self, images: Tensor) -> Tensor:
        """Run the model's forward through the engine."""
        return self._engine(images)

    def train(self, mode: bool = True) -> None:
        """Switch dropout and drop-path on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Scale the loss, run backward, and reduce gradients as the stage demands.

        A loss that is not finite makes every gradient so, if it was not by itself: all ranks skip the step.
        """
        self._engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary clip and update, if the gradients are finite on all ranks.

        A skipped update counts as a step, and `outcomes` tells of it. The schedule goes by steps; float16's waits for
        updates.
        """
        engine, optimizer = self._engine, self._engine.optimizer
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return
        is_skipped = False
        if self.zero_stage == 0:  # DeepSpeed reports no norm there, and updates with whatever the gradients are
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._unsharded_norm = nn.utils.get_total_norm(gradients)
            is_skipped = (self._gate.judge if self._gate else is_invalid_grad_norm)(self._unsharded_norm)
        if self._block_norms is not None:
            self._block_norms.begin_step()
        if self._gate is not None:
            with _judged_by(self._gate):
                engine.step()
            self._gate.check_judged()
            return
        scaler = getattr(optimizer, "loss_scaler", None)
        is_at_floor = isinstance(scaler, DynamicLossScaler) and _cannot_fall(scaler)
        with _told_of_overflow(optimizer) if is_skipped else _growing_late(optimizer):
            engine.step()
        is_applied = bool(engine.was_step_applied())
        self._outcomes.append(is_applied)
        self.overflowed_at_floor = is_at_floor and not is_applied
        if not is_applied and not self.scales_loss and engine.lr_scheduler is not None:
            with warnings.catch_warnings():  # torch warns where the first update of all is skipped
                warnings.simplefilter("ignore", UserWarning)
                engine.lr_scheduler.step()

    def outcomes(self, wait: bool = True) -> list[bool]:
        """Whether each update since the last call changed the weights; `skipped_steps` knows of them then.

        Without `wait` those that the device decided are left for a later call.
        """
        if self._gate is None:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes
        outcomes = self._gate.outcomes() if wait else []
        self._engine.skipped_steps += outcomes.count(False)
        return outcomes

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` starts from: the loss over the accumulated micro-batches, by the loss scale."""
        loss = loss / self._engine.gradient_accumulation_steps()
        return self._engine.optimizer.scale_if_loss(loss) if self.zero_stage else loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the average of the weights; after it the weights are back, bit for bit. Collective.

        An error inside leaves the average in place, for the run ends by it: ranks that failed cannot be waited for.
        """
        assert self._average is not None, "the engine keeps no average"
        self._average.swap()
        self._spread_masters()
        yield
        self._average.swap()
        self._spread_masters()

    def _spread_masters(self) -> None:
        """Set the weights that the model computes with to the masters, as the end of a step does; collective."""
        optimizer = self._engine.optimizer
        if self.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()  # what is gathered is given back
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()

    def has_finite_weights(self) -> bool:
        """Whether this rank's part of the weights is finite."""
        parts = [getattr(p, "ds_tensor", p) for p in self.module.parameters()]
        return all(bool(torch.isfinite(part.detach()).all()) for part in parts)

    @property
    def lr(self) -> float:
        """The learning rate of the next update; with layer-wise decay the head's, which is the highest."""
        return max(float(group["lr"]) for group in self._engine.optimizer.param_groups)

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's averaged gradients over all ranks, before clipping; infinite on a skipped step."""
        norm = self._engine.get_global_grad_norm() if self._unsharded_norm is None else self._unsharded_norm
        if norm is None:
            return None
        return math.inf if is_invalid_grad_norm(norm) else float(norm)

    @property
    def loss_scale(self) -> float:
        """The loss scale of float16; 1 in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self.scales_loss else 1.0

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, since step 0, as far as `outcomes` told."""
        return int(self._engine.skipped_steps)

    def snapshot(self, client_state: dict[str, Any]) -> Snapshot:
        """Let DeepSpeed assemble a checkpoint, and give this rank's files of it, still to be written; collective."""
        if self._engine.zero_nvme_offload_optimizer():
            raise CheckpointError("optimizer state on NVMe cannot be saved", fix="offload it to the CPU")
        if self.zero_stage == 0:  # DeepSpeed leaves it out there; without it nothing says whose moments are whose
            client_state = client_state | {"param_shapes": self._shapes_by_group()}
        scripts = self._scripts if dist.get_rank() == 0 else {}
        self._engine.checkpoint_engine.snapshot = snapshot = Snapshot(self._buffers, scripts)
        self._engine.save_checkpoint(".", tag="none", client_state=client_state, save_latest=False)
        return snapshot

    def load(self, directory: Path, tag: str) -> dict[str, Any]:
        """Restore weights, optimizer, schedule and counters from directory/tag and return the client state.

        A checkpoint of this world size, ZeRO stage and group layout is loaded by DeepSpeed, any other one by name.

        Raises: CheckpointError when DeepSpeed loaded nothing, or when the checkpoint does not say whose moments it has.
        """
        engine = self._engine
        saved = read_checkpoint(directory / tag)
        if self._is_laid_out_like(saved):
            with _quiet():
                path, client_state = engine.load_checkpoint(str(directory), tag=tag)
            if path is None:
                raise CheckpointError("DeepSpeed loaded nothing", where=str(directory / tag))
        else:
            self._load_by_name(saved)
            client_state = saved.common
        for parameter in engine.module.parameters():  # hpZ's copies: DeepSpeed forgets those of trainable ones alone
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                parameter.ds_secondary_tensor = None
        self._set_rates()
        return client_state

    def _is_laid_out_like(self, saved: SavedState) -> bool:
        """True when every rank finds its own vectors in the checkpoint as they were."""
        if saved.zero_stage != self.zero_stage or (self.zero_stage and saved.world_size != dist.get_world_size()):
            return False
        changing = ("params", "lr")
        options = [{k: v for k, v in g.items() if k not in changing} for g in self._engine.optimizer.param_groups]
        kept = [{key: value for key, value in group.items() if key not in changing} for group in saved.param_groups]
        is_unnamed = not saved.names_by_group  # stage 0 before its groups were named
        return kept == options and (is_unnamed or saved.names_by_group == [list(s) for s in self._shapes_by_group()])

    def _load_by_name(self, saved: SavedState) -> None:
        """Restore from a checkpoint of another world size, ZeRO stage or group layout, one parameter at a time."""
        engine, optimizer = self._engine, self._engine.optimizer
        if not saved.names_by_group:
            raise CheckpointError(
                "does not say whose moments its optimizer holds: an older vitds saved it at ZeRO stage 0",
                where=str(saved.directory),
                fix="go on at stage 0 for a step; the checkpoint of that can be resumed at any stage",
            )
        step_on_device = any(optimizer.param_groups[0].get(key) for key in ("fused", "capturable"))
        for master, fragments in self._masters():
            restore(master, optimizer.state[master], fragments, saved, step_on_device)
        self._refresh_weights(saved)
        if self.scales_loss and saved.loss_scaler is not None:
            numbers = {key: value for key, value in vars(saved.loss_scaler).items() if isinstance(value, int | float)}
            vars(optimizer.loss_scaler).update(numbers)
        if engine.lr_scheduler is not None:
            schedule, kept = engine.lr_scheduler, saved.common["lr_scheduler"]
            is_ours = isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
            counters = {key: kept[key] for key in ("last_epoch", "_step_count")} if is_ours else kept
            schedule.load_state_dict(schedule.state_dict() | counters)  # its base rates are those of this run's groups
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, saved.common[counter])

    def _refresh_weights(self, saved: SavedState) -> None:
        """Set the weights that the model computes with, its frozen ones and its buffers."""
        module, rank, world_size = self._engine.module, dist.get_rank(), dist.get_world_size()
        whole = saved.arrays("master")
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()
        for name, parameter in module.named_parameters():
            if self.zero_stage == 3:
                part = parts_of_rank({name: parameter.ds_shape}, rank, world_size)
                fill(parameter.ds_tensor, part, lambda *run: torch.from_numpy(saved.run("master", *run)))
            else:
                parameter.detach().copy_(torch.from_numpy(whole[name]))
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()
        for name, buffer in module.named_buffers():
            if name in whole:
                buffer.copy_(torch.from_numpy(whole[name]))

    def _set_rates(self) -> None:
        """Set the learning rates to this run's schedule, which a checkpoint of a shorter run does not hold."""
        schedule = self._engine.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
            for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = lr
        elif schedule is not None:
            schedule.step(schedule.last_batch_iteration)

    def _shapes_by_group(self) -> list[dict[str, torch.Size]]:
        """The trainable parameters as the optimizer has them: by group in its order; at stage 3 by sub-group."""
        if self.zero_stage:
            return self._engine._get_zero_param_shapes()
        names = self._engine.param_names
        return [{names[p]: p.shape for p in group["params"]} for group in self._engine.optimizer.param_groups]

    def _masters(self) -> Iterator[tuple[Tensor, list[Fragment]]]:
        """Each vector of masters that this rank's optimizer updates, with what lies in it."""
        optimizer, shapes_by_group = self._engine.optimizer, self._shapes_by_group()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if self.zero_stage == 0:
            for group, shapes in zip(optimizer.param_groups, shapes_by_group, strict=True):
                for parameter, name in zip(group["params"], shapes, strict=True):
                    yield parameter, [Fragment(name, 0, parameter.numel(), 0)]
        elif self.zero_stage == 3:
            for master, shapes in zip(optimizer.fp32_partitioned_groups_flat, shapes_by_group, strict=True):
                yield master, parts_of_rank(shapes, rank, world_size)
        else:
            paddings = getattr(optimizer, "round_robin_bit16_padding", None) or [[0] * len(s) for s in shapes_by_group]
            for index, shapes in enumerate(shapes_by_group):
                master = optimizer.param_groups[index]["params"][0]
                yield master, runs_of_rank(shapes, paddings[index], rank, master.numel())


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """Reads files without running code, and collects what DeepSpeed would write, so that no rank fails alone in it."""

    def __init__(self) -> None:
        self.name = "vitds"
        self.snapshot: Snapshot

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Keep one file's content for the snapshot."""
        _complete_stage1(state_dict)
        self.snapshot.files[Path(path).name] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written yet."""

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read one file with weights_only=True and DeepSpeed's own few classes allowed."""
        return safe_load(path, map_location, _SAFE_GLOBALS)


def _gate(engine: Any) -> UpdateGate | None:
    """A gate before the updates of a DeepSpeed engine, whose norm decides on the device; None where it cannot be.

    DeepSpeed then clips nothing, and looks for what is not finite in the norm alone.
    """
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    is_offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if is_offloaded or not UpdateGate.stands_before(inner):
        return None
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _replace(optimizer, "unscale_and_clip_grads", lambda *_: None)
        _replace(optimizer, "_get_norm_groups", partial(_norm_of_partitions, optimizer))
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _replace(optimizer, "check_grad_overflow", True)
        _replace(optimizer, "check_overflow", lambda partition_gradients: None)
        _replace(optimizer, "unscale_and_clip_grads", lambda *_: None)
    elif isinstance(optimizer, torch.optim.Optimizer):
        _replace(engine, "clip_fp32_gradients", lambda: None)
    elif not isinstance(optimizer, BF16_Optimizer):
        return None
    return UpdateGate(inner, engine.gradient_clipping())


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set what is there already: a DeepSpeed that calls it otherwise would clip a second time."""
    getattr(owner, name)
    setattr(owner, name, value)


@contextmanager
def _judged_by(gate: UpdateGate) -> Iterator[None]:
    """Have DeepSpeed ask `gate` whether a norm is finite, and leave the clipping to it."""
    asking = (bf16_optimizer, stage_1_and_2, stage3)
    clip = bf16_optimizer.clip_tensors_by_global_norm
    for module in asking:
        module.is_invalid_grad_norm = gate.judge
    bf16_optimizer.clip_tensors_by_global_norm = lambda **_: None
    try:
        yield
    finally:
        bf16_optimizer.clip_tensors_by_global_norm = clip
        for module in asking:
            module.is_invalid_grad_norm = is_invalid_grad_norm


@torch.no_grad()
def _norm_of_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> list[Tensor]:
    """The one norm of all gradients at stage 3; DeepSpeed meets, and copies a -1 to the device, once for each group."""
    gradients = [part for index in range(len(optimizer.fp16_groups)) for part in optimizer.averaged_gradients[index]]
    square = torch.stack(torch._foreach_norm(gradients, dtype=get_norm_dtype())).square().sum()
    dist.all_reduce(square, group=optimizer.dp_process_group)
    return [square.sqrt().float()]


def _read_the_norm_alone(optimizer: Any) -> None:
    """Have DeepSpeed read one number of the device an update, the norm: it is finite only if every gradient is.

    By itself it looks through every gradient before that, and at stages 1 and 2 reads the norm again for each group.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if optimizer.use_muon:
            _look_before_muon(optimizer)
        elif not optimizer.offload_optimizer:
            optimizer.check_overflow = lambda: None
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_grad_overflow = True  # or the norm decides nothing in bf16, and too late for offloaded Muon
        if optimizer.compute_grad_norm and not optimizer.cpu_offload:
            optimizer.check_overflow = lambda partition_gradients: None
            optimizer.unscale_and_clip_grads = partial(_unscale_and_clip, optimizer)


def _look_before_muon(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Leave Muon's momentum as it is where an update is skipped: at stage 3 it moves before the norm is taken.

    In float16 DeepSpeed looks through the gradients before that, in other precisions it does not.
    """
    if optimizer.dtype != torch.float16:
        apply = optimizer._apply_muon_to_accumulated_grads
        optimizer._apply_muon_to_accumulated_grads = lambda: None if optimizer.has_overflow() else apply()


def _unscale_and_clip(optimizer: DeepSpeedZeroOptimizer, gradients: list[Tensor], scaled_norm: Tensor) -> None:
    """As DeepSpeed does it; `scaled_norm` is infinite where a gradient is not finite."""
    scale = optimizer.loss_scale
    if optimizer.clip_grad > 0:
        scale = (((scaled_norm / scale) + 1e-6) / optimizer.clip_grad).clamp(min=1.0) * scale
    elif scale == 1:
        return
    torch._foreach_mul_(gradients, 1.0 / scale)


def _cannot_fall(scaler: DynamicLossScaler) -> bool:
    """Whether an overflow would find the scale at its floor; DeepSpeed then skips the step like any other."""
    scaler.raise_error_at_min_scale = False  # or it would raise, with gradients and counters half-way
    return scaler.cur_scale == scaler.min_scale and 1 in (scaler.delayed_shift, scaler.cur_hysteresis)


@contextmanager
def _growing_late(optimizer: Any) -> Iterator[None]:
    """Let a dynamic loss scale grow behind a step: DeepSpeed does so before it unscales, and halves that update."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        yield
        return
    grown = []

    def update(has_overflow: bool = False) -> None:
        scale = scaler.cur_scale
        scaler.update_scale(has_overflow)
        if scaler.cur_scale > scale:
            grown.append(scaler.cur_scale)
            scaler.cur_scale = scale

    optimizer._update_scale = update
    try:
        yield
    finally:
        del optimizer._update_scale
        scaler.cur_scale = grown[0] if grown else scaler.cur_scale


@contextmanager
def _told_of_overflow(optimizer: Any) -> Iterator[None]:
    """Have DeepSpeed skip an update of a plain optimizer, and count it, as its own optimizers have it on overflow."""
    update, optimizer.step, optimizer.overflow = optimizer.step, lambda: None, True
    try:
        yield
    finally:
        optimizer.step = update
        del optimizer.overflow


def _complete_stage1(state_dict: dict[str, Any]) -> None:
    """Add what DeepSpeed's zero_to_fp32.py looks for and DeepSpeed itself leaves out of its files at ZeRO stage 1.

    Its bf16 optimizer with fp32 accumulation does not name its stage, and frozen parameters are listed from stage 2 on.
    """
    optimizer_state = state_dict.get("optimizer_state_dict")
    if optimizer_state is not None:
        optimizer_state.setdefault("zero_stage", 1)
    is_stage0 = bool(state_dict.get("optimizer"))
    if state_dict.get("param_shapes") and not state_dict.get("frozen_param_shapes") and not is_stage0:
        listed = {name for group in state_dict["param_shapes"] for name in group} | set(state_dict["buffer_names"])
        frozen = {name: tensor for name, tensor in state_dict["module"].items() if name not in listed}
        state_dict["frozen_param_shapes"] = {name: tensor.shape for name, tensor in frozen.items()}
        state_dict["frozen_param_fragments"] = {name: tensor.detach().cpu() for name, tensor in frozen.items()}


def _check_fp16(config: dict[str, Any]) -> None:
    if config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "DeepSpeed does not do fp16 on this device",
            fix='use bf16: "bf16": {"enabled": true} in place of the "fp16" section',
        )


@contextmanager
def _naming_the_configuration(ds_config: dict[str, Any]) -> Iterator[None]:
    """What DeepSpeed raises where it refuses a value, or cannot build the optimizer, as the configuration's fault.

    What the model or the schedule raises, which it calls, stays the bug that it is.
    """
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not _is_below(frames, Path(deepspeed.__file__).parent):
            raise
        if "optimizer" in ds_config and any(frame.name == "_configure_basic_optimizer" for frame in frames):
            raise ConfigError(
                f"DeepSpeed cannot build {ds_config['optimizer'].get('type')} here: {first_line(error)}",
                where='"optimizer.type"',
                fix="AdamW, Adam and SGD are torch's, and run everywhere",
            ) from error
        more = [line.strip() for line in str(error).strip().splitlines()[1:3]]  # pydantic's: which key, and why
        raise ConfigError(f"DeepSpeed refuses this configuration: {first_line(error)}", fix="\n".join(more)) from error


def _is_below(frames: list[traceback.FrameSummary], package: Path) -> bool:
    """Whether an error comes from a package, or from what that uses, since code of vitds was last entered."""
    ours = Path(__file__).parent
    last = max(number for number, frame in enumerate(frames) if Path(frame.filename).is_relative_to(ours))
    return any(Path(frame.filename).is_relative_to(package) for frame in frames[last + 1 :])


def _trainable_copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class _quiet:
    """Keep DeepSpeed's prints out of the terminal, unless VITDS_DEEPSPEED_LOG asks for them."""

    def __enter__(self) -> None:
        self._stdout = sys.stdout
        if "VITDS_DEEPSPEED_LOG" not in os.environ:
            sys.stdout = open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        if sys.stdout is not self._stdout:
            sys.stdout.close()
            sys.stdout = self._stdout
