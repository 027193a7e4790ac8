"""A data set behind a URL is the data set: the same samples, pixels and labels in the same order."""

import dataclasses
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from data_sets import write_pixels
from s3_server import s3_bucket
from web_server import Server, serving

from vitds import transport
from vitds.data.cache import Cache
from vitds.data.index import read_index, write_index
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.mixture import open_split
from vitds.data.order import build_order
from vitds.data.reader import SplitMissing
from vitds.dataset_facts import read_dataset_facts
from vitds.ds_config import Batch
from vitds.errors import DataError, DataUnavailable
from vitds.run_config import DataConfig
from vitds.transport import Patience
from vitds.world import World

DATA = DataConfig(shuffle_window=2)
SHARD = "/train/pixels-train-000000.tar"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("data") / "pixels")


@pytest.fixture
def server(dataset, monkeypatch):
    monkeypatch.setattr(transport, "PATIENT", Patience(2, 2, 0.01, 0.01))
    monkeypatch.setattr(transport, "BRIEF", Patience(2, 2, 0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.root = dataset
    with serving(server) as server.address:
        yield server


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10**6)


def train_batches(path, cache, world=World(), num_steps=12, start=0, workers=0, **options):  # noqa: B008
    dataset = open_split(str(path), "train", cache)
    batch = Batch(8, 8 // (2 * world.world_size), 2, world.world_size)
    order = build_order(DATA, 3, 8, dataset.indexes)
    place = (batch, world, 3, 8 * start, num_steps, workers, "cpu", torch.float32)
    return TrainLoader(dataset, order, DATA, (8, 8), 5, *place, **options)


def assert_same(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        for name in ("images", "targets", "ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.valid, one.index) == (other.valid, other.index)


def shard_bytes(dataset, split="train"):
    return max(path.stat().st_size for path in (dataset / split).glob("*.tar"))


def test_training_and_evaluation_see_what_they_would_see_on_disk(server, dataset, cache):
    assert_same(train_batches(server.address, cache), train_batches(dataset, cache))
    assert_same(train_batches(server.address, cache, workers=2), train_batches(dataset, cache))
    both = [
        EvalLoader(open_split(str(path), "val", cache), DATA, (8, 8), 4, World(), 0, "cpu", torch.float32)
        for path in (server.address, dataset)
    ]
    assert_same(*both)
    facts, local = read_dataset_facts(server.address), read_dataset_facts(str(dataset))
    assert facts == dataclasses.replace(local, path=server.address)
    fetched = [path for path, _ in server.requests if path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == len(list(dataset.glob("*/*.tar")))  # each once


def test_s3_sees_the_same(dataset, cache):
    with s3_bucket() as bucket:
        for path in dataset.rglob("*"):
            if path.is_file():
                bucket.put(f"some/data/{path.relative_to(dataset)}", path.read_bytes())
        assert_same(train_batches("s3://bucket/some/data", cache, workers=1), train_batches(dataset, cache))
        assert read_dataset_facts("s3://bucket/some/data").num_val == 29
        with pytest.raises(DataError, match=r"has no classes\.json"):
            read_dataset_facts("s3://bucket/other")


def test_a_mixture_of_near_and_far_is_a_mixture(server, dataset, cache, tmp_path):
    other = write_pixels(tmp_path / "other", num_train=20, num_val=5)
    assert_same(
        train_batches(f"{other},{server.address}", cache, workers=1), train_batches(f"{other},{dataset}", cache)
    )


def write_batches(rank, address, cache, out):
    batches = train_batches(address, cache, World(rank, rank, 2, 2), 20, workers=2)
    out.write_bytes(
        pickle.dumps([(batch.images.numpy(), batch.targets.numpy(), batch.ids.numpy()) for batch in batches])
    )


def test_ranks_and_workers_share_a_cache_smaller_than_the_data(server, dataset, tmp_path):
    """2 ranks of 2 workers, room for 3 of 7 shards, over three epochs; connections break all the time."""
    server.drop_after, server.num_drops = 3_000, 40
    cache = Cache(tmp_path / "cache", 3 * shard_bytes(dataset))
    outs = [tmp_path / f"rank{rank}" for rank in range(2)]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=write_batches, args=(rank, server.address, cache, outs[rank])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for rank, out in enumerate(outs):
        expected = train_batches(dataset, cache, World(rank, rank, 2, 2), 20)
        for (images, targets, ids), batch in zip(pickle.loads(out.read_bytes()), expected, strict=True):
            np.testing.assert_array_equal(images, batch.images)
            np.testing.assert_array_equal(targets, batch.targets)
            np.testing.assert_array_equal(ids, batch.ids)
    fetched = [path for path, asked in server.requests if path.endswith(".tar") and asked is None]
    assert len(fetched) > 7  # there were evictions
    assert sum(path.stat().st_size for path in cache.directory.glob("*.tar")) <= cache.max_bytes


def test_wrong_bytes_in_the_cache_are_fetched_anew_and_a_bad_sample_is_one(server, dataset, cache):
    reader = open_split(server.address, "train", cache)
    sample = reader.read(0)
    path = cache._path(transport.Url(server.address + SHARD))
    whole = path.read_bytes()
    with path.open("r+b") as file:  # a flipped bit on this disk, under an open descriptor
        file.seek(int(reader.index.offset[0]) + 600)
        file.write(b"\xff\x00\xff")
    assert reader.read(0) == sample and path.read_bytes() == whole

    damaged = bytearray(whole)
    damaged[int(reader.index.offset[1]) + 600] ^= 1
    server.files[SHARD] = bytes(damaged)  # a flipped bit over there
    path.unlink()
    fresh = open_split(server.address, "train", cache)
    server.requests.clear()
    for _ in range(3):
        with pytest.raises(DataError, match="crc32") as caught:
            fresh.read(1)
        assert not isinstance(caught.value, DataUnavailable)
    assert SHARD in caught.value.where and fresh.read(0) == sample and fresh.read(2) == reader.read(2)
    assert len(server.requests) == 2 + 2  # fetched twice, then asked for its version


def test_a_shard_that_was_cut_off_in_the_cache_is_fetched_anew(server, cache):
    reader = open_split(server.address, "train", cache)
    sample, path = reader.read(0), cache._path(transport.Url(server.address + SHARD))
    os.truncate(path, 700)
    assert reader.read(0) == sample and path.stat().st_size > 700


def test_a_bad_sample_over_there_is_replaced_as_one_here(server, dataset, cache, tmp_path):
    index = read_index(dataset / "train/index.parquet")
    damaged = bytearray((dataset / SHARD.lstrip("/")).read_bytes())
    damaged[int(index.offset[1]) + 600] ^= 1
    server.files[SHARD] = bytes(damaged)
    loader = train_batches(server.address, cache, max_bad_samples=0.1)
    found = list(loader)
    (bad,) = loader.bad_samples
    assert bad.key == index.key[1].as_py() and bad.shard == server.address + SHARD
    expected = list(train_batches(dataset, cache))
    assert sum(not torch.equal(a.ids, b.ids) for a, b in zip(found, expected, strict=True)) in (1, 2)


def test_a_server_that_fails_is_no_bad_sample(server, cache):
    loader = train_batches(server.address, cache, max_bad_samples=0.9, workers=1)
    batches = iter(loader)
    next(batches)
    server.status = 503
    with pytest.raises(DataUnavailable, match="503") as caught:
        list(batches)
    assert server.address in caught.value.where and caught.value.exit_code == 3 and not loader.bad_samples


def test_an_index_that_changed_over_there_is_noticed(server, dataset, cache):
    before = open_split(server.address, "train", cache)
    index = before.index
    changed = dataclasses.replace(index, label=(index.label + 1) % 5)
    write_index(cache.directory / "index", changed)
    server.files["/train/index.parquet"] = (cache.directory / "index").read_bytes()
    after = open_split(server.address, "train", cache)
    np.testing.assert_array_equal(after.index.label, changed.label)


def test_an_index_that_this_disk_damaged_is_fetched_anew(server, dataset, cache):
    keys = open_split(server.address, "train", cache).index.key
    path = cache._path(transport.Url(server.address) / "train" / "index.parquet")
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    assert open_split(server.address, "train", cache).index.key == keys
    server.files["/train/index.parquet"] = b"PAR1 nonsense PAR1"
    with pytest.raises(DataError, match="index cannot be read"):
        open_split(server.address, "train", cache)


@pytest.mark.parametrize("name", ["../../evil.tar", "/etc/passwd", "..", "a/b.tar"])
def test_an_index_cannot_name_files_elsewhere(server, dataset, cache, tmp_path, name):
    index = read_index(dataset / "train/index.parquet")
    write_index(tmp_path / "index", dataclasses.replace(index, shards=[name, *index.shards[1:]]))
    server.files["/train/index.parquet"] = (tmp_path / "index").read_bytes()
    with pytest.raises(DataError, match="outside of its directory"):
        open_split(server.address, "train", cache)


def test_what_is_not_there_is_said(server, cache):
    with pytest.raises(SplitMissing, match='no split "test"'):
        open_split(server.address, "test", cache)
    with pytest.raises(DataError, match=r"has no classes\.json") as caught:
        open_split(f"{server.address}/train", "train", cache)
    assert server.address in str(caught.value)
    with pytest.raises(DataError, match="no dataset directory"):
        read_dataset_facts(f"{server.address}/nothing")
    with pytest.raises(DataError, match="refused"):
        read_dataset_facts("http://127.0.0.1:9/data")
    server.files["/train/pixels-train-000000.tar"] = b"short"
    with pytest.raises(DataUnavailable, match="truncated: 5 bytes, the index knows"):
        open_split(server.address, "train", cache).read(0)
