"""What a step of a run shows the model: each image as it is seen, beside its original, with key and class names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitds.contact_sheet import beside, contact_sheet
from vitds.data.decode import decode
from vitds.data.loader import MicroBatch
from vitds.feed import global_batch, open_data
from vitds.preflight import Plan

_MAX_NAMES = 4  # of one target
_MAX_NAME_LENGTH = 30  # of one among several


class Seen(NamedTuple):
    """One image of a step.

    Shapes: image (3, H, W) uint8, as the model sees it; original (3, h, w) uint8, as it is stored.
    """

    sample_id: int
    key: str
    target: str
    image: np.ndarray
    original: np.ndarray


def seen_at(plan: Plan, step: int) -> Iterator[Seen]:
    """The images of step `step` (1 is the first) on all ranks, in the stream's order, made as they are taken.

    Raises: UsageError for a stream, DataError for what cannot be read.
    """
    return seen_in(plan, global_batch(plan, step))


def seen_in(plan: Plan, micro_batches: Iterable[MicroBatch]) -> Iterator[Seen]:
    """The images of micro-batches of a plan's run."""
    dataset, data = open_data(plan, "train"), plan.run.data
    mean, std = (torch.as_tensor(value).reshape(-1, 1, 1) for value in (data.mean, data.std))
    for micro_batch in micro_batches:
        images = (micro_batch.images * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        for image, target, sample_id in zip(images, micro_batch.targets, micro_batch.ids.tolist(), strict=True):
            original = decode(dataset.read(sample_id).data)
            yield Seen(sample_id, dataset.key(sample_id), names_of(target, plan.classes), image.numpy(), original)


def names_of(target: Tensor, classes: Sequence[str]) -> str:
    """A target in words: "cat", "cat 0.70 / dog 0.30" where it has shares, "cat + dog" where each class is there.

    Shapes: () int64, or (L,) float32.
    """
    if target.ndim == 0:
        return classes[int(target)]
    if not target.any():
        return "no class"
    places = target.argsort(descending=True, stable=True)[: int((target > 0).sum())].tolist()
    shares, shown = target[places].tolist(), places[:_MAX_NAMES]
    more = f" and {len(places) - _MAX_NAMES} more" * (len(places) > _MAX_NAMES)
    if all(share == 1 for share in shares):
        return " + ".join(_short(classes[place]) for place in shown) + more
    return (
        " / ".join(f"{_short(classes[place])} {share:.2f}" for place, share in zip(shown, shares, strict=False)) + more
    )


def _short(name: str) -> str:
    """A class name that leaves room for another and its share; ImageNet's are lists of synonyms."""
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 3] + "..."


def sheet_of_step(plan: Plan, step: int, num_images: int) -> Image.Image:
    """The first images of a step on one sheet: what the model sees to the left, the original to the right."""
    return sheet_of(plan, step, list(itertools.islice(seen_at(plan, step), num_images)))


def sheet_of(plan: Plan, step: int, seen: Sequence[Seen]) -> Image.Image:
    """Images of a step on one sheet: what the model sees to the left, the original to the right."""
    tiles = [beside([_picture(one.image), _picture(one.original)]) for one in seen]
    count = f"{len(seen)} of {plan.batch.global_batch} images"
    title = f"step {step}, {count}: as the model sees them, and as they are stored"
    return contact_sheet(tiles, [f"{one.key}\n{one.target}" for one in seen], title)


def _picture(image_CHW: np.ndarray) -> Image.Image:
    return Image.fromarray(image_CHW.transpose(1, 2, 0))
