"""Steps of the real engine, counted: what they send, which tensors stay alive, how long they take.

counted_steps.py {"NAME": {"config": FILE, "data": DIR, "rates": [BYTES_PER_S, null, ...]}, ...}

One job, a process a rank; each prints {"NAME": COUNTS}. With `rates` the ranks have a loopback for themselves, whose
bytes are counted, once for each of the rates that tc limits a rank to (null: none). Stage 3 patches torch in its
process, so its cases come last.
"""

import gc
import json
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

sys.path.insert(0, "tests")

import torch
import torch.distributed as dist
from counted_memory import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitds.engine import Engine, start_ranks
from vitds.loss import cross_entropy
from vitds.preflight import Plan, plan_run
from vitds.train import _build_engine
from vitds.world import world_from_env


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor by kind of collective, at the operators by which torch calls the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.num_calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            kind = operator.__name__.split(".")[0].strip("_").removesuffix("_base")
            tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
            self.num_bytes[kind] += max(tensor.nbytes for tensor in tensors)
            self.num_calls[kind] += 1
        return operator(*args, **(kwargs or {}))


class Case:
    """A plan with its engine, and the same random images for every micro-batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.images = torch.randn(plan.batch.micro_batch, 3, *plan.image_size)
        self.labels = torch.randint(plan.num_classes, (plan.batch.micro_batch,))

    def build(self) -> None:
        self.engine: Engine = _build_engine(self.plan, device, pretrained=None)

    def step(self) -> None:
        for _ in range(self.plan.batch.accumulation_steps):
            self.forward_and_backward()
            self.engine.step()

    def forward_and_backward(self) -> None:
        self.engine.backward(cross_entropy(self.engine(self.images.to(self.engine.dtype)), self.labels))

    def step_counting(self, live: LiveBytes) -> dict[str, int]:
        """Bytes of all tensors alive when the last backward of a step has ended, when the step has, and at most."""
        gc.collect()
        live.peak = 0
        for index in range(self.plan.batch.accumulation_steps):
            self.forward_and_backward()
            if index == self.plan.batch.accumulation_steps - 1:
                gc.collect()
                backward = live.now()
            self.engine.step()
        gc.collect()
        return {"backward": backward, "step": live.now(), "peak": live.peak}


def sent_bytes() -> int:
    """What the loopback has carried since it is there, headers included."""
    with open("/proc/self/net/dev") as lines:
        fields = next(line for line in lines if line.strip().startswith("lo:"))
    return int(fields.split(":")[1].split()[8])


def limit(rate_bytes_per_s: float | None) -> None:
    """Let the loopback carry so many bytes a second from now on, of all ranks together; None: any number."""
    change = ["tc", "qdisc", "replace", "dev", "lo", "root"]
    if rate_bytes_per_s is None:
        subprocess.run([*change, "pfifo"], check=True)
    else:  # a bucket of two packets, and a queue that drops none
        bucket = ["rate", f"{8 * rate_bytes_per_s:.0f}bit", "burst", "128kb", "limit", "8mb"]
        subprocess.run([*change, "tbf", *bucket], check=True)


def over_the_wire(case: Case, rate_bytes_per_s: float | None) -> dict[str, float]:
    """What a rank sends in a step, where it can send at this rate, and the seconds that the step takes.

    Both are means over some steps. A free step is the fastest of them: other work on the machine only adds.
    """
    if world.is_main:
        limit(rate_bytes_per_s and world.world_size * rate_bytes_per_s)
    dist.barrier()
    before, times = sent_bytes(), [time.perf_counter()]
    for _ in range(3 if rate_bytes_per_s else 9):
        case.step()
        dist.barrier()
        times.append(time.perf_counter())
    steps = [end - start for start, end in pairwise(times)]
    step_s = sum(steps) / len(steps) if rate_bytes_per_s else min(steps)
    return {"sent": (sent_bytes() - before) / len(steps) / world.world_size, "step_s": step_s}


world = world_from_env()
device = start_ranks(world)
gc.freeze()  # what was imported: a collection takes a fifth of a second less
counts = {}
for name, order in json.loads(sys.argv[1]).items():
    case = Case(plan_run(["--deepspeed_config", order["config"], "--data", order["data"]]))
    with LiveBytes() as live:
        case.build()
        case.step()  # the first, in which DeepSpeed notes the order of the modules at stage 3, and gathers more
        alive = case.step_counting(live)
    with Collectives() as collectives:
        case.step()
    wire = [over_the_wire(case, rate) for rate in order["rates"]]
    counts[name] = {"alive": alive, "collectives": collectives.num_bytes, "calls": collectives.num_calls, "wire": wire}
print(json.dumps(counts))
