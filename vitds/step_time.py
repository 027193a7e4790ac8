"""How long a training step takes, predicted from stated constants and not measured. No torch.

    step = accumulation steps * micro-batch + communication that is not hidden + update

A micro-batch is a roofline: matrix products at a share of the matrix peak, attention at another share over tiles of 128
tokens, all else at the memory's rate: 8 + 2F/D passes over a token forward and 13 + 3F/D backward, every pass reading
or writing 2D bytes in 16 bits. Recomputed blocks go forward once more. Small micro-batches fill the device badly:
tokens / (tokens + `filling_tokens`) of the rate; and none is faster than the host, which prepares every parameter.

Bytes that one of n ranks sends in a ring, V being the gradients in the precision they travel in, W all weights:

| ZeRO | what DeepSpeed 0.19.8 does                                                            | V (n - 1) / n times |
|------|---------------------------------------------------------------------------------------|---------------------|
| 0    | all-reduce of the gradients once a step                                               | 2                   |
| 1    | the same, then the weights are gathered                                               | 2 + 1               |
| 2    | an all-reduce after every one of A micro-batches, then the weights are gathered       | 2A + 1              |
| 3    | weights gathered, the share r of the trained ones forward and backward, and gradients | (W / V + 1 + r) A   |
|      | scattered, in every micro-batch                                                       |                     |

At stage 3 what fits into `max_live_parameters` stays gathered from forward to backward, the share 1 - r of the weights.
Norms and biases of at most stage3_param_persistence_threshold elements are gathered once a step, each by itself; that
counts as collectives, and is left out of the bytes. The tests count all this in the collectives of real engines, to the
byte but for norms and flags, and in the kernel. gloo scatters by an all-reduce, V (n - 1) / n more in a micro-batch of
stage 3; else it sends what a ring does.

Between nodes, rings run through the network cards of all GPUs of a node side by side; every collective adds a latency
per hop. The constants of `Machine` say of themselves what was measured and what is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitds.flops import forward_flops
from vitds.memory_plan import Training, num_parameters_trained
from vitds.model.registry import num_parameters

_TILE = 128  # tokens
_MATRICES, _SMALL = 4, 8  # parameters of a block
_SMALL_AROUND = 7  # around the blocks: the class token, positions, a norm, a head of few classes, a bias


@dataclass(frozen=True)
class Machine:
    """What the prediction knows of GPUs and wires; rates in FLOP/s and bytes/s."""

    matrix_rate: float = 790e12  # of a large bf16 product on an H200, measured (8192^3: 769 to 798)
    fp32_rate: float = 50e12  # assumed; the datasheet has 67
    memory_rate: float = 4.3e12  # of an H200, measured
    linear_share: float = 0.85  # of the matrix rate at the shapes of a ViT; assumed
    attention_share: float = 0.65  # assumed
    filling_tokens: float = 2500.0  # of a micro-batch at which half the rate is reached; assumed
    # Of one parameter tensor in one micro-batch, by ZeRO stage: measured on one CPU thread with a model of 296 tensors.
    host_s_per_tensor: tuple[float, ...] = (188e-6, 224e-6, 243e-6, 488e-6)
    update_bytes: float = 30.0  # read and written of each trained parameter when AdamW applies a step
    host_link_rate: float = 50e9  # between a GPU and the host; assumed
    host_update_rate: float = 20e9  # of an optimizer on the host, bytes of states a second; assumed
    gpus_per_node: int = 8
    rate_in_node: float = 340e9  # NVLink, achieved; assumed
    rate_between_nodes: float = 42e9  # of each GPU's network card, achieved; assumed
    latency_in_node_s: float = 6e-6  # of a hop; assumed
    latency_between_nodes_s: float = 12e-6  # assumed
    overlap: float = 0.0  # share of backward that hides communication; DeepSpeed hides none below stage 3 by default

    def described(self) -> str:
        """The constants in a line."""
        return (
            f"{self.matrix_rate / 1e12:.0f} TFLOP/s matrix peak ({self.linear_share:.0%} in linear layers, "
            f"{self.attention_share:.0%} in attention), {self.memory_rate / 1e12:.1f} TB/s memory, "
            f"{self.gpus_per_node} GPUs a node, {self.rate_in_node / 1e9:.0f} GB/s inside and "
            f"{self.rate_between_nodes / 1e9:.0f} GB/s between nodes, {self.overlap:.0%} of backward overlapped; "
            f"a micro-batch takes the host at least {1e6 * self.host_s_per_tensor[1]:.0f} us a parameter tensor "
            f"(ZeRO-3: {1e6 * self.host_s_per_tensor[3]:.0f})"
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one global step, and how many images it has."""

    compute_s: float
    communication_s: float  # that is not hidden behind backward
    update_s: float
    global_batch: int

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.communication_s + self.update_s

    @property
    def images_per_s(self) -> float:
        """Of all ranks together."""
        return self.global_batch / self.total_s


def step_time(run: Training, machine: Machine) -> StepTime:
    """The time of a global step in which the whole model is trained."""
    accumulation_steps = run.accumulation_steps
    forward_s, recomputed_s = _forward_s(run, machine)
    backward_s = 2 * forward_s + recomputed_s
    host_s = 12 * run.spec.depth * machine.host_s_per_tensor[run.zero_stage]
    compute_s = accumulation_steps * max(forward_s + backward_s, host_s)
    wire_s = wire_bytes(run) / _rate(run, machine) + num_collectives(run) * _latency_s(run, machine)
    hidden_s = machine.overlap * backward_s * (accumulation_steps if run.zero_stage >= 2 else 1)
    return StepTime(
        compute_s=compute_s,
        communication_s=max(0.0, wire_s - hidden_s),
        update_s=_update_s(run, machine),
        global_batch=run.micro_batch * accumulation_steps * run.world_size,
    )


def wire_bytes(run: Training) -> float:
    """Bytes that one rank sends in a global step, by the table above; what a norm or a flag takes is left out."""
    n, trained, steps = run.world_size, num_parameters_trained(run), run.accumulation_steps
    elements = {
        0: 2 * trained,
        1: 3 * trained,
        2: (2 * steps + 1) * trained,
        3: (_num_weights(run) + (1 + _gathered_again(run)) * trained) * steps,
    }[run.zero_stage]
    return elements * run.element_bytes * (n - 1) / n


def num_collectives(run: Training) -> int:
    """How many collectives a global step has, but for a handful that buckets waste.

    At stage 3 weights are gathered ahead, a `prefetch_bucket` at a time, until `max_live_parameters` are there; from
    then on matrix by matrix, as others are given back. What persists is gathered at the end, each parameter by itself.
    """
    if run.world_size == 1:
        return 0
    blocks, trained = run.spec.depth, num_parameters_trained(run)
    reduces = math.ceil(trained / run.reduce_bucket) * (run.accumulation_steps if run.zero_stage >= 2 else 1)
    if run.zero_stage == 0:
        return reduces
    if run.zero_stage < 3:
        return reduces + 2  # the weights, and a norm
    live = min(_num_weights(run), run.max_live_parameters)
    ahead = min(_MATRICES * blocks, math.ceil(live / max(1, run.prefetch_bucket)))
    one_by_one = round(_gathered_again(run) * _MATRICES * (blocks + run.num_trained_blocks))
    return (ahead + one_by_one) * run.accumulation_steps + reduces + _SMALL * blocks + _SMALL_AROUND + 1


def _forward_s(run: Training, machine: Machine) -> tuple[float, float]:
    """Seconds of a micro-batch's forward, and of what backward computes again."""
    spec, tokens, size = run.spec, run.num_tokens, run.element_bytes
    peak = machine.fp32_rate if run.dtype == "fp32" else machine.matrix_rate
    filled = run.micro_batch * tokens / (run.micro_batch * tokens + machine.filling_tokens)
    attention = 4 * tokens * tokens * spec.width * spec.depth
    linear = forward_flops(spec, run.image_size, run.num_classes, run.pre_logits) - attention
    tiled = 4 * (math.ceil(tokens / _TILE) * _TILE) ** 2 * spec.width * spec.depth
    products_s = (linear / machine.linear_share + tiled / machine.attention_share) / (peak * filled)
    ratio = spec.mlp / spec.width
    pass_s = tokens * spec.width * size * spec.depth / machine.memory_rate
    # Backward is counted as two forwards; its passes over memory are 13 + 3F/D, about three halves of forward's.
    elementwise_s = pass_s * (21 + 5 * ratio) / 3
    mode = run.activation_checkpointing
    share = (
        {"none": 0.0, "selective": 0.0, "full": 1.0}[mode]
        if isinstance(mode, str)
        else math.ceil(spec.depth / mode) / spec.depth
    )
    again_s = share * (products_s + elementwise_s) + (mode == "selective") * pass_s * (8 + 2 * ratio)
    return run.micro_batch * (products_s + elementwise_s), run.micro_batch * again_s


def _update_s(run: Training, machine: Machine) -> float:
    trained = num_parameters_trained(run) / (run.world_size if run.zero_stage else 1)
    if run.offloads_optimizer:
        states = 4 * (1 + run.optimizer_states) * trained
        return trained * (4 + run.element_bytes) / machine.host_link_rate + states / machine.host_update_rate
    return trained * machine.update_bytes / machine.memory_rate


def _rate(run: Training, machine: Machine) -> float:
    """Bytes a second of rings over all ranks, which enter a node through the network card of each of its GPUs."""
    if run.world_size <= machine.gpus_per_node:
        return machine.rate_in_node
    return min(machine.rate_in_node, machine.gpus_per_node * machine.rate_between_nodes)


def _latency_s(run: Training, machine: Machine) -> float:
    """Seconds that one collective waits for its hops: a ring inside a node, a tree between nodes."""
    nodes = math.ceil(run.world_size / machine.gpus_per_node)
    inside = min(run.world_size, machine.gpus_per_node) - 1
    return inside * machine.latency_in_node_s + math.ceil(math.log2(nodes)) * machine.latency_between_nodes_s


def _num_weights(run: Training) -> int:
    return num_parameters(run.spec, run.image_size, run.num_classes, run.pre_logits)


def _gathered_again(run: Training) -> float:
    """The share of the trained weights that stage 3 gathers anew in backward."""
    return 1 - min(1.0, run.max_live_parameters / num_parameters_trained(run))
