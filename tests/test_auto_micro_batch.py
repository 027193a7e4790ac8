"""Real runs whose first steps do not fit in memory: all ranks begin again with less, and see the same samples."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_sets import write_pixels
from rank_processes import ROOT, free_port, run_ranks
from run_directory import config_file, metrics, train_command

from vitds import auto_micro_batch, watchdog
from vitds.auto_micro_batch import smaller_if_out_of_memory
from vitds.data.workers import Maker, WorkerPool
from vitds.ds_config import Batch
from vitds.errors import OutOfMemory
from vitds.faults import faults_named
from vitds.watchdog import Watchdog
from vitds.world import World

BIN = Path(sys.prefix) / "bin"
ROOM_MIB = 340  # holds a step of 4 images of this model, and not one of 8: an image's hidden layers take 32 MiB
MODEL = "custom:width=16,depth=2,heads=2,mlp=8192,patch=4"

VITDS = {"model": MODEL, "image_size": 64, "num_steps": 2, "drop_path": 0.0, "eval_batch_size": 1}
VITDS |= {"data": {"mixup_alpha": 0.2}, "workers": 0, "save_in_background": False}  # threads reserve room too


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("auto-micro-batch") / "data").parent


def command(work: Path, name: str, micro_batch: int, *flags: str, stage: int = 1) -> list[str]:
    (work / name).mkdir()
    config = config_file(
        work / name,
        stage,
        train_batch_size=16,
        gradient_accumulation_steps="auto",
        scheduler={"type": "constant"},
        vitds=VITDS,
    )
    flags = ("--micro-batch-size", str(micro_batch), *flags)
    _, *words = train_command(config, work / "data", work, name, *flags)
    return ["tests/workers/little_memory.py", *words]


COMPUTES = "forward,backward,update"


def little_memory(
    rank: int, room_mib: int = ROOM_MIB, step: int = 1, name: str = "", phases: str = COMPUTES
) -> dict[str, str]:
    """The environment in which one rank has so little from that step on, and whose threads reserve no room.

    With `name` of a signal, the rank hears it before.
    """
    return {"LITTLE_MEMORY": f"{rank}:{room_mib}:{step}:{name}:{phases}", "MALLOC_ARENA_MAX": "1"}


def seen(work: Path, name: str) -> list[str]:
    return [line["pixel_hash"] for line in metrics(work / name) if line["split"] == "train"]


def in_four(work: Path) -> str:
    """The name of a run of one rank that was given micro-batches of 4, and the memory for them."""
    if not (work / "four").exists():
        run_ranks(command(work, "four", 4), 1, timeout_s=300, **little_memory(-1))
    return "four"


def test_a_single_rank_halves_its_micro_batch_until_it_fits(work):
    asked = ("--auto-micro-batch",)
    (output,) = run_ranks(command(work, "halved", 16, *asked), 1, timeout_s=300, **little_memory(0))
    for before, after, times in ((16, 8, 2), (8, 4, 4)):
        said = f"micro-batch of {before}: all begin again with {after}, accumulated {times} times"
        assert output.count(said) == 1, output[-3000:]
    assert "global batch 16 = 4 a micro-batch x 4 accumulated x 1 rank" in output
    assert metrics(work / "halved") == metrics(work / in_four(work))  # to the last bit, samples and mixup included


def test_the_second_step_counts_too_and_the_third_does_not(work):
    """The first update makes the optimizer's moments."""
    asked = "--auto-micro-batch"
    run_ranks(command(work, "second", 8, asked), 1, timeout_s=300, **little_memory(0, step=2))
    assert metrics(work / "second") == metrics(work / in_four(work))  # step 1 was logged, and is there once
    third = command(work, "third", 8, asked, "--num-steps", "3")
    (output,) = run_ranks(third, 1, exit_code=5, timeout_s=300, **little_memory(0, step=3))
    assert "begin again" not in output


def test_a_request_to_stop_outlives_the_process_that_heard_it(work):
    asked = command(work, "stopped", 8, "--auto-micro-batch")
    (output,) = run_ranks(asked, 1, exit_code=75, timeout_s=300, **little_memory(0, name="SIGTERM"))
    assert "all begin again with 4" in output and "stopped before training began" in output


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "rank"), [(3, 1), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_ranks_that_wait_for_one_that_is_out_of_memory_begin_again_with_it(work, stage, rank):
    name = f"stage{stage}-rank{rank}"
    outputs = run_ranks(
        command(work, name, 8, "--auto-micro-batch", stage=stage), 2, timeout_s=300, **little_memory(rank)
    )
    assert "micro-batch of 8: all begin again with 4, accumulated 2 times" in outputs[rank], outputs[rank][-3000:]
    assert "global batch 16 = 4 a micro-batch x 2 accumulated x 2 ranks" in outputs[0]
    assert "rank lost" not in "".join(outputs) and "Traceback" not in "".join(outputs)
    assert seen(work, name) == seen(work, in_four(work)) and len(seen(work, name)) == 2


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_data_process_outlives_its_rank_dead_or_alive(work, world_size):
    asked = command(work, f"workers-{world_size}", 8, "--auto-micro-batch", "--workers", "2")
    outputs = run_ranks(asked, world_size, timeout_s=300, **little_memory(0))
    for output in outputs:
        assert "begins again with 0 children" in output, output[-3000:]
        assert "data process" not in output
    assert seen(work, f"workers-{world_size}") == seen(work, in_four(work))


class Slow(Maker):
    def make(self, positions):
        time.sleep(100)


def test_a_data_process_that_was_ended_is_not_replaced_before_its_rank_is():
    """By the thread that waits for it, while another one is about to replace the whole process."""
    is_left, said = threading.Event(), []
    watch = Watchdog(World(), hang_timeout_s=60)
    watch.on_begin_again = is_left.set
    pool = WorkerPool(Slow(), [[0]], 1, (1,), 60, said.append, watch.waits_for_data)
    threading.Thread(target=lambda: next(iter(pool)), daemon=True).start()
    watch.begin_again()
    time.sleep(0.5)  # in which it would be
    assert is_left.is_set() and not said and not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("starter", ["deepspeed", "torchrun"])
def test_launchers_do_not_notice(work, starter):
    port = str(free_port())
    launcher = {
        "deepspeed": [BIN / "deepspeed", "-q", "--master_port", port, "--num_gpus", "2"],
        "torchrun": [BIN / "torchrun", "--master_port", port, "--nproc_per_node", "2"],
    }[starter]
    done = subprocess.run(
        [*map(str, launcher), *command(work, starter, 8, "--auto-micro-batch", "--workers", "1")],
        cwd=ROOT,
        env=os.environ | little_memory(1) | {"LOCAL_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(seen(work, starter)) == 2


def test_without_being_asked_or_without_a_smaller_one_the_run_ends_with_advice(work):
    (output,) = run_ranks(command(work, "not-asked", 16), 1, exit_code=5, timeout_s=300, **little_memory(0))
    assert "begin again" not in output and "--auto-micro-batch finds it" in output
    # 20 MiB do not hold the smallest either, for mixup takes images in pairs.
    pair = command(work, "pair", 2, "--auto-micro-batch")
    (output,) = run_ranks(pair, 1, exit_code=5, timeout_s=300, **little_memory(0, 20))
    assert "begin again" not in output and "out of memory" in output


def test_out_of_memory_in_a_validation_is_no_fault_of_the_micro_batch(work):
    asked = command(work, "validation", 4, "--auto-micro-batch", "--eval-batch-size", "16")
    (output,) = run_ranks(asked, 1, exit_code=5, timeout_s=300, **little_memory(0, 64, phases="evaluate"))
    assert "begin again" not in output and "out of memory  evaluate at step 2" in output
    assert "--eval-batch-size 8 needs less: a validation batch has 16 images a rank" in output


class BeganAgain(BaseException):
    """In place of the fresh process; its argument is the micro-batch."""


def run_out_of_memory(error, phase, world_size, monkeypatch):
    """What an error comes to in the second step of a run that asked for smaller micro-batches, and had one of 8."""

    def begin_again(batch):
        raise BeganAgain(batch.micro_batch)

    monkeypatch.setattr(auto_micro_batch, "begin_again", begin_again)
    monkeypatch.setattr(watchdog, "_meet", lambda world: {})  # as where a rank cannot reach rank 0's port
    world = World(world_size=world_size, local_world_size=world_size)
    run = SimpleNamespace(auto_micro_batch=True, data=SimpleNamespace(mixes_pairs=False))
    plan = SimpleNamespace(world=world, run=run, batch=Batch(16 * world_size, 8, 2, world_size))
    with (
        faults_named(0, lambda fault: setattr(fault, "fix", "less")),
        Watchdog(world, hang_timeout_s=60) as watch,
        smaller_if_out_of_memory(plan, watch),
    ):
        for step in (1, 2):
            watch.enter("data", step)
        watch.enter(phase)
        raise error


ON_HOST = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "update"])
def test_a_gpu_may_have_no_memory_for_a_batch_that_is_taken(phase, monkeypatch):
    with pytest.raises(BeganAgain, match="4"):
        run_out_of_memory(OF_A_GPU, phase, 1, monkeypatch)


@pytest.mark.parametrize("error", ON_HOST)
def test_a_host_has_no_less_to_read_with_a_smaller_micro_batch(error, monkeypatch):
    with pytest.raises(BeganAgain):
        run_out_of_memory(error, "forward", 1, monkeypatch)
    with pytest.raises(OutOfMemory):
        run_out_of_memory(error, "data", 1, monkeypatch)


@pytest.mark.parametrize("error", [OF_A_GPU, *ON_HOST])
def test_ranks_that_nobody_can_tell_do_not_begin_again_alone(error, monkeypatch, capsys):
    with pytest.raises(OutOfMemory, match="out of memory") as raised:
        run_out_of_memory(error, "forward", 2, monkeypatch)
    assert raised.value.exit_code == 5 and raised.value.fix == "less"
    assert "begin again" not in capsys.readouterr().err
