"""How much memory a training run takes, by arithmetic alone: model states, saved activations, transients. No torch.

Words: P parameters, P_t of them trained; n ranks; e bytes of an element of the weights (fp32 4, bf16 and fp16 2), a of
an accumulated gradient; s states that the optimizer keeps of each trained parameter (AdamW 2, SGD with momentum 1, one
more for an average of the weights); T tokens, D width, F mlp width, N heads, L blocks.

Model states of one rank, gradients as they are when a step's last backward has ended, in bytes:

| ZeRO | weights | gradients   | masters, optimizer | copies at the end of a step                                   |
|------|---------|-------------|--------------------|---------------------------------------------------------------|
| 0    | 4P      | 4P_t        | 4s P_t             | 4P_t to be sent                                               |
| 1    | eP      | e P_t       | (4 + 4s) P_t / n   | what this rank owns, that flattened, and in fp32              |
| 1, * | 2P      | (2 + 4) P_t | (4 + 4s) P_t / n   | 2P_t to be sent                                               |
| 2    | eP      | a P_t / n   | (4 + 4s) P_t / n   | none where a is 4 beside 16-bit weights; else flattened, in fp32 |
| 3    | eP / n  | a P_t / n   | (4 + 4s) P_t / n   | flattened, in fp32; in backward, the weights gathered at once |

* bf16 that accumulates in fp32, DeepSpeed's BF16_Optimizer: beside the gradients of a micro-batch it keeps their sum
over micro-batches whole. An offloaded optimizer has its masters, states and gradients in host memory; at stages 1 and 2
a sum of gradients in fp32 beside 16-bit weights, 4P_t / n, stays on the GPU.

Saved activations of one image, with fused attention and nothing recomputed, in bytes:

    a block   T (e (8D + 2F) + 16 + 4N)   input, output of both norms, q k v, attention, sum, GELU's input and output;
                                          means and deviations of the norms and log-sums of attention in fp32
    the rest  2e C H W + T (2eD + 8)      the image, again as patches, input and output of the last norm

`selective` keeps T (e (7D + F) + 4N) of a block, `full` its input T e D, K is `full` for every K-th block. Dropout adds
masks of 2D + F elements, of one byte on a GPU and e on a CPU; LayerScale and normalised q and k add 2D elements each. A
hybrid's stem is walked convolution by convolution. Blocks that are not trained, and all before them, save nothing.

The peak is the largest of backward's begin (states, buckets, saved activations, and what the block at work needs), its
end (states, gradients, and the last bucket with its flat copy) and update (states and copies of gradients). Not in the
formulas: fragmentation, evaluation, whose batch is small, and compiled blocks, which keep less.

Source: DeepSpeed 0.19.8, runtime/zero/{stage_1_and_2,stage3}.py and runtime/bf16_optimizer.py; vitds/model. The tests
count the bytes that real forwards and backwards hold, and states in engines of two ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vitds.model.registry import ModelSpec, num_parameters, num_tokens, pixels_per_token

Checkpointing = Literal["none", "selective", "full"] | int  # K: every K-th block
GIB = 2**30
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# The CUDA context, cuBLAS' workspaces and NCCL's buffers on a GPU. An assumption, not a measurement.
CONTEXT_BYTES = int(1.5 * GIB)
USABLE = 0.9  # of a GPU's memory; the rest is for what fragmentation wastes


@dataclass(frozen=True)
class Training:
    """What decides a run's memory. Units: bucket sizes in elements."""

    spec: ModelSpec
    image_size: tuple[int, int]
    num_classes: int
    pre_logits: int | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    accumulation_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of gradients over micro-batches
    zero_stage: int = 1
    world_size: int = 1
    micro_batch: int = 1
    accumulation_steps: int = 1
    activation_checkpointing: Checkpointing = "none"
    offloads_optimizer: bool = False
    optimizer_states: int = 2  # of each trained parameter: AdamW 2, SGD with momentum 1, an average of weights 1 more
    train: str = "all"  # all, head, or last-K
    dropout: float = 0.0
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000  # gathered ahead in one piece at stage 3
    max_live_parameters: int = 1_000_000_000  # gathered at one time at stage 3
    overlap_comm: bool = False
    on_gpu: bool = True

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the precision of weights and activations."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def num_trained_blocks(self) -> int:
        """Blocks that are trained: the last ones."""
        if self.train.startswith("last-"):
            return min(int(self.train.removeprefix("last-")), self.spec.depth)
        return 0 if self.train == "head" else self.spec.depth

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: patches, class token, registers."""
        return num_tokens(self.spec, self.image_size)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank, on its device but for `host`."""

    weights: int
    optimizer: int  # masters and states
    gradients: int  # when a step's last backward has ended
    carried: int  # of them, what is there when that backward begins
    activations: int  # of a whole micro-batch, saved from forward to backward
    working: int  # what backward needs beside them at its peak
    communication: int  # DeepSpeed's buckets, and weights gathered at stage 3
    sending: int  # gradients, and a bucket with its flat copy, when the last bucket of a backward is sent
    update: int  # copies of gradients, to send them or to apply a step
    context: int  # of the CUDA libraries
    host: int  # what is offloaded to the memory of the host

    @property
    def states(self) -> int:
        """Weights, gradients, masters and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most that is allocated at one time: where backward begins, where it ends, or in the step that follows."""
        begin = self.carried + self.activations + self.working + self.communication
        return self.context + self.weights + self.optimizer + max(begin, self.sending, self.gradients + self.update)


def plan_memory(run: Training) -> MemoryPlan:
    """The memory of one rank of a run."""
    size, stage, n = run.element_bytes, run.zero_stage, run.world_size
    is_16_bit = size == 2
    total = num_parameters(run.spec, run.image_size, run.num_classes, run.pre_logits)
    trained = num_parameters_trained(run)
    share = math.ceil(trained / n)
    own_gradients = share * (4 if run.dtype == "fp32" else ELEMENT_BYTES[run.accumulation_dtype])
    whole_sum = stage == 1 and run.dtype == "bf16" and run.accumulation_dtype == "fp32" and not run.offloads_optimizer
    weights = size * (math.ceil(total / n) if stage == 3 else total)
    optimizer = 4 * run.optimizer_states * trained if stage == 0 else 4 * (1 + run.optimizer_states) * share
    if stage == 0:
        gradients, held, update = 4 * trained, 0, 4 * min(trained, _SENT_AT_ONCE)
    elif whole_sum:
        gradients, held, update = (size + 4) * trained, 4 * trained, size * min(trained, _SENT_AT_ONCE)
    elif stage == 1:  # a copy of what this rank owns; that flattened, and in fp32, when the rest is gone
        gradients, held = size * trained, 0
        update = max(size * share, (2 * size + 4 * is_16_bit) * share - gradients)
    else:
        gradients, held = own_gradients, own_gradients if stage == 3 else 0
        is_flat_in_fp32 = stage == 2 and is_16_bit and run.accumulation_dtype == "fp32"
        update = 0 if is_flat_in_fp32 else own_gradients + 4 * share * (own_gradients < 4 * share)
    carried = gradients if run.accumulation_steps > 1 else held
    host = 0
    if run.offloads_optimizer:
        host, optimizer, update = optimizer + 4 * share, 0, 0
        sum_on_gpu = 4 * share if stage < 3 and is_16_bit and run.accumulation_dtype == "fp32" else 0
        if stage == 1:
            gradients += sum_on_gpu
        else:
            gradients, carried = sum_on_gpu, sum_on_gpu if run.accumulation_steps > 1 else 0
    communication = sending = 0
    if stage and not whole_sum:
        communication = size * run.reduce_bucket * (2 if run.overlap_comm and stage < 3 else 1)
        in_bucket = min(run.reduce_bucket, trained)
        summed = gradients if stage == 1 else max(carried, math.ceil(gradients * (1 - in_bucket / trained)))
        sending = summed + communication + size * in_bucket * (stage > 1)
    if stage == 3:
        communication += size * min(total, run.max_live_parameters)
    saved = run.micro_batch * saved_activation_bytes(run)
    return MemoryPlan(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        carried=carried,
        activations=saved + stem_kernel_bytes(run),
        working=run.micro_batch * backward_bytes(run) + recomputed_kernel_bytes(run) - saved,
        communication=communication,
        sending=sending,
        update=update,
        context=CONTEXT_BYTES if run.on_gpu else 0,
        host=host,
    )


def choose_checkpointing(run: Training, memory_bytes: float) -> Checkpointing:
    """The kind of activation checkpointing that recomputes least and fits; `full` where none does."""
    modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for mode in modes:
        if plan_memory(replace(run, activation_checkpointing=mode)).peak <= memory_bytes:
            return mode
    return "full"


def advice(run: Training, memory_bytes: float | None) -> str:
    """What a run that ran out of memory can do, a line for each way, with its predicted peak.

    A way counts when it fits 90 % of the memory; where that is unknown, or was predicted to hold the run, when it needs
    three quarters of what the run was predicted to need.
    """
    peak = plan_memory(run).peak
    limit = USABLE * memory_bytes if memory_bytes is not None else peak
    if peak <= limit:
        limit = 0.75 * peak
    share = run.micro_batch * run.accumulation_steps
    modes: tuple[Checkpointing, ...] = ("selective", "full")
    ways = [(f"--activation-checkpointing {mode}", replace(run, activation_checkpointing=mode)) for mode in modes]
    for size in (size for size in range(run.micro_batch - 1, 0, -1) if share % size == 0):
        smaller = replace(run, micro_batch=size, accumulation_steps=share // size)
        if plan_memory(smaller).peak <= limit or size == 1:
            ways.append((f"--micro-batch-size {size}, the global batch stays (--auto-micro-batch finds it)", smaller))
            break
    lines = [f"this run was predicted to need {peak / GIB:.1f} GiB a rank; smaller ways to the same result:"]
    lines += [
        f"  {text}: {plan_memory(way).peak / GIB:.1f} GiB" for text, way in ways if plan_memory(way).peak <= limit
    ]
    if len(lines) == 1:
        lines = [
            f"this run was predicted to need {peak / GIB:.1f} GiB a rank, and none of its batch or recomputation helps"
        ]
    pixels = "x".join(map(str, run.image_size))
    command = (
        f"python tools/plan.py --model {run.spec.name} --image-size {pixels} --gpus {run.world_size} --gpu-memory GIB"
    )
    return "\n".join([*lines, f"all ways: {command}"])


def num_parameters_trained(run: Training) -> int:
    """How many parameters `train` names."""
    spec, size = run.spec, run.image_size
    if run.train == "all":
        return num_parameters(spec, size, run.num_classes, run.pre_logits)
    headless = num_parameters(spec, size, 0)
    head = num_parameters(spec, size, run.num_classes, run.pre_logits) - headless
    if run.train == "head":
        return head
    pool = headless - num_parameters(replace(spec, pooling="gap"), size, 0) if spec.pooling == "map" else 0
    return head + pool + 2 * spec.width + run.num_trained_blocks * block_parameters(spec)


def block_parameters(spec: ModelSpec) -> int:
    """Parameters of one encoder block."""
    smallest = (pixels_per_token(spec),) * 2
    one, two = (num_parameters(replace(spec, depth=depth), smallest, 0) for depth in (1, 2))
    return two - one


def saved_activation_bytes(run: Training) -> int:
    """Bytes of one image that forward keeps for backward."""
    return _image_and_stem_bytes(run) + sum(_block_bytes(run)) + _tail_bytes(run)


def backward_bytes(run: Training) -> int:
    """Bytes of one image at the peak of backward: what was saved, what is computed again, and gradients on their way.

    The peak is at the last block, where the tail's activations are gone and the gradients of the residual road and of
    one side of the GELU have come, or at a unit of the stem, where all blocks' are gone.
    """
    spec, size = run.spec, run.element_bytes
    peaks = [saved_activation_bytes(run)]
    if run.num_trained_blocks:
        again = _block_bytes(replace(run, activation_checkpointing="none"))[-1] - _block_bytes(run)[-1]
        gradients = run.num_tokens * size * (spec.width + spec.mlp)
        peaks.append(peaks[0] - _tail_bytes(run) + again + gradients)
    if run.train == "all":
        kept = _image_bytes(run)
        for unit, whole in zip(_stem(run), _stem(replace(run, activation_checkpointing="none")), strict=True):
            peaks.append(kept + whole.kept + 2 * unit.came_out)
            kept += unit.kept
    return max(peaks)


def _image_and_stem_bytes(run: Training) -> int:
    kept = _image_bytes(run)
    if run.train == "all":
        if run.spec.resnet is None:
            kept += _image_bytes(run)  # as patches
        kept += sum(unit.kept for unit in _stem(run)) + run.num_tokens * run.spec.width * _mask_bytes(run)
    return kept


def _image_bytes(run: Training) -> int:
    height, breadth = run.image_size
    return run.element_bytes * run.spec.in_channels * height * breadth


def _block_bytes(run: Training) -> list[int]:
    """What every trained block keeps of one image."""
    spec, size, mask = run.spec, run.element_bytes, _mask_bytes(run)
    width, mlp, log_sums = spec.width, spec.mlp, 4 * spec.heads
    whole = size * (8 * width + 2 * mlp) + log_sums + 2 * _NORM_STATISTICS + mask * (2 * width + mlp)
    if spec.qk_norm:
        whole += size * 2 * width + 2 * spec.heads * _NORM_STATISTICS
    if spec.layer_scale is not None:
        whole += size * 2 * width
    a_token = {"none": whole, "selective": size * (7 * width + mlp) + log_sums, "full": size * width}
    trained = range(spec.depth - run.num_trained_blocks, spec.depth)
    return [run.num_tokens * a_token[_mode_of(run.activation_checkpointing, index)] for index in trained]


def _tail_bytes(run: Training) -> int:
    """What is kept of one image behind the blocks: the last norm's input and output, and the pool's keys and values."""
    size, pooling = run.element_bytes * run.spec.width, run.spec.pooling
    if run.train == "head":
        return run.num_tokens * size if pooling == "token" else size  # the class token holds all that it lies among
    kept = {"token": 2, "gap": 1, "map": 4}[pooling]
    return run.num_tokens * (kept * size + _NORM_STATISTICS)


def _mask_bytes(run: Training) -> int:
    """Bytes of an element of a dropout mask."""
    return (1 if run.on_gpu else run.element_bytes) if run.dropout else 0


_NORM_STATISTICS = 8  # a mean and a deviation in fp32


def _mode_of(mode: Checkpointing, index: int) -> Literal["none", "selective", "full"]:
    """What becomes of one block, or of one unit of the stem."""
    if isinstance(mode, int):
        return "none" if index % mode else "full"
    return mode


def stem_kernel_bytes(run: Training) -> int:
    """Bytes that standardising the stem's kernels keeps, once a micro-batch: in fp32, centred, and as it is used."""
    if run.train != "all":
        return 0
    return _kernel_bytes(run) * sum(unit.live_kernels for unit in _stem(run))


def recomputed_kernel_bytes(run: Training) -> int:
    """Bytes of the same for the unit of the stem with the most kernels that backward standardises again."""
    if run.train != "all":
        return 0
    pairs = zip(_stem(run), _stem(replace(run, activation_checkpointing="none")), strict=True)
    return _kernel_bytes(run) * max((whole.live_kernels - unit.live_kernels for unit, whole in pairs), default=0)


def _kernel_bytes(run: Training) -> int:
    return 8 if run.dtype == "fp32" else 10


@dataclass(frozen=True)
class _Unit:
    """The root or a unit of a hybrid's stem: bytes of one image kept and put out, numbers in kernels that are kept."""

    kept: int
    came_out: int
    live_kernels: int


def _stem(run: Training) -> Iterator[_Unit]:
    """The root and the units of a hybrid's stem in order, and last the patch embedding, which keeps the stem's map."""
    spec, size = run.spec, run.element_bytes
    if spec.resnet is None:
        return
    (height, breadth), channels = run.image_size, spec.resnet_width
    mode = _mode_of(run.activation_checkpointing, 0)
    halves, quarters = (_down(height, 2), _down(breadth, 2)), (_down(height, 4), _down(breadth, 4))
    convolved, pooled = channels * math.prod(halves), channels * math.prod(quarters)
    kept = 0  # its input is the image
    if mode != "full":
        kept += size * convolved
    if mode == "none":  # the padded image, what the ReLU gave, the same padded for the pool, whence each maximum came
        kept += size * (spec.in_channels * _padded(height, 7, 2) * _padded(breadth, 7, 2) + convolved)
        kept += size * channels * _padded(halves[0], 3, 2) * _padded(halves[1], 3, 2) + _INDEX_BYTES * pooled
    yield _Unit(kept, size * convolved, 49 * spec.in_channels * channels * (mode == "none"))
    (height, breadth), index = quarters, 0
    for stage, units in enumerate(spec.resnet):
        inner = spec.resnet_width * 2**stage
        for unit in range(units):
            index += 1
            mode, stride = _mode_of(run.activation_checkpointing, index), 2 if stage > 0 and unit == 0 else 1
            below, above = height * breadth, _down(height, stride) * _down(breadth, stride)
            kept, kernels = channels * below, 0
            if mode != "full":  # what the convolutions gave
                kept += inner * below + (inner + 4 * inner) * above + 4 * inner * above * (unit == 0)
            if mode == "none":  # what the ReLUs gave, and the padded map
                kept += inner * (below + _padded(height, 3, stride) * _padded(breadth, 3, stride) + above)
                kernels = channels * inner + 13 * inner * inner + channels * 4 * inner * (unit == 0)
            height, breadth, channels = _down(height, stride), _down(breadth, stride), 4 * inner
            yield _Unit(size * kept, size * channels * above, kernels)
    yield _Unit(size * channels * height * breadth, 0, 0)


_INDEX_BYTES = 8  # of the place of a maximum in a pool


def _down(side: int, stride: int) -> int:
    return -(-side // stride)


def _padded(side: int, kernel: int, stride: int) -> int:
    """A side after the padding that XLA calls SAME."""
    return side + max((-(-side // stride) - 1) * stride + kernel - side, 0)


# Elements of gradients that DeepSpeed sends in one piece where it has no buckets (MEMORY_OPT_ALLREDUCE_SIZE).
_SENT_AT_ONCE = 500_000_000
