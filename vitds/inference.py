"""Weights put to use: the model, what turns an image into its input, and the names of its classes.

`vitds.load` is the face of this; an evaluation prepares its images, and ranks its classes, by the same code.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitds.data.crop import OpenImage, eval_crop
from vitds.data.decode import BadImage, Decoded, as_rgb, open_image
from vitds.data.images import LooseImage
from vitds.data.loader import Normaliser
from vitds.errors import DataError, UsageError, WeightError, first_line
from vitds.model.vit import VisionTransformer
from vitds.run_config import DataConfig, check_entry
from vitds.weights.create import create_model
from vitds.weights_header import WeightsHeader, read_header
from vitds.world import world_from_env

AnyImage = bytes | str | os.PathLike | Image.Image | np.ndarray
"""Encoded bytes, the path of a file, a Pillow image, or pixels (H, W, 3) uint8 in RGB."""


class Transform:
    """From an image to the model's input, exactly as an evaluation prepares it."""

    def __init__(self, data: DataConfig, image_size: tuple[int, int]) -> None:
        self.data, self.image_size = data, image_size
        self._normalise = Normaliser(data, torch.device("cpu"))

    def __call__(self, image: AnyImage) -> Tensor:
        """Decode, resize or crop, and normalise.

        Shapes: -> (3, H, W) float32.
        Raises: DataError when a file cannot be read or is no image.
        """
        return self._normalise(self.pixels(image)[None])[0]

    def pixels(self, image: AnyImage) -> Tensor:
        """The same without the normalisation.

        Shapes: -> (3, H, W) uint8.
        Raises: DataError when a file cannot be read or is no image.
        """
        path = "" if isinstance(image, bytes | Image.Image | np.ndarray) else os.fspath(image)
        try:
            return eval_crop(_opened(image), self.data, self.image_size)
        except BadImage as error:
            raise DataError(str(error), where=path) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def _opened(image: AnyImage) -> OpenImage:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"pixels of shape {image.shape} and type {image.dtype}, expected (H, W, 3) of uint8")
        return Decoded(image.copy().transpose(2, 0, 1))  # torch wants it writable, and nobody writes to it
    if isinstance(image, Image.Image):
        return Decoded(as_rgb(image))
    return open_image(image if isinstance(image, bytes) else Path(image).read_bytes())


class Loaded(NamedTuple):
    """Weights ready for use. `classes` are the names of the outputs, None when the weights do not know them."""

    model: VisionTransformer
    transform: Transform
    classes: list[str] | None


def load(
    path: str | Path,
    image_size: int | Sequence[int] | None = None,
    model: str = "auto",
    data: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> Loaded:
    """Load a run, a checkpoint or weights of any format for use: model, transform and class names.

    The model is in evaluation mode, float32, at `image_size` (pixels, one side or height and width) or what it was
    trained at; the transform is that of the weights' own evaluation. Model and modifiers, as `auto:timm`, say what a
    file of weights does not say itself; so does `data`, with entries of a run's data section (`{"mean": 0.5}`). `ema`
    takes the average of the weights that a checkpoint's run kept.

        model, transform, classes = vitds.load("runs/quickstart")
        logits = model(transform("digit.png")[None])

    Raises: WeightError or CheckpointError when the weights are missing, damaged, unsafe or not of `model`, ConfigError
    for a wrong model name or size.
    """
    header = read_header(path, model)
    if header.spec.in_channels != 3:
        raise WeightError(f"the model takes {header.spec.in_channels} channels, images have 3", where=str(path))
    header = replace(header, data=(header.data or {}) | dict(data or {}) or None)
    prepared = preprocessing(header, str(path))
    vit = create_model(model, image_size, weights=path, ema=ema).eval()
    if header.data is None and world_from_env().is_main:
        print("  no preprocessing in the weights: squash, mean 0.5, std 0.5 assumed", file=sys.stderr)
    return Loaded(vit, Transform(prepared, vit.image_size), header.classes)


def preprocessing(header: WeightsHeader, where: str) -> DataConfig:
    """How images are prepared for these weights; Google's way when they do not say.

    Raises: WeightError for values that are not valid.
    """
    try:
        return DataConfig(**{key: check_entry(f"data.{key}", value) for key, value in (header.data or {}).items()})
    except (ValueError, KeyError) as error:
        raise WeightError(f"their preprocessing is not valid: {error}", where=where) from None


def class_names(num_classes: int, known: Sequence[str] | None) -> list[str]:
    """A name for every output: the known ones, then `class 17`."""
    known = list(known or [])[:num_classes]
    return known + [f"class {label}" for label in range(len(known), num_classes)]


def most_likely(logits_BL: Tensor, num: int) -> Tensor:
    """The `num` classes with the largest logits, the smaller index first where they are equal. Shapes: -> (B, num)."""
    # Not topk: which of equal classes it takes depends on how many it is asked for.
    return logits_BL.sort(dim=1, descending=True, stable=True).indices[:, :num]


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, else the GPU when there is one; on it float32 means float32.

    Raises: UsageError when there is no such device.
    """
    torch.backends.cudnn.allow_tf32 = False  # matrix products have it off already
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f'no device "{name}": {first_line(error)}'
        raise UsageError(what, where="--device", fix="cpu, cuda, cuda:1, ...") from None
    return device


@dataclass(frozen=True)
class Output:
    """What the model gives for a batch of images.

    Shapes: images B; logits (B, L), None without a head; features (B, D).
    """

    images: list[LooseImage]
    logits: Tensor | None
    features: Tensor


def run_over(
    loaded: Loaded,
    images: Iterable[LooseImage | DataError],
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    on_bad: Callable[[DataError], None],
) -> Iterator[Output]:
    """Run the model over a stream of images, in order; `on_bad` is told what cannot be used, and the rest goes on.

    Never more than a few batches are in memory. Outputs are float32, on the CPU.
    """
    model, transform = loaded.model.to(device, dtype), loaded.transform
    normalise = Normaliser(transform.data, device)
    batch: list[tuple[LooseImage, Tensor]] = []

    def run() -> Output:
        pixels_BCHW = torch.stack([pixels for _, pixels in batch])
        with torch.inference_mode():
            features = model.features(normalise(pixels_BCHW).to(dtype))
            logits = model.head(features).float().cpu() if model.num_classes else None
        return Output([image for image, _ in batch], logits, features.float().cpu())

    for made in _made_ahead(images, transform, workers, ahead=2 * batch_size):
        if isinstance(made, DataError):
            on_bad(made)
            continue
        batch.append(made)
        if len(batch) == batch_size:
            yield run()
            batch.clear()
    if batch:
        yield run()


def _made_ahead(
    images: Iterable[LooseImage | DataError], transform: Transform, workers: int, ahead: int
) -> Iterator[tuple[LooseImage, Tensor] | DataError]:
    """Images with their pixels, in order, made by threads (decoders leave Python's lock) while the model computes."""

    def make(image: LooseImage | DataError) -> tuple[LooseImage, Tensor] | DataError:
        if isinstance(image, DataError):
            return image
        try:
            return image, transform.pixels(image.read())
        except DataError as error:
            error.where = error.where or image.name
            return error

    waiting: deque[Future[tuple[LooseImage, Tensor] | DataError]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for image in images:
                waiting.append(threads.submit(make, image))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
