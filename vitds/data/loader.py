"""Where the data rooms meet: from positions in the stream to normalised micro-batches on the device.

    order.py  position -> (epoch, sample id)          reader.py   sample id -> encoded bytes, checked
    decode.py bytes -> a window's uint8 pixels        crop.py     which window, and its pixels at the model's size
    augment.py  those pixels changed                  here        uint8 batch -> device -> normalised
    mixup.py  neighbours mixed, on the device

Worker processes make whole micro-batches from positions alone, so how many there are changes nothing but the speed, and
resuming is starting at another position.
"""

from __future__ import annotations

import sys
import zlib
from bisect import bisect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vitds.data import crop
from vitds.data.augment import augment, draws, num_draws
from vitds.data.counter import Stream, random_bits
from vitds.data.decode import BadImage, open_image
from vitds.data.mixup import draw_mix, mix
from vitds.data.order import BatchLike, Order, eval_batch, micro_batch_positions, num_eval_rounds
from vitds.data.prefetch import Prefetcher
from vitds.data.reader import ShardReader
from vitds.data.ustar import Label
from vitds.data.workers import Maker, WorkerPool
from vitds.errors import ConfigError, DataError, DataUnavailable
from vitds.world import World

if TYPE_CHECKING:
    from vitds.run_config import DataConfig

_EVAL_SHARDS_AHEAD = 8
WORKER_TIMEOUT_S = 60.0  # that a worker may be silent
MAX_REPLACEMENTS = 100  # tried for one bad sample before giving up


@dataclass
class MicroBatch:
    """What one rank feeds to one forward.

    Shapes: images (B, C, H, W), normalised, in the dtype asked for; targets (B,) int64, or (B, L) float32 when mixed
            and where samples have any number of classes; ids (B,) int64, sample ids.
    """

    images: Tensor
    targets: Tensor
    ids: Tensor
    valid: int  # how many samples count: B, or 0 for evaluation's padding
    index: int  # training: place in the global batch, in micro-batches; evaluation: batch number j
    pixel_hash: int = 0  # see `pixel_hash`, of the steps that are asked for


class BadSample(NamedTuple):
    """A training sample that could not be read or decoded, and was replaced; or a part of a stream that was lost."""

    shard: str  # its path
    key: str
    reason: str
    directory: int = 0  # which of a mixture's
    weight: int = 1  # how many samples it counts for
    event: str = "replaced a bad sample"
    fix: str = "repair the data, or allow a share with --max-bad-samples"

    @property
    def where(self) -> str:
        """Shard and key, or a shard alone that is bad as a whole."""
        return f"{self.shard} {self.key}".rstrip()

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    @property
    def name(self) -> tuple[str, str]:
        """The shard's file name and the key: the same wherever the data set lies.

        Shards of several directories may be called alike: those behind the first are led by their directory's number.
        """
        shard = self.shard.rpartition("/")[2]
        return f"{self.directory}/{shard}" if self.directory else shard, self.key


class Pixels(NamedTuple):
    """What a worker hands over: a uint8 batch, labels as `label_targets` makes them, and the samples that were bad."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    bad: list[BadSample]
    pixel_hash: int = 0
    finished: Sequence[int] = ()  # shards of a stream that were wholly handed over with this batch


def pixel_hash(positions: Sequence[int], images_BCHW: Tensor) -> int:
    """64 bits that say which pixels stand at which positions; of a batch, the sum of its parts' modulo 2**64.

    Shapes: (B,), (B, C, H, W) uint8, as augmented and before mixup.
    """
    checksums = [zlib.crc32(image.numpy().tobytes()) for image in images_BCHW]
    return int(random_bits(Stream.PIXELS, positions, checksums).sum(dtype=np.uint64))


def hash_if_due(
    positions: Sequence[int],
    images_BCHW: Tensor,
    global_batch: int,
    hash_every: int,
    left_out: Sequence[int] = (),
) -> int:
    """The pixel hash of a micro-batch whose step is a `hash_every`-th one (0: none is), else 0.

    `left_out` are the numbers of global batches that no step sees, in order.
    """
    number = positions[0] // global_batch
    is_due = hash_every and (number + 1 - bisect(left_out, number)) % hash_every == 0
    return pixel_hash(positions, images_BCHW) if is_due else 0


def _pixels_of(
    dataset: ShardReader,
    sample_id: int,
    transform: Callable[[crop.OpenImage], Tensor],
    note: Callable[[str], None],
) -> tuple[Tensor, Label]:
    """What `transform` makes of a sample, (3, H, W) uint8, and its label; `note` hears shard and key first.

    Raises: DataError naming shard and key.
    """
    note(" ".join(dataset.where(sample_id)))
    sample = dataset.read(sample_id)
    try:
        return transform(open_image(sample.data)), sample.label
    except BadImage as error:
        raise DataError(str(error), where=" ".join(dataset.where(sample_id))) from None


def train_draws(seed: int, epochs: np.ndarray, ids: np.ndarray, copies: np.ndarray, data: DataConfig) -> np.ndarray:
    """The random numbers that `train_pixels` takes for each sample. Shapes: (B,), (B,), (B,) -> (B, num)."""
    return draws(seed, epochs, ids, copies, crop.NUM_DRAWS + num_draws(data))


def train_pixels(image: crop.OpenImage, numbers: np.ndarray, data: DataConfig, image_size: tuple[int, int]) -> Tensor:
    """A training image as the model sees it before mixup, (3, H, W) uint8.

    Raises: BadImage when it cannot be decoded.
    """
    pixels_CHW = crop.train_crop(image, numbers[: crop.NUM_DRAWS], data, image_size)
    return augment(pixels_CHW, numbers[crop.NUM_DRAWS :], data)


def label_targets(labels: Sequence[Label], num_classes: int) -> Tensor:
    """Labels as a worker hands them over: a byte a class where samples have any number of them.

    Shapes: B -> (B,) int64, or (B, L) uint8 of zeros and ones.
    """
    if not isinstance(labels[0], tuple):
        return torch.tensor(labels)
    targets = np.zeros((len(labels), num_classes), dtype=np.uint8)
    for row, classes in zip(targets, cast(Sequence[tuple[int, ...]], labels), strict=True):
        row[list(classes)] = 1
    return torch.from_numpy(targets)


def _on_device(targets: Tensor, num_classes: int, device: torch.device) -> Tensor:
    """Shapes: (B,) int64 as it is, or (B, L of the data) uint8 -> (B, L) float32."""
    moved = targets.to(device, non_blocking=True)
    return pad(moved.float(), (0, num_classes - moved.shape[1])) if moved.ndim == 2 else moved


class Batches(Maker["Pixels | DataError"]):
    """Whole micro-batches of `image_size`, made from positions by `pixels_at`."""

    image_size: tuple[int, int]
    left_out: Sequence[int] = ()  # numbers of global batches that no step sees, in order
    _memory: Tensor | None = None

    def make(self, positions: Sequence[int]) -> Pixels | DataError:
        """Make one micro-batch; a data error is a value, that comes in its turn and not before."""
        try:
            return self.pixels_at(positions)
        except DataError as error:
            return error

    def pixels_at(self, positions: Sequence[int]) -> Pixels:
        """Make the micro-batch at these positions."""
        raise NotImplementedError

    def use(self, memory: Tensor) -> None:
        """Make the next micro-batch here. Shapes: (B, H, W, 3)."""
        self._memory = memory

    def pack(self, made: Pixels | DataError) -> Any:
        """Without the images, and without torch's own way of sending a tensor, which takes /dev/shm."""
        if isinstance(made, DataError):
            return made
        return made._asdict() | {"images": len(made.images), "labels": made.labels.numpy(), "ids": made.ids.numpy()}

    def unpack(self, packed: Any, memory: Tensor) -> Pixels | DataError:
        """With the images again."""
        if isinstance(packed, DataError):
            return packed
        tensors = {name: torch.from_numpy(packed[name]) for name in ("labels", "ids")}
        return Pixels(**packed | tensors | {"images": memory.permute(0, 3, 1, 2)[: packed["images"]]})

    def empty_pixels(self, num_images: int) -> Tensor:
        """A batch to be filled, laid out as decoders and resizes lay pixels out: putting an image in is a plain copy.

        Shapes: -> (B, 3, H, W) uint8; in memory (B, H, W, 3).
        """
        memory = self._memory
        if memory is None:
            memory = torch.empty((num_images, *self.image_size, 3), dtype=torch.uint8)
        return memory.permute(0, 3, 1, 2)[:num_images]


class _TrainBatches(Batches):
    """Micro-batches from positions of the training stream."""

    def __init__(
        self,
        dataset: ShardReader,
        order: Order,
        data: DataConfig,
        image_size: tuple[int, int],
        seed: int,
        hashed: tuple[int, int],
    ) -> None:
        self.dataset, self.order, self.data, self.image_size, self.seed = dataset, order, data, image_size, seed
        self.hashed = hashed

    def pixels_at(self, positions: Sequence[int]) -> Pixels:
        epochs, ids, copies = self.order.at(positions)
        numbers = train_draws(self.seed, epochs, ids, copies, self.data)
        images = self.empty_pixels(len(ids))
        labels, used = [], []
        bad: list[BadSample] = []
        for place, (epoch, planned_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
            images[place], label, sample_id = self._sample(epoch, planned_id, numbers[place], bad)
            labels.append(label)
            used.append(sample_id)
        bits = hash_if_due(positions, images, *self.hashed, self.left_out)
        return Pixels(images, label_targets(labels, len(self.dataset.classes)), torch.tensor(used), bad, bits)

    def _sample(
        self, epoch: int, planned_id: int, numbers: np.ndarray, bad: list[BadSample]
    ) -> tuple[Tensor, Label, int]:
        """The planned sample, or in its place the first good one of a sequence that (seed, epoch, planned id) fixes."""

        def transform(image: crop.OpenImage) -> Tensor:
            return train_pixels(image, numbers, self.data, self.image_size)

        sample_id = planned_id
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return *_pixels_of(self.dataset, sample_id, transform, self.note), sample_id
            except DataUnavailable:  # the server's fault: none of its samples is bad
                raise
            except DataError as error:
                bad.append(BadSample(*self.dataset.where(sample_id), error.what, self.dataset.directory_of(sample_id)))
                # Like for like, so that the order keeps its character; anything when all of that should be bad.
                others = self.order.kin(planned_id) if 2 * attempt < MAX_REPLACEMENTS else range(len(self.dataset))
                bits = int(random_bits(Stream.REPLACEMENT, self.seed, epoch, planned_id, attempt))
                sample_id = others[bits % len(others)]
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row cannot be used", where=str(self.dataset.directory))


class _EvalBatches(Batches):
    """Micro-batches from sample ids in index order; a bad sample ends the evaluation, for every sample must count."""

    def __init__(self, dataset: ShardReader, data: DataConfig, image_size: tuple[int, int]) -> None:
        self.dataset, self.data, self.image_size = dataset, data, image_size

    def pixels_at(self, positions: Sequence[int]) -> Pixels:
        def transform(image: crop.OpenImage) -> Tensor:
            return crop.eval_crop(image, self.data, self.image_size)

        images = self.empty_pixels(len(positions))
        labels = []
        for place, sample_id in enumerate(positions):
            try:
                images[place], label = _pixels_of(self.dataset, sample_id, transform, self.note)
            except DataUnavailable:
                raise
            except DataError as error:
                error.fix = error.fix or "evaluation counts every sample, so none is replaced: write this split again"
                raise
            labels.append(label)
        return Pixels(images, label_targets(labels, len(self.dataset.classes)), torch.tensor(positions), [])


def _pixels(
    batches: Batches,
    positions: Iterable[Sequence[int]],
    batch_size: int,
    workers: int,
    device: torch.device,
    timeout_s: float,
    tell: Callable[[str], None],
    waits: Callable[[], None],
) -> Iterator[Pixels]:
    """Make the batches at `positions`, in order, in worker processes that start now (0: in this one, when asked).

    Raises: DataError from a worker, or when one is lost; OutOfMemory and ConfigError as `WorkerPool`.
    """
    if not workers:
        return _taken(batches.make(wanted) for wanted in positions)
    shape = (batch_size, *batches.image_size, 3)
    pool = WorkerPool(batches, positions, workers, shape, timeout_s, tell, waits)
    made = _taken(iter(pool))
    return _sent(made, device) if device.type == "cuda" else made


def _taken(made: Generator[Pixels | DataError, None, None]) -> Iterator[Pixels]:
    with closing(made):  # which ends data processes at once, also while someone keeps the error's traceback
        for one in made:
            if isinstance(one, DataError):
                one.on_one_rank = True
                raise one
            yield one


def _sent(made: Iterator[Pixels], device: torch.device) -> Iterator[Pixels]:
    """Move images and labels to a GPU one batch ahead: in a thread, and on a stream beside the one that computes."""
    stream = torch.cuda.Stream(device)

    def sent() -> tuple[Pixels, torch.cuda.Event] | None:
        torch.cuda.set_device(device)
        pixels = next(made, None)
        if pixels is None:
            return None
        with torch.cuda.stream(stream):  # from memory that a GPU reads by itself
            images, labels = (one.pin_memory().to(device, non_blocking=True) for one in (pixels.images, pixels.labels))
        return pixels._replace(images=images, labels=labels), stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(sent)
        while (arriving := coming.result()) is not None:
            coming = thread.submit(sent)
            pixels, arrived = arriving
            computing = torch.cuda.current_stream(device)
            computing.wait_event(arrived)
            for one in (pixels.images, pixels.labels):
                one.record_stream(computing)  # so that their memory is not given away before it is read
            yield pixels


def _ahead_of(
    micro_batches: Iterator[MicroBatch],
    positions: Iterable[int],
    dataset: ShardReader,
    upcoming: Callable[[int], Sequence[int]],
    world: World,
) -> Iterator[MicroBatch]:
    """Have the shards fetched that are `upcoming` at the position of each micro-batch; by one rank of a machine."""
    shards = dataset.remote_shards
    if world.local_rank or dataset.cache is None or not any(shards):
        return micro_batches
    prefetcher = Prefetcher(dataset.cache, shards, upcoming)
    return prefetcher.before(micro_batches, positions)


def say_to_stderr(text: str) -> None:
    """Tell people what a rank alone knows, before there is a log."""
    print(text, file=sys.stderr, flush=True)


class Normaliser:
    """Moves a uint8 batch to the device and normalises it there: (x - 255 mean) / (255 std), in float32."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.device = device
        self.mean, self.std = (
            255 * torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)
            for value in (data.mean, data.std)
        )

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) uint8, however it lies in memory -> (B, C, H, W) float32, on the device, contiguous."""
        images_BCHW = images_BCHW.to(self.device, non_blocking=True)
        return images_BCHW.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).div_(self.std)


class _StepPositions:
    """The positions of every micro-batch of one rank, from a global batch up to another, some of them left out."""

    def __init__(
        self, batch: BatchLike, rank: int, first_step: int, end_step: int, left_out: Collection[int] = ()
    ) -> None:
        self.batch, self.rank = batch, rank
        everything = range(first_step, end_step)
        self.steps = [step for step in everything if step not in left_out] if left_out else everything

    def __len__(self) -> int:
        return len(self.steps) * self.batch.accumulation_steps

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            for micro_index in range(self.batch.accumulation_steps):
                yield micro_batch_positions(self.batch, self.rank, step, micro_index)


class RankLoader:
    """One rank's micro-batches from `samples_seen` up to the end of step `num_steps_end`, accumulation_steps a step.

    `bad_samples` lists what this rank replaced so far, each once, and `on_bad_sample` is told each. `known_bad` names
    them and those that other ranks and earlier starts met, as far as told (`know`), and these are not listed again.
    More of them than `max_bad_samples` (a share of `num_samples`) end the run.
    """

    def __init__(
        self,
        batches: Batches,
        num_samples: int,
        data: DataConfig,
        num_classes: int,
        batch: BatchLike,
        world: World,
        seed: int,
        samples_seen: int,
        num_steps_end: int,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
        max_bad_samples: float,
        on_bad_sample: Callable[[BadSample], None],
    ) -> None:
        """Raises: ConfigError when samples_seen is no whole number of steps."""
        if samples_seen % batch.global_batch:
            raise ConfigError(
                f"{samples_seen} samples seen are no whole number of global batches of {batch.global_batch}",
                fix="resume with the global batch that the run was started with",
            )
        self.num_samples, self.data, self.num_classes = num_samples, data, num_classes
        self.batch, self.world = batch, world
        self.seed, self.workers, self.device, self.dtype = seed, workers, torch.device(device), dtype
        self.first_step = samples_seen // batch.global_batch
        self.max_bad_samples, self.on_bad_sample = max_bad_samples, on_bad_sample
        self.worker_timeout_s = WORKER_TIMEOUT_S
        self.on_lost_worker: Callable[[str], None] = say_to_stderr
        self.on_wait: Callable[[], None] = lambda: None  # called again and again while data processes are waited for
        self._num_steps_end = num_steps_end
        self.bad_samples: list[BadSample] = []
        self.known_bad: dict[tuple[str, str], int] = {}  # and how many samples each counts for
        self._batches = batches
        self._positions = _StepPositions(batch, world.rank, self.first_step, num_steps_end)
        self._normalise = Normaliser(data, self.device)

    def __len__(self) -> int:
        return len(self._positions)

    def leave_out(self, left_out: Collection[int]) -> None:
        """Jump over the global batches with these numbers, where the stream has them."""
        end = self._num_steps_end + len(left_out)
        self._batches.left_out = sorted(left_out)
        self._positions = _StepPositions(self.batch, self.world.rank, self.first_step, end, left_out)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Start the workers now: one that forks after the model is built would hold its pages as they change."""
        size, place = self.batch.micro_batch, (self.workers, self.device, self.worker_timeout_s)
        hooks = lambda text: self.on_lost_worker(text), lambda: self.on_wait()  # as they are then
        return self._micro_batches(_pixels(self._batches, self._positions, size, *place, *hooks))

    def _micro_batches(self, batches: Iterator[Pixels]) -> Iterator[MicroBatch]:
        accumulation = self.batch.accumulation_steps
        for item, pixels in enumerate(batches):
            self._take_note(pixels)
            step, micro_index = divmod(item, accumulation)
            index = self.world.rank * accumulation + micro_index
            images = self._normalise(pixels.images)
            targets = _on_device(pixels.labels, self.num_classes, self.device)
            if self.data.mixes_pairs:
                images, targets = self._mixed(images, targets, self._positions.steps[step], index)
            yield MicroBatch(images.to(self.dtype), targets, pixels.ids, len(images), index, pixels.pixel_hash)

    def _mixed(self, images: Tensor, targets: Tensor, step: int, index: int) -> tuple[Tensor, Tensor]:
        num_pairs = self.batch.micro_batch // 2
        pairs = np.arange(index * num_pairs, (index + 1) * num_pairs)
        drawn = draw_mix(self.data, (images.shape[2], images.shape[3]), self.seed, step, pairs)
        images, targets = mix(images, targets, drawn, self.num_classes)
        return images, targets.gt(0).float() if self.data.mixed_targets == "ones" else targets

    def names(self, ids: Tensor) -> list[tuple[str, str]]:
        """Shard and key of samples that this rank was given lately.

        Shapes: (B,) -> B.
        """
        raise NotImplementedError

    def take_finished(self) -> list[int]:
        """The shards of a stream that this rank finished since it was last asked; none where there is an index."""
        return []

    def _take_note(self, pixels: Pixels) -> None:
        """Count what was bad on the way to this micro-batch.

        Raises: DataError when that was one too many.
        """
        for bad in pixels.bad:
            if bad.name in self.known_bad:
                continue
            self.bad_samples.append(bad)
            self.know([bad])
            self.on_bad_sample(bad)

    def know(self, bad_samples: Sequence[BadSample]) -> None:
        """Count bad samples, wherever they were met, each once.

        Raises: DataError when there are more than the allowed share.
        """
        for bad in bad_samples:  # two ranks may have lost more and less of a shard
            self.known_bad[bad.name] = max(bad.weight, self.known_bad.get(bad.name, 0))
        num_bad = sum(self.known_bad.values())
        if bad_samples and num_bad > self.max_bad_samples * self.num_samples:
            raise too_many_bad(bad_samples[-1], num_bad, self.num_samples, self.max_bad_samples)


def too_many_bad(last: BadSample, num_bad: int, num_samples: int, share: float) -> DataError:
    """The end of a run that met one bad sample too many."""
    return DataError(
        f"{last.reason}\n  {num_bad} bad of {num_samples} samples, allowed share {share:g}",
        where=last.where,
        fix=last.fix,
        on_one_rank=True,
    )


class TrainLoader(RankLoader):
    """One rank's micro-batches of an indexed data set in an order.

    Those of every `hash_every`-th step (0: of none) carry their pixel hash.
    """

    def __init__(
        self,
        dataset: ShardReader,
        order: Order,
        data: DataConfig,
        image_size: tuple[int, int],
        num_classes: int,
        batch: BatchLike,
        world: World,
        seed: int,
        samples_seen: int,
        num_steps_end: int,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
        max_bad_samples: float = 0.0,
        on_bad_sample: Callable[[BadSample], None] = lambda bad: None,
        hash_every: int = 0,
    ) -> None:
        """Raises: ConfigError when samples_seen is no whole number of steps."""
        batches = _TrainBatches(dataset, order, data, image_size, seed, (batch.global_batch, hash_every))
        place = (batch, world, seed, samples_seen, num_steps_end, workers, device, dtype)
        super().__init__(batches, len(dataset), data, num_classes, *place, max_bad_samples, on_bad_sample)
        self.dataset, self.order = dataset, order

    def names(self, ids: Tensor) -> list[tuple[str, str]]:
        """The file name of each sample's shard, and its key."""
        places = (self.dataset.where(sample_id) for sample_id in ids.tolist())
        return [(shard.rpartition("/")[2], key) for shard, key in places]

    def __iter__(self) -> Iterator[MicroBatch]:
        """Start the workers now, and after them what fetches shards ahead of them."""
        everything = range(len(self.dataset.remote_shards))
        positions = (micro_batch.start for micro_batch in self._positions)
        upcoming = self.order.window_shards
        return _ahead_of(
            super().__iter__(), positions, self.dataset, lambda place: upcoming(place) or everything, self.world
        )


class EvalLoader:
    """One rank's share of an evaluation, the same number of micro-batches on every rank.

    Batch j of the split goes to rank j % world_size. A rank without a batch in the last round gets a padding one
    (one black image, valid = 0), so that collectives inside the model stay in step. Iterate as often as you like.
    Multi-hot targets have a column for each class of the data, of which a head may have more.
    """

    def __init__(
        self,
        dataset: ShardReader,
        data: DataConfig,
        image_size: tuple[int, int],
        batch_size: int,
        world: World,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.dataset, self.image_size, self.world, self.workers = dataset, image_size, world, workers
        self.batch_size, self.worker_timeout_s = min(batch_size, len(dataset)), WORKER_TIMEOUT_S
        self.device, self.dtype = torch.device(device), dtype
        num_rounds = num_eval_rounds(len(dataset), batch_size, world.world_size)
        self._plan = [
            eval_batch(len(dataset), batch_size, world.world_size, world.rank, round_index)
            for round_index in range(num_rounds)
        ]
        self.on_wait: Callable[[], None] = lambda: None  # called again and again while data processes are waited for
        self._batches = _EvalBatches(dataset, data, image_size)
        self._normalise = Normaliser(data, self.device)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Start what fetches shards ahead; the workers start with the first micro-batch."""
        shard_of, num_shards = self.dataset.index.shard, len(self.dataset.index.shards)

        def upcoming(first_id: int) -> range:
            first = int(shard_of[min(first_id, len(shard_of) - 1)])
            return range(first, min(first + _EVAL_SHARDS_AHEAD, num_shards))

        return _ahead_of(
            self._micro_batches(), (ids.start for _, ids in self._plan), self.dataset, upcoming, self.world
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        positions = [ids for _, ids in self._plan if ids]
        place = (self.workers, self.device, self.worker_timeout_s)
        made = _pixels(self._batches, positions, self.batch_size, *place, say_to_stderr, self.on_wait)
        num_classes = len(self.dataset.classes)
        for index, ids in self._plan:
            if ids:
                pixels = next(made)
                images, labels, used = self._normalise(pixels.images), pixels.labels, pixels.ids
            else:
                images = torch.zeros((1, 3, *self.image_size), device=self.device)
                labels, used = label_targets([() if self.dataset.multi_label else 0], num_classes), torch.full((1,), -1)
            targets = _on_device(labels, num_classes, self.device)
            yield MicroBatch(images.to(self.dtype), targets, used, len(ids), index)
