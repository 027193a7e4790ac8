"""Training from tar shards without an index, through webdataset's own pipeline; where its guarantee ends, ours is said.

    the stream of shards   each pass over the shards permuted by (seed, pass), passes laid end to end, without end
    dealt                  round robin to the consumers (every data process of every rank), which read one after another
    webdataset             members grouped by key, shuffled in a buffer of each consumer
    here                   labels checked, decoded, augmented by (seed, pass, shard, key): as on any worker, anywhere

The stream has no end, so every rank has a micro-batch for every forward, however uneven or few the shards are. What is
remembered of it is which shards were wholly seen: a resume, on any number of ranks, deals out the others.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys

from vitds.data.counter import Stream, random_bits
from vitds.data.decode import BadImage, open_image
from vitds.data.image_files import IMAGE_SUFFIXES
from vitds.data.loader import (
    MAX_REPLACEMENTS,
    BadSample,
    Batches,
    Pixels,
    RankLoader,
    hash_if_due,
    label_targets,
    too_many_bad,
    train_draws,
    train_pixels,
)
from vitds.data.order import BatchLike, sample_at
from vitds.data.tar_stream import UNREADABLE, members_of, open_shard, read_member
from vitds.data.ustar import Label, read_label, split_name
from vitds.errors import DataError, DataUnavailable
from vitds.stream_facts import shard_name, shown
from vitds.world import World

if TYPE_CHECKING:
    from vitds.run_config import DataConfig

_LABEL_SUFFIXES = (".cls", ".json")  # the first that a sample has


@dataclass(frozen=True)
class TarStream:
    """Shards, what their samples may be, and which of the stream were wholly seen (as `merge_done` gives it)."""

    shards: Sequence[str]
    samples_per_epoch: int
    num_classes: int
    multi_label: bool = False
    shuffle_buffer: int = 1000
    allow_pipe: bool = False
    seed: int = 0
    max_bad_samples: float = 0.0
    done: Sequence[int] = field(default=(0,))


def merge_done(done: Sequence[int], finished: Iterable[int]) -> list[int]:
    """Add finished shards to those done: the first number that is not, then those after it that are."""
    first, *beyond = done
    known = {*beyond, *finished}
    while first in known:
        known.remove(first)
        first += 1
    return [first, *sorted(known)]


class _Encoded(NamedTuple):
    number: int  # its shard's in the stream of shards
    epoch: int
    shard: str
    key: str
    image: bytes
    label: Label

    @property
    def id(self) -> int:
        """63 bits that name the sample wherever its shard lies."""
        name = f"{shard_name(self.shard)}\0{self.key}".encode(errors="surrogateescape")
        return int.from_bytes(blake2b(name, digest_size=8).digest()) >> 1


class _Bad(BadSample):
    """A bad sample or shard of a stream, whose shards may be called alike."""

    @property
    def name(self) -> tuple[str, str]:
        """The whole address of the shard, and the key."""
        return self.shard, self.key


class _Consumer:
    """What one data process reads: every `num_consumers`-th of the shards that are left."""

    def __init__(
        self, stream: TarStream, consumer: int, num_consumers: int, note: Callable[[str], None] = lambda text: None
    ) -> None:
        """`note` hears what is about to be read."""
        self.stream, self.consumer, self.num_consumers, self.note = stream, consumer, num_consumers, note
        self.bad: list[BadSample] = []  # since they were last taken
        self.finished: list[int] = []
        self._known_bad: dict[tuple[str, str], int] = {}  # and how many samples each counts for
        self._url = ""  # of the shard that is being read
        self._loss = ""  # why it, or its rest, is lost
        self._waiting: dict[int, int] = {}  # samples of each shard that are read and not yet handed over
        self._number = self._epoch = -1  # its places in the stream and in the passes; -1 between two shards
        self._keys: set[str] = set()
        self._num_read = 0

    def samples(self) -> Iterator[_Encoded]:
        """Samples without end, shuffled.

        Raises: DataError when no shard holds any, or too many are bad.
        """
        bits = random_bits(Stream.SHUFFLE_BUFFER, self.stream.seed, self.stream.done[0], self.consumer)
        pipeline = DataPipeline(
            self._shards,
            self._members,
            partial(group_by_keys, keys=split_name, handler=self._on_duplicate),
            self._encoded,
            shuffle(self.stream.shuffle_buffer, rng=random.Random(int(bits))),
        )
        for sample in pipeline:
            self._waiting[sample.number] -= 1
            self._check_finished(sample.number)
            yield sample

    def take_notes(self, pixel_hash: int) -> tuple[list[BadSample], int, list[int]]:
        """What was bad and which shards were finished since this was last asked, around a hash of pixels."""
        notes = self.bad, pixel_hash, self.finished
        self.bad, self.finished = [], []
        return notes

    def report(self, shard: str, key: str, reason: str, **more: Any) -> None:
        """Note what is bad, once; `more` as `BadSample` has it."""
        bad = _Bad(shown(shard), key, reason, **more)
        if bad.name not in self._known_bad:
            self._known_bad[bad.name] = bad.weight
            self.bad.append(bad)

    def _report_loss(self) -> None:
        """Note the shard that was read last, or its rest, as lost: the samples of a mean shard that it did not give."""
        mean = -(-self.stream.samples_per_epoch // len(self.stream.shards))
        weight = max(1, mean - self._num_read)
        what = "the rest of a shard" if self._num_read else "a shard"
        event = f"lost {what}, about {weight} sample" + "s" * (weight > 1)
        self.report(self._url, "", self._loss, weight=weight, event=event)

    def _shards(self) -> Iterator[dict[str, str]]:
        """This consumer's part of the stream of shards."""
        done = set(self.stream.done[1:])
        left = (number for number in count(self.stream.done[0]) if number not in done)
        fruitless: set[str] = set()
        for number in islice(left, self.consumer, None, self.num_consumers):
            epochs, places = sample_at([number], self.stream.seed, len(self.stream.shards))
            url = self.stream.shards[int(places[0])]
            self._number, self._epoch, self._url, self._num_read, self._keys = number, int(epochs[0]), url, 0, set()
            self._loss = ""
            self._waiting[number] = 0
            yield {"url": url}
            self._number = -1  # all its samples have passed `_encoded`
            self._check_finished(number)
            if self._loss:
                self._report_loss()
            self._check_share()
            fruitless = fruitless | {url} if self._num_read == 0 else set()
            if len(fruitless) == len(set(self.stream.shards)):
                raise DataError(f"none of {len(fruitless)} shards holds a sample that can be used", where=shown(url))

    def _members(self, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """The images and labels in shards, as webdataset has them, with its mark at the end of each shard."""
        for shard in shards:
            url = shard["url"]
            try:
                yield from self._members_of(url)
            except DataUnavailable:
                raise  # no shard is to blame
            except UNREADABLE as error:
                number = getattr(error, "errno", None)  # the machine's word; none of what decompresses or runs commands
                if number not in (None, errno.ENOENT, errno.ENOTDIR):
                    raise DataUnavailable(f"cannot be read: {os.strerror(number)}", where=shown(url)) from None
                reason = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error)
                self._loss = f"cannot be read, or not to its end: {reason}"
            yield {}

    def _members_of(self, url: str) -> Iterator[dict[str, Any]]:
        self.note(shown(url))
        stream = open_shard(url, self.stream.allow_pipe)
        try:
            for member, archive in members_of(stream):
                if member.isdir() or not _is_wanted(member.name):
                    continue
                try:
                    content = read_member(member, archive)
                except DataError as error:
                    self.report(url, member.name, error.what)
                else:
                    yield {"fname": member.name, "data": content, "__url__": url}
        except UNREADABLE:
            with suppress(*UNREADABLE):  # of a command that was cut short
                stream.close()
            raise
        stream.close()  # raises when a command failed

    def _on_duplicate(self, error: Exception) -> bool:
        """What webdataset should do about a member that it refuses: go on without it, when it is a second one."""
        name, found, _ = str(error.args[0]).partition(": duplicate file name")
        if not found:
            raise error
        self.report(self._url, split_name(name)[0], f"has two members {name}")
        return True

    def _encoded(self, samples: Iterable[dict[str, Any]]) -> Iterator[_Encoded]:
        """Samples with an image and a label that can be used."""
        for sample in samples:
            shard, key = sample["__url__"], sample["__key__"]
            self.note(f"{shown(shard)} {key}")
            try:
                if key in self._keys:
                    raise ValueError("duplicate key")
                self._keys.add(key)
                image, label = _image(sample), self._label(sample)
            except DataError as error:
                self.report(shard, key, error.what, fix=error.fix)
                continue
            except ValueError as error:
                self.report(shard, key, str(error))
                continue
            self._waiting[self._number] += 1
            self._num_read += 1
            yield _Encoded(self._number, self._epoch, shard, key, image, label)

    def _label(self, sample: dict[str, Any]) -> Label:
        """Raises: ValueError for a label that is missing or makes no sense, DataError where another head would do."""
        suffix = next((suffix for suffix in _LABEL_SUFFIXES if suffix[1:] in sample), None)
        if suffix is None:
            raise ValueError("has no label")
        try:
            label = read_label(suffix, sample[suffix[1:]])
        except ValueError as error:
            raise ValueError(f"label {sample[suffix[1:]][:20]!r}: {error}") from None
        classes = label if isinstance(label, tuple) else (label,)
        if max(classes, default=0) >= self.stream.num_classes:
            raise DataError(
                f"label {max(classes)}, and there are {self.stream.num_classes} classes",
                fix=f"--num-classes {max(classes) + 1}, if that label is right",
            )
        if self.stream.multi_label:
            return classes
        if len(classes) != 1:
            raise DataError(f"has {len(classes)} labels, which takes --loss bce", fix="--loss bce")
        return classes[0]

    def _check_share(self) -> None:
        """Raises: DataError when this process alone met too many bad samples; it may be long until the rank hears."""
        num_samples, share = self.stream.samples_per_epoch, self.stream.max_bad_samples
        num_bad = sum(self._known_bad.values())
        if self.bad and num_bad > share * num_samples:
            raise too_many_bad(self.bad[0], num_bad, num_samples, share)

    def _check_finished(self, number: int) -> None:
        if number != self._number and self._waiting[number] == 0:
            del self._waiting[number]
            self.finished.append(number)


def _is_wanted(name: str) -> bool:
    """Whether a member is an image or a label; hidden files and webdataset's notes are neither, and nothing else is
    read.
    """
    base = name.rpartition("/")[2]
    suffix = "." + base.rpartition(".")[2].lower()
    is_note = name.startswith("__") and "__" in name[2:].partition("/")[0]
    return (suffix in IMAGE_SUFFIXES or suffix in _LABEL_SUFFIXES) and not is_note and not base.startswith(".")


def _image(sample: dict[str, Any]) -> bytes:
    """The image among a sample's members, chosen as `vitds.data.ustar.image_among` does.

    Raises: ValueError when there is none.
    """
    images = [name for name in sample if "." + name.rpartition(".")[2] in IMAGE_SUFFIXES]
    if not images:
        raise ValueError("has no image")
    return sample[next((name for name in images if "." not in name), images[0])]


class _StreamBatches(Batches):
    """Micro-batches from the stream: a data process makes its consumer at its first one."""

    replaceable = False  # a fresh process would not know how far the consumer had come

    def __init__(
        self,
        stream: TarStream,
        data: DataConfig,
        image_size: tuple[int, int],
        world: World,
        workers: int,
        hashed: tuple[int, int],
    ) -> None:
        self.stream, self.data, self.image_size, self.hashed = stream, data, image_size, hashed
        self.world, self.workers = world, workers

    def pixels_at(self, positions: Sequence[int]) -> Pixels:
        consumer, samples = self._consumer
        images = self.empty_pixels(len(positions))
        labels: list[Label] = []
        ids = []
        for place in range(len(positions)):
            images[place], sample = self._usable(consumer, samples)
            labels.append(sample.label)
            ids.append(sample.id)
        bits = hash_if_due(positions, images, *self.hashed)
        targets = label_targets(labels, self.stream.num_classes)
        return Pixels(images, targets, torch.tensor(ids), *consumer.take_notes(bits))

    @cached_property
    def _consumer(self) -> tuple[_Consumer, Iterator[_Encoded]]:
        number = self.world.rank + self.world.world_size * self.worker
        consumer = _Consumer(self.stream, number, self.world.world_size * max(1, self.workers), self.note)
        return consumer, consumer.samples()

    def _usable(self, consumer: _Consumer, samples: Iterator[_Encoded]) -> tuple[Tensor, _Encoded]:
        """The next sample that can be decoded, as the model sees it."""
        for sample in islice(samples, MAX_REPLACEMENTS):
            self.note(f"{shown(sample.shard)} {sample.key}")
            epochs, ids, copies = np.array([[sample.epoch], [sample.id], [0]])
            numbers = train_draws(self.stream.seed, epochs, ids, copies, self.data)[0]
            try:
                return train_pixels(open_image(sample.image), numbers, self.data, self.image_size), sample
            except BadImage as error:
                consumer.report(sample.shard, sample.key, str(error))
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row cannot be used", where=shown(sample.shard))


class StreamLoader(RankLoader):
    """One rank's micro-batches of a stream, as many as of an indexed data set; `ids` are hashes of shard and key.

    Each of the rank's data processes reads shards of its own, so which samples meet in a batch depends on how many
    processes and ranks there are.
    """

    def __init__(
        self,
        stream: TarStream,
        data: DataConfig,
        image_size: tuple[int, int],
        batch: BatchLike,
        world: World,
        samples_seen: int,
        num_steps_end: int,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
        on_bad_sample: Callable[[BadSample], None] = lambda bad: None,
        hash_every: int = 0,
    ) -> None:
        """Raises: ConfigError when samples_seen is no whole number of steps."""
        batches = _StreamBatches(stream, data, image_size, world, workers, (batch.global_batch, hash_every))
        place = (batch, world, stream.seed, samples_seen, num_steps_end, workers, device, dtype)
        num_samples, share = stream.samples_per_epoch, stream.max_bad_samples
        super().__init__(batches, num_samples, data, stream.num_classes, *place, share, on_bad_sample)
        self._finished: list[int] = []

    def names(self, ids: Tensor) -> list[tuple[str, str]]:
        """Nothing but what stands for shard and key here: a stream is not seen again."""
        return [("stream", f"{sample_id:016x}") for sample_id in ids.tolist()]

    def take_finished(self) -> list[int]:
        """The shards, by their places in the stream, that this rank finished since it was last asked."""
        finished, self._finished = self._finished, []
        return finished

    def _take_note(self, pixels: Pixels) -> None:
        super()._take_note(pixels)
        self._finished += pixels.finished
