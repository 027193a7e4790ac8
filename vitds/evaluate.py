"""Evaluation: every sample of a split counted once, whatever the world size, batch size or ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from rich.progress import track
from torch import Tensor

from vitds import collectives
from vitds.data.cache import named_cache
from vitds.data.loader import EvalLoader, MicroBatch
from vitds.data.mixture import open_split
from vitds.engine import Engine, start_ranks
from vitds.errors import CheckpointError, DataError, WeightError
from vitds.inference import load, most_likely
from vitds.loss import probabilities, sample_losses
from vitds.manifest import read_manifest
from vitds.model.precision import DTYPES
from vitds.predictions import (
    MultiLabelPredictions,
    Predictions,
    average_precision,
    summary,
    write_multi_label_predictions,
    write_predictions,
)
from vitds.weights_header import WeightsHeader, read_header, resolve_checkpoint, stated_preprocessing
from vitds.world import world_from_env

_GATHERED_SCORES = 2**24  # 64 MiB


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor], batches: Iterable[MicroBatch], loss: str = "softmax"
) -> Predictions | MultiLabelPredictions:
    """Run `forward` over this rank's share and gather all ranks' predictions on every rank; collective.

    `loss` is the kind that the model was trained with. Where samples have any number of classes, it has to be bce.
    """
    columns: list[tuple[Tensor, ...]] = []
    scored: list[tuple[Tensor, Tensor]] = []  # logits and truths: to rank samples takes those of all
    num_classes = 0
    for batch in batches:
        logits_BL = forward(batch.images).float()
        num_classes = batch.targets.shape[1] if batch.targets.ndim == 2 else 0
        if batch.valid:
            top, likely_BL = most_likely(logits_BL, 5), probabilities(loss, logits_BL)
            made: tuple[Tensor, ...] = (batch.ids, sample_losses(loss, logits_BL, batch.targets), top)
            if num_classes:
                made += (likely_BL.gather(1, top),)
                scored.append((logits_BL[:, :num_classes].cpu(), batch.targets.bool().cpu()))
            else:
                made += (likely_BL.amax(dim=1), batch.targets)
            columns.append(tuple(t.cpu() for t in made))
    mine = tuple(torch.cat(column).numpy() for column in zip(*columns, strict=True)) if columns else None
    shares = [share for share in collectives.gather(mine) if share is not None]
    joined = [np.concatenate(column) for column in zip(*shares, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    ids, losses, top_classes, *rest = (column[order] for column in joined)
    if num_classes:
        precision, support = _average_precisions(scored, len(ids), num_classes)
        return MultiLabelPredictions(ids, top_classes, rest[0], losses, precision, support)
    confidence, labels = rest
    return Predictions(ids, labels, top_classes, confidence, losses)


def _average_precisions(
    scored: list[tuple[Tensor, Tensor]], num_samples: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and number of samples of each class, over all ranks' samples; collective.

    Some classes at a time are gathered, whose scores are at most _GATHERED_SCORES, and the ranks share their sorting.

    Shapes: a rank's logits (b, L) and truths (b, L) of every batch -> (L,), (L,).
    """
    logits, truths = np.empty((0, num_classes), np.float32), np.empty((0, num_classes), np.bool_)
    if scored:
        logits, truths = (torch.cat(parts).numpy() for parts in zip(*scored, strict=True))
    world_size, rank = collectives.world_size(), collectives.rank()
    mine: dict[int, tuple[float, int]] = {}
    width = max(1, _GATHERED_SCORES // num_samples)
    for first in range(0, num_classes, width):
        chunk = slice(first, first + width)
        shares = collectives.gather((logits[:, chunk], truths[:, chunk]))
        all_logits, all_truths = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        for place in range(rank, all_logits.shape[1], world_size):
            truth = all_truths[:, place]
            mine[first + place] = average_precision(all_logits[:, place], truth), int(truth.sum())
    found = {label: pair for share in collectives.gather(mine) for label, pair in share.items()}
    precision, support = zip(*(found[label] for label in range(num_classes)), strict=True)
    return np.array(precision), np.array(support)


def evaluate_weights(
    weights: str,
    data: str,
    split: str = "val",
    image_size: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    zero_stage: int = 0,
    workers: int = 1,
    output: str | None = None,
    model: str = "auto",
    settings: Sequence[str] = (),
    cache_dir: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Evaluate weights on a split with the transform of the run that they come from, and write the results to `output`.

    Stages 1 and 2 shard gradients and optimizer states only, so without an optimizer they are stage 0; stage 3 shards
    the weights. `model` and `settings` say what a file of weights does not say itself, as `auto:timm` and
    `data.mean=0.5`. Shards from a URL are kept in `cache_dir`. `ema` takes the average of the weights that a run kept.

    Raises: DataError when the split is missing or its classes are not those of the weights.
    """
    world = world_from_env()
    device = start_ranks(world)
    header = read_header(weights, model)
    vit, transform, _ = load(weights, image_size, model, stated_preprocessing(settings), ema)
    source, run_dir, run = _described(Path(weights), header)
    dataset = open_split(data, split, named_cache(cache_dir))
    classes = _agreed_classes(header, dataset.classes, weights, data)
    precision = DTYPES[dtype or header.dtype]
    forward: Callable[[Tensor], Tensor]
    if zero_stage == 3:
        forward = Engine.for_inference(vit, precision, device)
    else:
        forward = vit.to(device, precision)
    loader = EvalLoader(
        dataset,
        transform.data,
        vit.image_size,
        batch_size or run.get("config", {}).get("vitds", {}).get("eval_batch_size", 64),
        world,
        workers=workers,
        device=device,
        dtype=precision,
    )
    batches = track(loader, "evaluating", transient=True, disable=not world.is_main)
    predictions = predict(forward, batches, "bce" if dataset.multi_label else header.loss)
    figures = collectives.broadcast(summary(predictions, vit.num_classes) if world.is_main else None)
    figures = {"weights": str(source.resolve()), "step": run.get("step"), "data": data, "split": split} | figures
    figures |= {"ema": True} if ema else {}
    kind = f"evaluation{'' if split == 'val' else f'-{split}'}{'-ema' * ema}"
    directory = Path(output) if output else run_dir / kind if run_dir else Path(f"{kind}-{Path(weights).name}")
    if world.is_main:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path, keys = directory / "predictions.parquet", dataset.index.key.to_pylist()
            if isinstance(predictions, MultiLabelPredictions):
                labels = cast(pa.ListArray, dataset.index.labels).to_pylist()
                write_multi_label_predictions(path, predictions, keys, labels, classes)
            else:
                write_predictions(path, predictions, keys, classes)
            (directory / "summary.json").write_text(json.dumps(figures | {"classes": classes}, indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(f"the results cannot be written: {error.strerror}", where=str(directory)) from None
    return figures | {"output": str(directory)}


def _agreed_classes(header: WeightsHeader, of_data: list[str], weights: str, data: str) -> list[str]:
    """The names by which labels of the data and outputs of the model are known.

    Raises: DataError when they cannot be the same classes, WeightError when the model has none.
    """
    num_classes, known = header.num_classes, header.classes
    if not num_classes:
        raise WeightError("has no head, so there is nothing to evaluate", where=weights)
    if header.format == "checkpoint" and known and known != of_data:
        shown = [f"{len(names)}: {', '.join(names[:4])}" + ", ..." * (len(names) > 4) for names in (of_data, known)]
        raise DataError(
            "the classes of this data are not those that the weights were trained on",
            where=data,
            fix=f"the data has {shown[0]}\nthe weights have {shown[1]}",
        )
    if len(of_data) > num_classes:
        raise DataError(f"{len(of_data)} classes, and the head has {num_classes}", where=data)
    # The same classes often go by other names: "tench" and "n01440764".
    doubt = f"has {num_classes} outputs, {data} has {len(of_data)} classes" if len(of_data) != num_classes else ""
    if known and not doubt:
        pairs = enumerate(zip(known, of_data, strict=False))
        doubt = next((f'calls output {i} "{a}", {data} "{b}"' for i, (a, b) in pairs if a != b), "")
    if doubt and world_from_env().is_main:
        print(f"warning  {weights} {doubt}: the figures mean something only if output i is class i")
    return of_data


def _described(path: Path, header: WeightsHeader) -> tuple[Path, Path | None, dict[str, Any]]:
    """The file or checkpoint that a path means, its run directory if it has one, and what its manifest says."""
    if header.format != "checkpoint":
        return path, None, {}
    checkpoint = resolve_checkpoint(path)
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    return checkpoint, run_dir, read_manifest(checkpoint).info
