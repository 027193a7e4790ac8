"""Runs that are saved on one number of ranks at one ZeRO stage and go on with another, and what must stay the same."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from run_directory import TINY, config_file, metrics, train_command
from warm_ranks import WarmRanks

from vitds.weights.zero import read_checkpoint

SAVED_AT, END = 10, 30
OPTIMIZERS = {
    "sgd": {"type": "SGD", "params": {"lr": 0.03, "momentum": 0.9}},
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05}},
}
CASES = {
    "sgd": ("sgd", {}),
    "adamw": ("adamw", {"weight_decay_on": "matrices"}),
    "ema": ("adamw", {"ema_decay": 0.9}),
    "frozen": ("adamw", {"train": "last-1"}),
    "layer decay": ("adamw", {}),  # switched on between save and load
}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
SECTIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 3}},
}


@dataclass(frozen=True)
class Place:
    """Where a run runs: on how many ranks, at which ZeRO stage."""

    world_size: int
    stage: int

    def __str__(self) -> str:
        return f"{self.world_size}-ranks-stage{self.stage}"


def command(work: Path, data: Path, place: Place, case: str, dtype: str, name: str, *flags: str) -> list[str]:
    """The command of a case at a place; without dropout, whose masks go by micro-batch, and these differ with ranks."""
    optimizer, ours = CASES[case]
    directory = work / f"{place}-{case}-{dtype}"
    directory.mkdir(exist_ok=True)
    config = config_file(
        directory,
        place.stage,
        train_batch_size=12,
        gradient_accumulation_steps=1,
        optimizer=OPTIMIZERS[optimizer],
        vitds={"model": TINY, "num_steps": 40, "dropout": 0.0, "drop_path": 0.0, "save_every": 100, "workers": 0}
        | ours,
        **SECTIONS[dtype],
    )
    return train_command(config, data, work, name, *flags)


def run(ranks: WarmRanks, dtype: str, command: list[object], exit_code: int = 0) -> str:
    """Run a command on all ranks, fp16 on a CPU if need be, and return what rank 0 printed."""
    on_cpu = ["tests/workers/fp16_on_cpu.py"] if dtype == "fp16" else []
    return ranks.run([*on_cpu, *command], exit_code).output


def switched(case: str) -> list[str]:
    """The flags that a run goes on with and was not saved with."""
    return ["--layer-decay", "0.75"] if case == "layer decay" else []


def train_source(ranks: WarmRanks, work: Path, data: Path, place: Place, case: str, dtype: str = "fp32") -> Path:
    """A run that is saved at step 10; beside it, NAME-unbroken, where it went on to step 30 as it was."""
    name = f"{case.replace(' ', '-')}-{dtype}-{place}"
    run(ranks, dtype, command(work, data, place, case, dtype, name, "--stop-at-step", SAVED_AT), exit_code=75)
    shutil.copytree(work / name, work / f"{name}-unbroken")
    flags = [*switched(case), "--stop-at-step", END]
    run(ranks, dtype, command(work, data, place, case, dtype, f"{name}-unbroken", *flags), exit_code=75)
    return work / name


def go_on(ranks: WarmRanks, work: Path, data: Path, place: Place, case: str, dtype: str, source: Path) -> float:
    """Go on with a copy of the source at another place; the largest relative deviation of the losses that follow."""
    name = f"{source.name}-to-{place}"
    shutil.copytree(source, work / name)
    flags = [*switched(case), "--stop-at-step", END]
    output = run(ranks, dtype, command(work, data, place, case, dtype, name, *flags), exit_code=75)
    assert f"resumed at step {SAVED_AT} of 40" in output
    here, unbroken = (metrics(directory)[SAVED_AT:] for directory in (work / name, work / f"{source.name}-unbroken"))
    assert [line["step"] for line in here] == list(range(SAVED_AT + 1, END + 1))
    for key in ("step", "samples_seen", "pixel_hash", "lr", "skipped_steps", "loss_scale"):
        assert [line[key] for line in here] == [line[key] for line in unbroken], key
    shutil.rmtree(work / name)
    return max(abs(one["loss"] - other["loss"]) / other["loss"] for one, other in zip(here, unbroken, strict=True))


def assert_loads_bit_for_bit(
    ranks: WarmRanks, work: Path, data: Path, place: Place, case: str, dtype: str, source: Path
) -> None:
    """Load a source's checkpoint at another place, save it at once, and compare every state of every parameter."""
    out = work / f"{source.name}-resaved-at-{place}"
    arguments = command(work, data, place, case, dtype, source.name, *switched(case))[1:]
    run(ranks, dtype, ["tests/workers/load_and_save.py", out, *arguments])
    before = read_checkpoint(source / f"checkpoints/global_step{SAVED_AT}")
    after = read_checkpoint(out / f"global_step{SAVED_AT}")
    assert (after.world_size, after.zero_stage) == (place.world_size, place.stage)
    expected = {"master", "momentum_buffer"} if case == "sgd" else {"master", "exp_avg", "exp_avg_sq", "step"}
    expected |= {"ema"} if case == "ema" else set()
    assert before.states.keys() == after.states.keys()
    assert before.states.keys() >= expected
    for state in before.states:
        one, other = before.arrays(state), after.arrays(state)
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), (state, name)
            assert state != "step" or one[name] == SAVED_AT
    for key in ("global_steps", "global_samples", "skipped_steps", "vitds"):
        assert before.common[key] == after.common[key], key
    assert before.common["lr_scheduler"]["last_epoch"] == after.common["lr_scheduler"]["last_epoch"] == SAVED_AT
    shutil.rmtree(out)
