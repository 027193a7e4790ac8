"""A step of a run again: what it saw, proved by the hash of its pixels that training logged."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitds.data.loader import MicroBatch
from vitds.errors import CheckpointError, UsageError
from vitds.feed import global_batch, open_data
from vitds.log import METRICS_NAME
from vitds.preflight import Plan, plan_run
from vitds.step_view import Seen, seen_in, sheet_of

RESOLVED_NAME = "config.resolved.json"


@dataclass(frozen=True)
class Replayed:
    """A step as it was made again; `logged_hash` is None when the step has no line in the log."""

    num_images: int
    pixel_hash: str
    logged_hash: str | None


def plan_of(run_dir: Path, data: str | None = None) -> Plan:
    """The plan of a run from its directory, on as many ranks as it had; `data` where its data lie elsewhere now.

    Raises: CheckpointError when the directory holds no run; whatever its plan raises today.
    """
    path = run_dir / RESOLVED_NAME
    try:
        config = json.loads(path.read_text())
        per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        num_ranks = config["train_batch_size"] // per_rank
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        raise CheckpointError(f"holds no run: {RESOLVED_NAME} is missing or damaged", where=str(run_dir)) from None
    # Where its weights came from changes no image, and may be gone.
    flags = ["--deepspeed_config", str(path), "--set", "pretrained=null", "--resume", "auto"]
    flags += ["--data", data] if data else []
    return plan_run(flags, {"WORLD_SIZE": str(num_ranks), "RANK": "0"})


def replay(
    plan: Plan,
    run_dir: Path,
    step: int,
    out: Path,
    num_shown: int,
    with_pixels: bool = False,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Replayed:
    """Make step `step` (1 is the first, as logged) of a run again, and write what it saw to `out`.

    samples.csv has a row an image, in the order of the global batch: position in the stream, sample id, shard, key,
    target. sheet.png shows the first `num_shown`. `with_pixels` adds images.npy, the very input of the model.

    Shapes: images.npy (B, 3, H, W) float32, normalised and mixed, before the cast to the run's dtype.
    Raises: UsageError for a step that the run does not have; CheckpointError when `out` cannot be written.
    """
    if step > plan.num_steps:
        raise UsageError(f"--step {step}: the run has {plan.num_steps} steps")
    dataset, hashes = open_data(plan, "train"), [0]
    shown: list[Seen] = []
    num_images = plan.batch.global_batch
    lines = list(_logged(run_dir))
    number = _place_in_stream(step, lines)
    try:
        out.mkdir(parents=True, exist_ok=True)
        shape = (num_images, 3, *plan.image_size)
        pixels = np.lib.format.open_memmap(out / "images.npy", "w+", np.float32, shape) if with_pixels else None

        def noted() -> Iterator[MicroBatch]:
            first = 0
            for micro_batch in global_batch(plan, number + 1):
                hashes.append(micro_batch.pixel_hash)
                if pixels is not None:
                    pixels[first : first + micro_batch.valid] = micro_batch.images.numpy()
                first += micro_batch.valid
                yield micro_batch
                on_progress(micro_batch.valid)

        with open(out / "samples.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["position", "sample_id", "shard", "key", "target"])
            for position, seen in enumerate(seen_in(plan, noted()), start=number * num_images):
                rows.writerow([position, seen.sample_id, *dataset.where(seen.sample_id), seen.target])
                if len(shown) < num_shown:
                    shown.append(seen)
        sheet_of(plan, step, shown).save(out / "sheet.png")
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror}", where=str(error.filename or out)) from None
    logged = (line.get("pixel_hash") for line in lines if line["step"] == step and line["split"] == "train")
    return Replayed(num_images, f"{sum(hashes) % 2**64:016x}", next(logged, None))


def _logged(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log, as far as they are whole."""
    with suppress(OSError):
        yield from (json.loads(text) for text in (run_dir / METRICS_NAME).read_text().splitlines() if text[-1:] == "}")


def _place_in_stream(step: int, lines: Sequence[dict[str, Any]]) -> int:
    """The number of the global batch that a step saw: the step's, but for those left out after a divergence."""
    left_out: list[int] = next((line["left_out"] for line in reversed(lines) if line.get("event") == "rewind"), [])
    number = step - 1
    for one in left_out:  # in order
        number += one <= number
    return number
