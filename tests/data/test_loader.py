import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from data_sets import damage, pixel_source, write_pixels

from vitds.data.loader import BadSample, EvalLoader, TrainLoader, pixel_hash
from vitds.data.order import NaturalOrder, build_order
from vitds.data.reader import ShardReader
from vitds.ds_config import Batch
from vitds.errors import ConfigError, DataError, DataUnavailable
from vitds.run_config import DataConfig
from vitds.world import World

SIZE = (8, 10)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("loader") / "out")


def train_loader(
    dataset, batch, rank=0, samples_seen=0, steps=9, workers=0, data=None, device="cpu", order=None, **options
):
    reader = ShardReader(dataset, "train")
    data = data or DataConfig()
    order = order or build_order(data, 1, batch.global_batch, reader.indexes)
    return TrainLoader(
        reader, order, data, SIZE, 5, batch, World(rank, rank, batch.world_size),
        1, samples_seen, steps, workers, device, torch.float32, **options,
    )  # fmt: skip


def eval_loader(dataset, batch_size, rank=0, world_size=1, workers=0, data=None):
    world = World(rank, rank, world_size)
    return EvalLoader(
        ShardReader(dataset, "val"), data or DataConfig(), SIZE, batch_size, world, workers, "cpu", torch.float32
    )


def same(first, second):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("images", "targets", "ids")
    )


def global_batches(dataset, batch, **options):
    """Images and targets of every step, all ranks and micro-batches in the order of the stream."""
    ranks = [list(train_loader(dataset, batch, rank, **options)) for rank in range(batch.world_size)]
    steps = len(ranks[0]) // batch.accumulation_steps
    parts = [
        [micro for rank in ranks for micro in rank[step * batch.accumulation_steps :][: batch.accumulation_steps]]
        for step in range(steps)
    ]
    return [(torch.cat([m.images for m in part]), torch.cat([m.targets for m in part])) for part in parts]


@pytest.mark.parametrize("data", [DataConfig(), DataConfig(mixup_alpha=0.4), DataConfig(randaugment_layers=2)])
def test_world_size_micro_batch_and_accumulation_change_nothing(dataset, data):
    whole = global_batches(dataset, Batch(12, 12, 1, 1), data=data)
    assert len(whole) == 9
    for batch in (Batch(12, 2, 6, 1), Batch(12, 6, 1, 2), Batch(12, 2, 2, 3)):
        for (images, targets), (expected_images, expected_targets) in zip(
            global_batches(dataset, batch, data=data), whole, strict=True
        ):
            assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)


@pytest.mark.parametrize("trial", range(20))
def test_pixels_and_targets_do_not_depend_on_how_a_batch_is_cut(dataset, trial):
    """Random recipes, batches, layouts and starts: every layout sees the batches of one rank with one micro-batch."""
    random = Random(trial)
    choices = {
        "repeats": (1, 2),
        "train_crop": ("random", "pad", "simple", "none"),
        "randaugment_layers": (0, 1, 2),
        "three_augment": (False, True),
        "color_jitter": (0.0, 0.3),
        "erase": (0.0, 0.5),
        "mixup_alpha": (0.0, 0.2, 0.8),
        "cutmix_alpha": (0.3, 1.0),
        "cutmix_share": (0.0, 0.5, 1.0),
        "mixed_targets": ("shares", "ones"),
    }
    data = DataConfig(**{key: random.choice(values) for key, values in choices.items()})
    num_pairs, first_step = random.choice([2, 6, 12, 30]), random.randrange(3)
    global_batch = 2 * num_pairs
    layouts = [
        Batch(global_batch, 2 * micro_pairs, num_pairs // micro_pairs // world_size, world_size)
        for micro_pairs in range(1, num_pairs + 1)
        for world_size in range(1, num_pairs + 1)
        if num_pairs % (micro_pairs * world_size) == 0
    ]
    place = {"data": data, "samples_seen": first_step * global_batch, "steps": first_step + 2}
    whole = global_batches(dataset, Batch(global_batch, global_batch, 1, 1), **place)
    for batch in random.sample(layouts, 3):
        for ours, expected in zip(global_batches(dataset, batch, **place), whole, strict=True):
            assert all(map(torch.equal, ours, expected)), batch
    targets = torch.cat([targets for _, targets in whole])
    assert targets.shape == (2 * global_batch, 5) and targets.dtype == torch.float32
    if data.mixed_targets == "shares":
        torch.testing.assert_close(targets.sum(1), torch.ones(2 * global_batch))
    else:
        assert set(targets.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(dataset, workers):
    batch = Batch(8, 4, 2, 1)
    assert same(train_loader(dataset, batch, workers=workers), train_loader(dataset, batch))
    assert same(eval_loader(dataset, 4, workers=workers), eval_loader(dataset, 4))


def test_a_resumed_loader_gives_the_tail_of_the_unbroken_one(dataset):
    batch = Batch(20, 5, 2, 2)
    whole = list(train_loader(dataset, batch, rank=1))
    assert len(whole) == 18
    for step in (1, 4, 8):
        assert same(train_loader(dataset, batch, rank=1, samples_seen=step * 20), whole[2 * step :])
    assert not list(train_loader(dataset, batch, samples_seen=180))


def test_targets_are_the_labels_of_the_ids_and_epochs_are_whole(dataset):
    labels = ShardReader(dataset, "train").index.label
    micro_batches = list(train_loader(dataset, Batch(53, 53, 1, 1), steps=3))
    for micro_batch in micro_batches:
        assert sorted(micro_batch.ids.tolist()) == list(range(53))
        assert micro_batch.targets.tolist() == labels[micro_batch.ids].tolist()
        assert micro_batch.valid == 53 and micro_batch.images.is_contiguous()
    assert not torch.equal(micro_batches[0].ids, micro_batches[1].ids)


def test_the_pixel_hash_of_a_step_is_the_sum_of_its_parts_and_knows_every_pixel_and_place(dataset):
    def hashes(batch, **options):
        ranks = [list(train_loader(dataset, batch, rank, hash_every=2, **options)) for rank in range(batch.world_size)]
        per_step = np.array([[m.pixel_hash for m in rank] for rank in ranks], dtype=np.uint64)
        return per_step.reshape(batch.world_size, -1, batch.accumulation_steps).sum(axis=(0, 2), dtype=np.uint64)

    whole = hashes(Batch(12, 12, 1, 1), steps=6)
    assert (whole[::2] == 0).all() and len(set(whole[1::2].tolist())) == 3
    assert (hashes(Batch(12, 2, 3, 2), steps=6) == whole).all()
    assert (hashes(Batch(12, 3, 4, 1), steps=6, samples_seen=24, workers=2) == whole[2:]).all()

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    bits = pixel_hash(range(4), images)
    assert pixel_hash(range(1, 5), images) != bits != pixel_hash(range(4), images.flip(0))
    images[2, 1, 3, 3] ^= 1
    assert pixel_hash(range(4), images) != bits


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_left_out_are_jumped_over_and_no_step_loses_its_hash(dataset, workers):
    def steps(left_out, **options):
        loader = train_loader(dataset, Batch(12, 12, 1, 1), hash_every=2, workers=workers, **options)
        loader.leave_out(left_out)
        return [(m.ids.tolist(), m.pixel_hash != 0) for m in loader]

    ids = [ids for ids, _ in steps([], steps=9)]
    expected = [(ids[number], bool(step % 2)) for step, number in enumerate([0, 1, 3, 6, 7, 8])]
    assert steps([2, 4, 5], steps=6) == expected
    assert steps([2, 4, 5], steps=6, samples_seen=12 * 4) == expected[3:], "resumed behind the third step"


def test_the_index_of_a_micro_batch_is_its_place_in_the_global_batch(dataset):
    indices = [[m.index for m in train_loader(dataset, Batch(12, 2, 3, 2), rank, steps=2)] for rank in (0, 1)]
    assert indices == [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 29, 64])
def test_evaluation_counts_each_sample_once_and_keeps_ranks_in_step(dataset, world_size, batch_size):
    ranks = [list(eval_loader(dataset, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    for rank, micro_batches in enumerate(ranks):
        assert [m.index for m in micro_batches] == [rank + world_size * n for n in range(len(micro_batches))]
    counted = [i for rank in ranks for m in rank for i in m.ids[: m.valid].tolist()]
    assert sorted(counted) == list(range(29))
    padding = [m for rank in ranks for m in rank if m.valid == 0]
    assert all(m.images.shape == (1, 3, *SIZE) and m.ids.tolist() == [-1] for m in padding)


def test_evaluation_pixels_do_not_depend_on_batch_or_world(dataset):
    alone = torch.cat([m.images for m in eval_loader(dataset, 29)])
    for rank in range(3):
        for micro_batch in eval_loader(dataset, 4, rank, 3):
            if micro_batch.valid:
                assert torch.equal(micro_batch.images, alone[micro_batch.ids])


@pytest.mark.parametrize("mean, std", [(0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_pixels_are_normalised_in_float32_then_cast(dataset, mean, std):
    data = DataConfig(train_crop="none", flip=0.0, mean=mean, std=std)
    source = pixel_source(53, seed=1)
    reader = ShardReader(dataset, "train")
    place = (Batch(4, 4, 1, 1), World(), 0, 0, 1, 0, "cpu", torch.bfloat16)
    loader = TrainLoader(reader, NaturalOrder(0, len(reader)), data, (12, 15), 5, *place)
    (micro_batch,) = loader
    for image, sample_id in zip(micro_batch.images, micro_batch.ids.tolist(), strict=True):
        pixels = source.images[int(reader.key(sample_id).removeprefix("image-"))].astype(np.float64) / 255
        expected = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)
        torch.testing.assert_close(image.double(), expected, rtol=2**-8, atol=1e-6)
        assert image.dtype == torch.bfloat16


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_fatal_unless_a_share_is_allowed(tmp_path, workers):
    dataset = write_pixels(tmp_path / "out")
    batch = Batch(8, 4, 1, 2)
    before = [list(train_loader(dataset, batch, rank, steps=14)) for rank in (0, 1)]
    keys = [damage(dataset, "train", sample_id) for sample_id in (3, 17)]

    with pytest.raises(DataError, match="crc32") as caught:
        list(train_loader(dataset, batch, workers=workers, steps=14))
    assert caught.value.exit_code == 3
    assert any(key in str(caught.value) for key in keys) and "pixels-train-" in str(caught.value)

    told = []
    options = {"steps": 14, "workers": workers, "max_bad_samples": 0.05, "on_bad_sample": told.append}
    loaders = [train_loader(dataset, batch, rank, **options) for rank in (0, 1)]
    after = [list(loader) for loader in loaders]
    num_replaced = 0
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        is_bad = torch.isin(old.ids, torch.tensor([3, 17]))
        assert torch.equal(old.images[~is_bad], new.images[~is_bad])  # no other sample moved
        assert torch.equal(old.ids[~is_bad], new.ids[~is_bad]) and not torch.isin(new.ids, torch.tensor([3, 17])).any()
        num_replaced += int(is_bad.sum())
    assert num_replaced == 4  # each twice in the 112 positions of two epochs and a bit
    assert {bad.key for loader in loaders for bad in loader.bad_samples} == set(keys)
    assert all(len(loader.bad_samples) == len(set(loader.bad_samples)) for loader in loaders)
    assert sorted(told) == sorted(bad for loader in loaders for bad in loader.bad_samples)
    again = list(train_loader(dataset, batch, 1, steps=14, max_bad_samples=0.05, samples_seen=56))
    assert same(again, after[1][7:])


def test_what_others_and_earlier_starts_met_counts_too(tmp_path):
    dataset = write_pixels(tmp_path / "out")
    keys = [damage(dataset, "train", sample_id) for sample_id in (3, 17)]
    elsewhere = [BadSample("/another/place/pixels-train-000000.tar", key, "") for key in (keys[0], "image-of-another")]

    def loader(**options):
        return train_loader(dataset, Batch(53, 53, 1, 1), steps=1, max_bad_samples=2.5 / 53, **options)

    told = []
    resumed = loader(on_bad_sample=told.append)
    resumed.know(elsewhere[:1])
    list(resumed)
    assert [bad.key for bad in told] == [keys[1]] and len(resumed.known_bad) == 2

    full = loader()
    full.know(elsewhere)
    with pytest.raises(DataError, match="3 bad of 53 samples"):
        list(full)
    with pytest.raises(DataError, match="3 bad of 53"):
        loader().know([*elsewhere, BadSample("a", "b", "")])


def test_a_disk_that_fails_replaces_no_sample_and_no_split_is_to_be_written_again(tmp_path):
    dataset = write_pixels(tmp_path / "out")
    train = train_loader(dataset, Batch(53, 53, 1, 1), steps=1, max_bad_samples=1.0)
    for split, loader in {"train": train, "val": eval_loader(dataset, 4)}.items():
        shard = dataset / split / f"pixels-{split}-000000.tar"
        shard.unlink()
        shard.symlink_to("/proc/self/mem")  # opens, and fails to be read where nothing is mapped
        with pytest.raises(DataUnavailable, match="Input/output error") as caught:
            list(loader)
        assert caught.value.where == str(shard) and not caught.value.fix


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_a_replacement_of_a_balanced_order_is_of_the_same_class(tmp_path, sampling):
    dataset = write_pixels(tmp_path / "out")
    labels = ShardReader(dataset, "train").index.label
    bad = np.flatnonzero(labels == 2)[:4].tolist()
    for sample_id in bad:
        damage(dataset, "train", sample_id)
    data = DataConfig(sampling=sampling)
    order = build_order(data, 1, 50, ShardReader(dataset, "train").indexes)
    (replaced,) = train_loader(dataset, Batch(50, 50, 1, 1), steps=1, order=order, max_bad_samples=0.5)
    planned = order.at(np.arange(50)).ids
    was_bad = np.isin(planned, bad)
    assert was_bad.any() and (replaced.ids.numpy()[~was_bad] == planned[~was_bad]).all()
    assert not np.isin(replaced.ids, bad).any()
    assert (labels[replaced.ids] == labels[planned]).all() == (sampling == "balanced")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_ends_an_evaluation(tmp_path, workers):
    dataset = write_pixels(tmp_path / "out")
    key = damage(dataset, "val", 11)
    with pytest.raises(DataError, match="crc32") as caught:
        list(eval_loader(dataset, 4, workers=workers))
    assert f"pixels-val-000001.tar {key}" in str(caught.value)


def test_data_without_a_single_good_sample_ends(tmp_path):
    dataset = write_pixels(tmp_path / "out", num_train=2, num_val=2)
    for sample_id in (0, 1):
        damage(dataset, "train", sample_id)
    with pytest.raises(DataError, match="100 samples in a row"):
        list(train_loader(dataset, Batch(2, 2, 1, 1), max_bad_samples=1.0))


def test_what_cannot_be_trained_is_refused_at_once(dataset):
    with pytest.raises(ConfigError, match="no whole number of global batches"):
        train_loader(dataset, Batch(8, 8, 1, 1), samples_seen=12)


def test_mixup_blends_one_image_with_its_neighbour(dataset):
    plain = next(iter(train_loader(dataset, Batch(8, 8, 1, 1))))
    mixed = next(iter(train_loader(dataset, Batch(8, 8, 1, 1), data=replace(DataConfig(), mixup_alpha=0.4))))
    assert mixed.targets.shape == (8, 5) and mixed.targets.dtype == torch.float32
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(8))
    for pair in range(4):
        own = slice(2 * pair, 2 * pair + 2)
        torch.testing.assert_close(mixed.images[own].sum(0), plain.images[own].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_model_s_random_numbers_are_left_alone(dataset, workers):
    before = torch.get_rng_state()
    list(train_loader(dataset, Batch(8, 8, 1, 1), workers=workers))
    list(eval_loader(dataset, 8, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches(dataset):
    batch, data = Batch(8, 8, 1, 1), DataConfig(mixup_alpha=0.4, cutmix_alpha=1.0, three_augment=True, erase=0.5)
    on_gpu = list(train_loader(dataset, batch, data=data, workers=2, device="cuda"))
    for micro_batch, expected in zip(on_gpu, train_loader(dataset, batch, data=data), strict=True):
        assert micro_batch.images.is_cuda and micro_batch.targets.is_cuda
        torch.testing.assert_close(micro_batch.images.cpu(), expected.images, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(micro_batch.targets.cpu(), expected.targets)


STOPPED = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
from vitds.data.loader import TrainLoader
from vitds.data.order import NaturalOrder, build_order
from vitds.data.reader import ShardReader
from vitds.ds_config import Batch
from vitds.run_config import DataConfig
from vitds.world import World
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"asked to stop\\n"))  # print may be in the middle of "ready"
dataset, batch = ShardReader(sys.argv[1], "train"), Batch(4, 4, 1, 1)
place = (batch, World(), 0, 0, 10**6, 2, "cpu", torch.float32)
loader = TrainLoader(dataset, NaturalOrder(0, len(dataset)), DataConfig(), (8, 8), 5, *place)
batches = iter(loader)
next(batches)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    next(batches)
print("50 more", flush=True)
raise ZeroDivisionError
"""


@pytest.mark.ranks
def test_workers_outlive_a_sigterm_to_the_whole_group_and_end_with_their_rank(dataset):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(dataset)], cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "asked to stop\n", (process.wait(60), process.stderr.read()[-2000:])
    output, errors = process.communicate("go\n", timeout=60)
    assert output == "50 more\n" and "ZeroDivisionError" in errors and process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
def test_workers_memory_comes_round_again_and_no_batch_is_written_over(dataset, delay_s):
    """Also for a rank that is slow, and looks at a batch until it takes the next."""
    batch = Batch(3, 3, 1, 1)
    expected = list(train_loader(dataset, batch, steps=60))
    for micro_batch, alone in zip(train_loader(dataset, batch, steps=60, workers=2), expected, strict=True):
        time.sleep(delay_s)
        assert torch.equal(micro_batch.images, alone.images) and torch.equal(micro_batch.ids, alone.ids)


def test_batches_are_contiguous_on_the_device(dataset):
    assert next(iter(train_loader(dataset, Batch(4, 4, 1, 1)))).images.is_contiguous()
