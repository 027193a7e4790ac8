"""Evaluation: every sample of a split counted once, whatever the world size, batch size or ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from vitds import collectives
from vitds.data.loader import EvalLoader, MicroBatch
from vitds.data.reader import ShardReader
from vitds.engine import DTYPES, Engine, start_ranks
from vitds.errors import CheckpointError, DataError
from vitds.manifest import Manifest, read_manifest
from vitds.predictions import Predictions, summary, write_predictions
from vitds.run_config import DataConfig
from vitds.weights.create import create_model
from vitds.weights_header import resolve_checkpoint
from vitds.world import world_from_env


@torch.no_grad()
def predict(forward: Callable[[Tensor], Tensor], batches: Iterable[MicroBatch]) -> Predictions:
    """Run `forward` over this rank's share and gather all ranks' predictions on every rank; collective."""
    columns: list[tuple[Tensor, ...]] = []
    for batch in batches:
        logits_BL = forward(batch.images).float()
        if batch.valid:
            top = logits_BL.topk(min(5, logits_BL.shape[1]), dim=1).indices
            confidence = logits_BL.softmax(dim=1).amax(dim=1)
            losses = F.cross_entropy(logits_BL, batch.targets, reduction="none")
            columns.append(tuple(t.cpu() for t in (batch.ids, batch.targets, top, confidence, losses)))
    mine = tuple(torch.cat(column).numpy() for column in zip(*columns, strict=True)) if columns else None
    shares = [share for share in collectives.gather(mine) if share is not None]
    joined = [np.concatenate(column) for column in zip(*shares, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return Predictions(*(column[order] for column in joined))


def evaluate_weights(
    weights: str,
    data: str,
    split: str = "val",
    image_size: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    zero_stage: int = 0,
    workers: int = 1,
    output: str | None = None,
) -> dict[str, Any]:
    """Evaluate weights on a split with the transform of the run that they come from, and write the results to `output`.

    Stages 1 and 2 shard gradients and optimizer states only, so without an optimizer they are stage 0; stage 3 shards
    the weights.

    Raises: DataError when the split is missing or its classes are not those of the weights.
    """
    world = world_from_env()
    device = start_ranks(world)
    source, run_dir, info = _described(Path(weights))
    saved = info.get("config", {}).get("vitds", {})
    model = create_model("auto", weights=weights, image_size=image_size).eval()
    dataset = ShardReader(data, split)
    classes = info.get("classes") or dataset.classes
    if dataset.classes != classes:
        raise DataError("the classes of this data are not those that the weights were trained on", where=data)
    if model.spec.in_channels != 3:
        raise DataError(f"images have 3 channels, and the model takes {model.spec.in_channels}", where=data)
    if len(classes) > model.num_classes:
        raise DataError(f"{len(classes)} classes, and the head has {model.num_classes}", where=data)
    if not info.get("classes") and len(classes) != model.num_classes and world.is_main:
        print(
            f"warning  {weights} names no classes and has {model.num_classes} outputs, {data} has {len(classes)} "
            "classes: the figures mean something only if output i is class i"
        )
    precision = DTYPES[dtype or info.get("dtype", "fp32")]
    forward: Callable[[Tensor], Tensor]
    if zero_stage == 3:
        forward = Engine.for_inference(model, precision, device)
    else:
        forward = model.to(device, precision)
    loader = EvalLoader(
        dataset,
        DataConfig(**saved.get("data", {})),
        model.image_size,
        batch_size or saved.get("eval_batch_size", 64),
        world,
        workers=workers,
        device=device,
        dtype=precision,
    )
    batches = track(loader, "evaluating", transient=True, disable=not world.is_main)
    predictions = predict(forward, batches)
    figures = collectives.broadcast(summary(predictions, model.num_classes) if world.is_main else None)
    figures = {"weights": str(source.resolve()), "step": info.get("step"), "data": data, "split": split} | figures
    directory = (
        Path(output) if output else (run_dir or Path(".")) / ("evaluation" if split == "val" else f"evaluation-{split}")
    )
    if world.is_main:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_predictions(directory / "predictions.parquet", predictions, dataset.index.key.to_pylist(), classes)
            (directory / "summary.json").write_text(json.dumps(figures | {"classes": classes}, indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(f"the results cannot be written: {error.strerror}", where=str(directory)) from None
    return figures | {"output": str(directory)}


def _described(path: Path) -> tuple[Path, Path | None, dict[str, Any]]:
    """The file or checkpoint that a path means, its run directory if it has one, and what its manifest says."""
    if path.is_file():
        return path, None, {}
    checkpoint = resolve_checkpoint(path)
    manifest: Manifest = read_manifest(checkpoint)
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    return checkpoint, run_dir, manifest.info
