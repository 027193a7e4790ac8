"""What a plan's run is fed: its loaders, and any one of its global batches again, without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vitds.data.cache import Cache, named_cache
from vitds.data.loader import EvalLoader, MicroBatch, RankLoader, TrainLoader
from vitds.data.mixture import open_split
from vitds.data.order import build_order
from vitds.data.reader import ShardReader
from vitds.data.stream import StreamLoader, TarStream
from vitds.dataset_facts import split_paths
from vitds.ds_config import Batch
from vitds.errors import UsageError
from vitds.model.precision import DTYPES
from vitds.preflight import Plan
from vitds.stream_facts import is_stream, shard_urls
from vitds.transport import location
from vitds.world import World


def train_loader(
    plan: Plan,
    device: torch.device | str,
    samples_seen: int,
    shards_done: Sequence[int] = (0,),
    left_out: Sequence[int] = (),
) -> RankLoader:
    """This rank's micro-batches from `samples_seen` to the end of the run.

    `shards_done` of a stream, and global batches that are `left_out`, as `Progress` has them.

    Raises: DataError when the cache cannot hold the shards that are shuffled together.
    """
    if is_stream(plan.data_path):
        loader: RankLoader = _stream_loader(plan, device, samples_seen, shards_done)
    else:
        loader = _indexed_loader(plan, device, samples_seen)
        loader.leave_out(left_out)
    loader.worker_timeout_s = plan.run.worker_timeout_s
    return loader


def _indexed_loader(plan: Plan, device: torch.device | str, samples_seen: int) -> TrainLoader:
    dataset = open_data(plan, "train")
    data, remote_sizes = plan.run.data, [shard.at_least for shard in dataset.remote_shards if shard]
    if dataset.cache and remote_sizes:
        window = (data.shuffle_window or len(remote_sizes)) * (len(data.weights) or 1)
        dataset.cache.check_room(remote_sizes, min(window, len(remote_sizes)))
    return TrainLoader(
        dataset,
        build_order(plan.run.data, plan.run.seed, plan.batch.global_batch, dataset.indexes),
        plan.run.data,
        plan.image_size,
        plan.num_classes,
        plan.batch,
        plan.world,
        seed=plan.run.seed,
        samples_seen=samples_seen,
        num_steps_end=plan.num_steps,
        workers=plan.workers,
        device=device,
        dtype=DTYPES[plan.dtype],
        max_bad_samples=plan.run.max_bad_samples,
        hash_every=plan.run.log_every,
    )


def _stream_loader(
    plan: Plan, device: torch.device | str, samples_seen: int, shards_done: Sequence[int]
) -> StreamLoader:
    data = plan.run.data
    stream = TarStream(
        shard_urls(plan.data_path),
        plan.num_train,
        plan.num_classes,
        multi_label=plan.run.loss == "bce",
        shuffle_buffer=data.shuffle_buffer,
        allow_pipe=data.allow_pipe,
        seed=plan.run.seed,
        max_bad_samples=plan.run.max_bad_samples,
        done=shards_done,
    )
    return StreamLoader(
        stream,
        data,
        plan.image_size,
        plan.batch,
        plan.world,
        samples_seen=samples_seen,
        num_steps_end=plan.num_steps,
        workers=plan.workers,
        device=device,
        dtype=DTYPES[plan.dtype],
        hash_every=plan.run.log_every,
    )


def eval_loader(plan: Plan, device: torch.device, dtype: torch.dtype) -> EvalLoader:
    """This rank's share of the validation split."""
    loader = EvalLoader(
        open_data(plan, "val"),
        plan.run.data,
        plan.image_size,
        plan.run.eval_batch_size,
        plan.world,
        workers=plan.workers,
        device=device,
        dtype=dtype,
    )
    loader.worker_timeout_s = plan.run.worker_timeout_s
    return loader


def open_data(plan: Plan, split: str) -> ShardReader:
    """A split of the run's data; of training data a share may be lost."""
    path = plan.data_path if split == "train" else plan.run.data.val_path or plan.data_path
    return open_split(path, split, _cache(plan), plan.run.max_bad_samples if split == "train" else 0.0)


def describe_cache(plan: Plan) -> str | None:
    """Where shards from URLs are kept, in words; None when all data are on a disk."""
    if is_stream(plan.data_path) or all(isinstance(location(path), Path) for path in split_paths(plan.data_path)):
        return None
    data = plan.run.data
    together = f"{data.shuffle_window} shuffled together" if data.shuffle_window else "all shuffled together"
    return f"shards are fetched to {_cache(plan).directory}, at most {data.cache_gib:.3g} GiB of them  {together}"


def micro_batches_at(plan: Plan, device: torch.device, position: int) -> Iterator[MicroBatch] | None:
    """This rank's micro-batches of the global batch at a position of the stream (0 is the first), in this process.

    None for a stream without an index, which keeps no order.
    """
    if is_stream(plan.data_path):
        return None
    again = dataclasses.replace(plan, workers=0, num_steps=position + 1)
    return iter(train_loader(again, device, position * plan.batch.global_batch))


def _cache(plan: Plan) -> Cache:
    return named_cache(plan.run.data.cache_dir, plan.run.data.cache_gib)


def global_batch(plan: Plan, step: int) -> Iterator[MicroBatch]:
    """What step `step` (1 is the first, as in the log) sees on all ranks, in the stream's order: float32, on the CPU.

    The images come in pairs, made in this process as they are taken: how a batch is cut does not change them.

    Raises: UsageError for a stream, which keeps no order.
    """
    if is_stream(plan.data_path):
        raise UsageError("a stream without an index has no order to make a step again from", where=plan.data_path)
    whole, pair = plan.batch.global_batch, 2 if plan.batch.global_batch % 2 == 0 else 1
    one_rank = dataclasses.replace(
        plan,
        run=dataclasses.replace(plan.run, log_every=step),  # so that this step is hashed
        batch=Batch(whole, pair, whole // pair, 1),
        world=World(),
        num_steps=step,
        workers=0,
        dtype="fp32",
    )
    return iter(train_loader(one_rank, "cpu", (step - 1) * whole))
