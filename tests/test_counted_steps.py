"""Steps of the real engine on two ranks, counted: bytes on the wire, bytes in memory, seconds on a slow wire.

The predictions are `wire_bytes`, `num_collectives` and `step_time` of vitds/step_time.py and `plan_memory` of
vitds/memory_plan.py, of the run that the same configuration file makes.
"""

import json
import math
import os
import subprocess
from dataclasses import replace

import pytest
from rank_processes import last_json, run_ranks
from tiny_dataset import write_dataset

from vitds.memory_plan import num_parameters_trained, plan_memory
from vitds.preflight import plan_run
from vitds.step_time import Machine, num_collectives, step_time, wire_bytes

pytestmark = pytest.mark.ranks

WORKER = "tests/workers/counted_steps.py"
# Every parameter has an even number of elements, so that two ranks share it without padding.
SMALL = "custom:width=64,depth=4,heads=4,mlp=256,patch=4"
LARGEST = 64 * 256  # elements of a parameter of it
SENDING = "custom:width=192,depth=3,heads=4,mlp=768,patch=4"  # 5.4 MB in fp32, and next to nothing to compute
NORMS_AND_FLAGS = 16  # bytes
ODDS_AND_ENDS = 1000  # bytes alive: counters, norms, the loss
NOTHING_PERSISTS = {"stage3_param_persistence_threshold": 0}
HALF = {name: 100_000 for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance")}
NOTHING_STAYS = {name: 1 for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance")}
BIASES_PERSIST = {"stage3_param_persistence_threshold": 1000}
CASES = {  # ZeRO stage, precision, micro-batches, zero_optimization; stage 3 patches torch in its process: last
    "0 fp32": (0, "fp32", 1, {}),
    "1 fp32": (1, "fp32", 2, {}),
    "1 bf16": (1, "bf16", 2, {}),
    "2 bf16": (2, "bf16", 2, {}),
    # The reuse distance is DeepSpeed's default, and keeps all of them.
    "3 bf16": (3, "bf16", 2, NOTHING_PERSISTS | {"stage3_max_live_parameters": 100_000}),
    "3 fp32": (3, "fp32", 1, NOTHING_PERSISTS | HALF | {"stage3_prefetch_bucket_size": 100_000}),
}
FROZEN = {  # the last entry is of "vitds"; nothing stays gathered in the second, so that backward gathers again
    "3 fp32 head": (3, "fp32", 1, NOTHING_PERSISTS, {"train": "head"}),
    "3 fp32 last-2": (3, "fp32", 2, NOTHING_PERSISTS | NOTHING_STAYS, {"train": "last-2"}),
}
PERSISTING = {  # norms and biases, as they do by default in models of a usual size
    "3 bf16 persisting": (3, "bf16", 2, BIASES_PERSIST),
    "3 fp32 persisting": (3, "fp32", 1, BIASES_PERSIST | HALF | {"stage3_prefetch_bucket_size": 50_000}),
    "3 fp32 persisting, none stays": (3, "fp32", 2, BIASES_PERSIST | NOTHING_STAYS | {"reduce_bucket_size": 100_000}),
}
COUNTED = [name for name, (stage, *_) in CASES.items() if stage < 3] + list(PERSISTING)
A_HANDFUL = 5


class Orders:
    """Configuration files of cases, the commands for the worker, and the runs as the predictions see them."""

    def __init__(self, directory, model, cases, rates=()):
        data = str(write_dataset(directory / "data", classes=tuple("abcdefgh"), train=(5,) * 8, val=(2,) * 8))
        self.runs, orders = {}, {}
        for name, (stage, dtype, accumulation, zero, *ours) in cases.items():
            config = directory / f"{name}.json"
            content = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": accumulation,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": {"stage": stage, **zero},
                "vitds": {"model": model, "image_size": 4, "num_steps": 10} | dict(*ours),
            }
            config.write_text(json.dumps(content | ({} if dtype == "fp32" else {dtype: {"enabled": True}})))
            arguments = ["--deepspeed_config", str(config), "--data", data]
            self.runs[name] = plan_run(arguments, {"WORLD_SIZE": "2", "RANK": "0"}).memory
            orders[name] = {"config": str(config), "data": data, "rates": rates}
        self.command = [WORKER, json.dumps(orders)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The runs of `CASES` and others, and what each of the two ranks counted."""
    orders = Orders(tmp_path_factory.mktemp("counted"), SMALL, CASES | FROZEN | PERSISTING)
    return orders.runs, [last_json(output) for output in run_ranks(orders.command, 2)]


def sent_in_a_ring(collectives, n=2):
    """Bytes that a rank sends for collectives of so many bytes, by kind."""
    passes = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1}
    return sum(passes[kind] * num_bytes for kind, num_bytes in collectives.items()) * (n - 1) / n


@pytest.mark.parametrize("name", [*CASES, *FROZEN])
def test_the_collectives_of_a_step_are_those_that_wire_bytes_predicts(name, counted):
    runs, ranks = counted
    for rank in ranks:
        sent = sent_in_a_ring(rank[name]["collectives"])
        # Half of the weights do not stay gathered: at least that, in whole parameters.
        more = 4 * LARGEST / 2 if name == "3 fp32" else 0
        assert 0 <= sent - wire_bytes(runs[name]) <= NORMS_AND_FLAGS + more


@pytest.mark.parametrize("name", COUNTED)
def test_there_are_as_many_collectives_as_num_collectives_predicts(name, counted):
    runs, ranks = counted
    for rank in ranks:
        assert sum(rank[name]["calls"].values()) == pytest.approx(num_collectives(runs[name]), abs=A_HANDFUL)


@pytest.mark.parametrize("name", CASES)
def test_the_states_of_an_engine_are_those_that_plan_memory_predicts(name, counted):
    """When the last backward of a step has ended, and when the step has."""
    runs, ranks = counted
    run = runs[name]
    plan, share = plan_memory(run), math.ceil(num_parameters_trained(run) / run.world_size)
    kept, gradients, split = plan_memory(replace(run, accumulation_steps=1)).carried, plan.gradients, 0
    if run.zero_stage == 1 and run.dtype == "fp32":  # the others' are gone by then, but for those of a shared parameter
        gradients, split = run.element_bytes * share, run.element_bytes * LARGEST
    bucket = run.element_bytes * run.reduce_bucket if run.zero_stage == 3 else 0  # it stays there
    always = plan.weights + plan.optimizer + bucket
    for rank in ranks:
        alive = rank[name]["alive"]
        assert 0 <= alive["backward"] - (always + gradients) <= ODDS_AND_ENDS + split
        assert 0 <= alive["step"] - (always + kept) <= ODDS_AND_ENDS


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step_is_what_plan_memory_predicts(name, counted):
    """One image of one token: what counts is where buckets are sent and where the step is applied."""
    runs, ranks = counted
    run = runs[name]
    copies_of_gloo = run.element_bytes * min(run.reduce_bucket, num_parameters_trained(run))  # to scatter them
    expected = plan_memory(run).peak + copies_of_gloo * (run.zero_stage == 3)
    assert ranks[0][name]["alive"]["peak"] == pytest.approx(expected, rel=0.05)


RATES = (4e6, 2e6)  # bytes a second that a rank can send
SENDING_CASES = {
    "0 fp32": (0, "fp32", 1, {}),
    "1 fp32": (1, "fp32", 1, {}),
    "1 bf16": (1, "bf16", 1, {}),
    "2 fp32": (2, "fp32", 2, {}),
    "3 fp32": (3, "fp32", 1, NOTHING_PERSISTS),
}


@pytest.fixture(scope="module")
def on_a_wire(tmp_path_factory):
    """The runs of `SENDING_CASES`, and what rank 0 counted on a free wire and at each of `RATES`.

    The wire is the loopback of a network namespace, which the two ranks have for themselves and share: they send at the
    same time, so each has half of its rate.
    """
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    name = f"vitds-wire-{os.getpid()}"
    within = ["ip", "netns", "exec", name]
    bucket = ["tbf", "rate", "1gbit", "burst", "128kb", "limit", "8mb"]
    try:
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "-n", name, "link", "set", "lo", "up"],
            [*within, "tc", "qdisc", "add", "dev", "lo", "root", *bucket],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespace with a limited rate here: {done.stderr}")
        orders = Orders(tmp_path_factory.mktemp("wire"), SENDING, SENDING_CASES, [None, *RATES])
        outputs = run_ranks(orders.command, 2, within=within, GLOO_SOCKET_IFNAME="lo")
        yield orders.runs, last_json(outputs[0])
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def sent_by_gloo(run):
    """`wire_bytes`, and what gloo sends more: it scatters gradients by an all-reduce, twice the bytes of a ring."""
    scatters = run.accumulation_steps if run.zero_stage == 3 else 0
    return wire_bytes(run) + scatters * run.element_bytes * num_parameters_trained(run) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SENDING_CASES)
def test_the_kernel_counts_the_bytes_that_wire_bytes_predicts(name, on_a_wire):
    """Headers, acknowledgements and the start of every collective are counted too."""
    runs, counts = on_a_wire
    sent = [wire["sent"] / sent_by_gloo(runs[name]) for wire in counts[name]["wire"]]
    print(
        f"{name}: {sent_by_gloo(runs[name]):,.0f} bytes predicted, counted {', '.join(f'{x:.4f}' for x in sent)} times"
    )
    assert all(1 <= times <= 1.02 for times in sent)


@pytest.mark.slow
@pytest.mark.parametrize("name", SENDING_CASES)
def test_a_slow_wire_takes_the_time_that_step_time_predicts(name, on_a_wire):
    """A step takes as long as on the free wire, and what `step_time` says of the communication.

    The tolerance is 10 %: the free step, a hundredth to a tenth of the whole, is measured on busy cores, and has
    copying in it that is hidden where the wire is slow.
    """
    runs, counts = on_a_wire
    run, (free, *limited) = runs[name], counts[name]["wire"]
    for rate, wire in zip(RATES, limited, strict=True):
        machine = Machine(rate_in_node=rate * wire_bytes(run) / sent_by_gloo(run))
        wire["predicted_s"] = free["step_s"] + step_time(run, machine).communication_s
        print(
            f"{name} at {rate / 1e6:g} MB/s: {wire['predicted_s']:.3f} s predicted, {wire['step_s']:.3f} s measured"
            f" ({wire['step_s'] / wire['predicted_s'] - 1:+.1%}), {free['step_s']:.3f} s on the free wire"
        )
    assert [w["step_s"] for w in limited] == pytest.approx([w["predicted_s"] for w in limited], rel=0.1)
