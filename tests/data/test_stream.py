"""Streams of tar shards: labels, steps, resumes and damage, for any number of ranks and data processes."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_shards import NUM_CLASSES, image_of, labels_shown, write_shards, write_tar
from web_server import Server, serving

from vitds.data.order import sample_at
from vitds.data.stream import StreamLoader, TarStream, merge_done
from vitds.ds_config import Batch
from vitds.errors import DataError, DataUnavailable
from vitds.run_config import DataConfig
from vitds.stream_facts import shard_urls
from vitds.world import World

SIZES = (7, 1, 30)
PLAIN = DataConfig(train_crop="none", flip=0.0)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return shard_urls(write_shards(tmp_path_factory.mktemp("uneven"), SIZES))


def loader(shards, batch, rank=0, steps=10, workers=0, first_step=0, data=PLAIN, told=None, **stream):
    options = {"samples_per_epoch": sum(SIZES), "num_classes": NUM_CLASSES, "shuffle_buffer": 8}
    samples_seen = first_step * batch.global_batch
    return StreamLoader(
        TarStream(shards, **options | stream), data, (8, 8), batch, World(rank, rank, batch.world_size), samples_seen,
        steps, workers, "cpu", torch.float32, on_bad_sample=(told if told is not None else []).append,
    )  # fmt: skip


def keys(micro_batches):
    return [key for micro_batch in micro_batches for key in micro_batch.ids.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_uneven_and_too_few_shards_give_every_rank_its_steps_and_every_label_is_right(uneven, world_size, workers):
    batch = Batch(6 * world_size, 3, 2, world_size)
    for rank in range(world_size):
        micro_batches = list(loader(uneven, batch, rank, workers=workers, data=DataConfig()))
        assert [m.index for m in micro_batches] == [2 * rank, 2 * rank + 1] * 10
        for micro_batch in micro_batches:
            assert micro_batch.images.shape == (3, 3, 8, 8)
            assert labels_shown(micro_batch.images) == micro_batch.targets.tolist()


def test_one_consumer_sees_each_pass_whole(uneven):
    seen = keys(loader(uneven, Batch(38, 38, 1, 1), steps=6, shuffle_buffer=1))
    assert all(set(Counter(seen[start : start + 38]).values()) == {1} for start in range(0, len(seen), 38))
    assert seen[:38] != seen[38:76]


def test_a_sample_is_augmented_by_its_pass_its_shard_and_its_key_wherever_it_is_made(uneven):
    """Two passes over one shard of 30, by one consumer, by two ranks, and by two data processes of a rank."""
    data = DataConfig(randaugment_layers=2)

    def images(micro_batches):
        return {key: image for m in micro_batches for key, image in zip(m.ids.tolist(), m.images, strict=True)}

    def made(*place, **options):
        return list(loader(uneven[2:], *place, data=data, shuffle_buffer=1, **options))

    alone = made(Batch(10, 10, 1, 1), steps=6)
    split = made(Batch(10, 10, 1, 1), steps=6, workers=2)
    ranks = [made(Batch(20, 10, 1, 2), rank, steps=3) for rank in (0, 1)]
    for first, others in enumerate(zip((alone[:3], alone[3:]), (split[0::2], split[1::2]), ranks, strict=True)):
        expected, *again = map(images, others)
        assert len(expected) == 30
        for found in again:
            assert found.keys() == expected.keys(), first
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    one, other = images(alone[:3]), images(alone[3:])
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_done_shards_are_a_number_and_those_beyond_it():
    assert merge_done([0], []) == [0]
    assert merge_done([0], [2, 0]) == [1, 2]
    assert merge_done([1, 2, 5], [1, 3]) == [4, 5]
    random = np.random.default_rng(3)
    for _ in range(50):
        finished = random.permutation(40)[: random.integers(41)].tolist()
        done = [0]
        for part in np.array_split(finished, 5):
            done = merge_done(done, part.tolist())
        assert sorted([*range(done[0]), *done[1:]]) == sorted(finished) and done[0] not in finished


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
def test_a_resume_reads_again_only_shards_that_were_open_and_leaves_none_out(tmp_path, ranks_after):
    """Two ranks of two data processes stop in the middle of the first pass; others finish it."""
    sizes = [5, 9, 3, 14, 6, 2, 8, 11]
    shards = shard_urls(write_shards(tmp_path, sizes))
    of_shard = [
        set(keys(loader([url], Batch(n, n, 1, 1), steps=1, shuffle_buffer=1)))
        for url, n in zip(shards, sizes, strict=True)
    ]
    order = [of_shard[place] for place in sample_at(range(8), 0, 8)[1]]  # of the first pass
    done, seen = [0], set()
    for rank in range(2):
        part = loader(shards, Batch(8, 4, 1, 2), rank, steps=5, workers=2, shuffle_buffer=4)
        seen.update(keys(part))
        done = merge_done(done, part.take_finished())
    numbers = [*range(done[0]), *done[1:]]
    assert 0 < len(numbers) < 8 and all(order[number] <= seen for number in numbers)

    left = [samples for number, samples in enumerate(order) if number not in numbers]
    for rank in range(ranks_after):
        mine = left[rank::ranks_after]  # dealt round robin
        size = sum(map(len, mine))
        batch = Batch(size * ranks_after, size, 1, ranks_after)
        (micro_batch,) = loader(shards, batch, rank, steps=1, shuffle_buffer=1, done=done)
        assert set(micro_batch.ids.tolist()) == set().union(*mine)
        seen.update(micro_batch.ids.tolist())
    assert len(seen) == sum(sizes)


def test_take_finished_tells_each_shard_once_and_only_when_all_of_it_was_handed_over(uneven):
    sizes = [SIZES[place] for place in sample_at(range(9), 0, 3)[1]]
    told, num_seen = [], 0
    part = loader(uneven, Batch(1, 1, 1, 1), steps=3 * 38, shuffle_buffer=5)
    for _ in part:
        num_seen += 1
        told += part.take_finished()
        assert sum(sizes[number] for number in told) <= num_seen
    assert len(told) == len(set(told)) and set(range(6)) <= set(told) <= set(range(9))


def test_mixup_blends_pairs_of_the_micro_batch_by_the_places_own_counters(uneven):
    data = DataConfig(train_crop="none", flip=0.0, mixup_alpha=0.8)
    mixed = list(loader(uneven, Batch(8, 4, 2, 1), steps=3, data=data))
    plain = list(loader(uneven, Batch(8, 4, 2, 1), steps=3))
    for one, other in zip(mixed, plain, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.targets.shape == (4, NUM_CLASSES)
        assert torch.allclose(one.targets.sum(1), torch.ones(4))
        levels = (one.images.double().mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255 / 16
        assert torch.allclose(levels, one.targets.double() @ torch.arange(NUM_CLASSES).double(), atol=1e-2)


def test_several_labels_a_sample_become_multi_hot_targets(tmp_path):
    members = [("a.png", image_of(1)), ("a.json", b'{"labels": [5, 2]}'), ("b.png", image_of(2)), ("b.cls", b"3")]
    shards = [str(write_tar(tmp_path / "s.tar", members))]
    (micro_batch,) = loader(shards, Batch(2, 2, 1, 1), steps=1, multi_label=True, shuffle_buffer=1)
    assert sorted(row.nonzero().flatten().tolist() for row in micro_batch.targets) == [[2, 5], [3]]
    with pytest.raises(DataError, match="has 2 labels, which takes --loss bce"):
        list(loader(shards, Batch(2, 2, 1, 1), steps=1))


GOOD = [(f"good-{row}.{kind}", body) for row in range(20) for kind, body in (("png", image_of(3)), ("cls", b"3"))]
ONE = [("x.png", image_of(1)), ("x.cls", b"1")]
BAD = {
    "no label": ([("x.png", image_of(1))], "x", "has no label"),
    "no image": ([("x.cls", b"1")], "x", "has no image"),
    "label out of range": ([("x.png", image_of(1)), ("x.cls", b"8")], "x", "label 8, and there are 8 classes"),
    "label below 0": ([("x.png", image_of(1)), ("x.cls", b"-1")], "x", "-1 is below 0"),
    "label no number": ([("x.png", image_of(1)), ("x.cls", b"cat")], "x", "label b'cat'"),
    "undecodable": ([("x.png", b"\x89PNG\r\n" + bytes(90)), ("x.cls", b"1")], "x", ""),
    "empty image": ([("x.jpg", b""), ("x.cls", b"1")], "x", ""),
    "duplicate key": ([*ONE, ("y.png", image_of(1)), ("y.cls", b"1"), *ONE], "x", "duplicate key"),
    "two images": ([("x.png", image_of(1)), ("x.png", image_of(2)), ("x.cls", b"1")], "x", "has two members x.png"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_sample_is_named_by_shard_and_key_skipped_and_counted_once(tmp_path, what):
    members, key, reason = BAD[what]
    shards = [str(write_tar(tmp_path / "s.tar", GOOD[:20] + members + GOOD[20:]))]
    told = []
    part = loader(shards, Batch(5, 5, 1, 1), steps=12, told=told, max_bad_samples=0.1)
    shown = [label for m in part for label in labels_shown(m.images)]
    assert len(shown) == 60 and set(shown) <= {3, 1}
    assert [(bad.shard, bad.key) for bad in told] == [(shards[0], key)] and reason in told[0].reason
    with pytest.raises(DataError) as caught:
        list(loader(shards, Batch(5, 5, 1, 1), steps=12))
    assert caught.value.where == f"{shards[0]} {key}" and "1 bad of 38 samples" in caught.value.what


def test_a_disk_that_fails_makes_no_shard_bad(tmp_path):
    shards = shard_urls(write_shards(tmp_path, (12, 12)))
    Path(shards[1]).unlink()
    Path(shards[1]).symlink_to("/proc/self/mem")  # opens, and fails to be read where nothing is mapped
    with pytest.raises(DataUnavailable, match="Input/output error") as caught:
        list(loader(shards, Batch(4, 4, 1, 1), max_bad_samples=1.0))
    assert caught.value.where == shards[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "no tar"])
def test_a_damaged_shard_is_named_and_the_stream_goes_on_with_the_next(tmp_path, damage, workers):
    shards = shard_urls(write_shards(tmp_path, [12, 12]))
    bad = Path(shards[0])
    content = bad.read_bytes()
    bad.write_bytes(
        {"cut": content[: 1024 * 2 * 3 + 100], "empty": b"", "no tar": b"<html>" * 500}.get(damage, content)
    )
    if damage == "missing":
        bad.unlink()
    told = []
    part = loader(shards, Batch(4, 4, 1, 1), steps=15, workers=workers, told=told, max_bad_samples=0.5)
    shown = keys(part)
    assert len(shown) == 60
    assert len(set(shown)) == 12 + (3 if damage == "cut" else 0)  # whole samples in front of the cut are used
    assert [one.where for one in told] == [shards[0]]
    lost, what = (16, "the rest of a shard") if damage == "cut" else (19, "a shard")  # of 38 / 2 samples
    assert told[0].event == f"lost {what}, about {lost} samples" and part.known_bad == {told[0].name: lost}
    for share in (0.0, (lost - 1) / 38):
        with pytest.raises(DataError, match=f"{lost} bad of 38 samples") as caught:
            list(loader(shards, Batch(4, 4, 1, 1), steps=15, workers=workers, max_bad_samples=share))
        assert caught.value.where == shards[0] and caught.value.on_one_rank


def test_the_rest_of_a_shard_larger_than_most_counts_for_a_sample(uneven, tmp_path):
    cut = tmp_path / "large.tar"
    cut.write_bytes(Path(uneven[2]).read_bytes()[:-1024])  # its end mark
    told = []
    list(loader([str(cut), *uneven[:2]], Batch(4, 4, 1, 1), steps=15, told=told, max_bad_samples=0.03))
    assert [(one.weight, one.event) for one in told] == [(1, "lost the rest of a shard, about 1 sample")]


def test_a_label_that_the_command_has_no_place_for_is_no_damage(tmp_path):
    for label, fix in ((b'{"labels": [5, 2]}', "--loss bce"), (b'{"labels": 9}', "--num-classes 10")):
        shards = [str(write_tar(tmp_path / "s.tar", [("a.png", image_of(1)), ("a.json", label)]))]
        with pytest.raises(DataError, match="1 bad of 38") as caught:
            list(loader(shards, Batch(2, 2, 1, 1)))
        assert caught.value.fix.startswith(fix) and "repair" not in caught.value.fix


@pytest.mark.parametrize("content", [b"", None, "no image"])
def test_shards_that_are_all_bad_end_the_run(tmp_path, content):
    paths = [tmp_path / f"{number}.tar" for number in range(3)]
    for path in paths:
        if content == "no image":
            write_tar(path, [("notes.txt", b"x")])
        elif content is not None:
            path.write_bytes(content)
    for workers in (0, 1):
        said = "none of 3 shards holds a sample that can be used" if content == "no image" else "39 bad of 38"
        with pytest.raises(DataError, match=said):
            list(loader([*map(str, paths)], Batch(2, 2, 1, 1), workers=workers, max_bad_samples=0.9))


def test_images_that_are_all_bad_end_the_run(tmp_path):
    members = [(f"x{row}.{kind}", b"1") for row in range(5) for kind in ("jpg", "cls")]
    shards = [str(write_tar(tmp_path / "s.tar", members))]
    with pytest.raises(DataError, match="100 samples in a row cannot be used"):
        list(loader(shards, Batch(2, 2, 1, 1), max_bad_samples=0.9))


def test_shards_of_the_same_name_in_two_places_are_each_named(tmp_path):
    shards = [shard_urls(write_shards(tmp_path / place, [12]))[0] for place in "ab"] + shard_urls(
        write_shards(tmp_path / "c", [12])
    )
    for shard in shards[:2]:
        Path(shard).write_bytes(Path(shard).read_bytes()[:5000])
    told = []
    list(loader(shards, Batch(4, 4, 1, 1), steps=15, told=told, max_bad_samples=0.7))
    assert {bad.shard for bad in told} == set(shards[:2])


def test_a_query_is_neither_shown_nor_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_shards(tmp_path, [6, 6])
    cut = tmp_path / "s-001.tar"
    cut.write_bytes(cut.read_bytes()[:2048])
    local = [str(tmp_path / "s-000.tar"), str(cut)]
    server, told = Server(), []
    server.root = tmp_path
    with serving(server) as address:
        signed = [f"{address}/s-00{number}.tar?token=se/cret" for number in range(2)]
        seen = keys(loader(signed, Batch(4, 4, 1, 1), steps=5, told=told, max_bad_samples=0.5))
    assert [str(bad).partition(": ")[0] for bad in told] == [f"{address}/s-001.tar"]
    assert seen == keys(loader(local, Batch(4, 4, 1, 1), steps=5, max_bad_samples=0.5))


def test_a_member_that_is_no_file_is_named_as_such(tmp_path):
    path = write_tar(tmp_path / "s.tar", GOOD)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.LNKTYPE, "good-0.png"
        archive.addfile(link)
    with pytest.raises(DataError, match="is a link, not a file\n  1 bad of 38") as caught:
        list(loader([str(path)], Batch(4, 4, 1, 1), steps=15))
    assert caught.value.where == f"{path} x.png"


def test_nothing_but_images_and_labels_is_opened_and_no_name_leads_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = b"cos\nsystem\n(S'touch ran'\ntR."
    members = [
        *(("../up.png", image_of(2)), ("../up.cls", b"2"), ("/tmp/abs.png", image_of(5)), ("/tmp/abs.cls", b"5")),
        *(("up.pyd", code), ("up.pkl", code), ("up.pth", code), ("__notes__/x.png", b""), ("._up.png", b"")),
    ]
    shards = [str(write_tar(tmp_path / "s.tar", members))]
    parts = list(loader(shards, Batch(4, 4, 1, 1), steps=2))
    assert {label for part in parts for label in labels_shown(part.images)} == {2, 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar"]


def test_a_pipe_is_not_run_unless_allowed(tmp_path):
    shards = shard_urls(write_shards(tmp_path, [9]))
    pipe = [f"pipe:cat {shards[0]}"]
    with pytest.raises(DataError, match="allow-pipe"):
        list(loader(pipe, Batch(3, 3, 1, 1)))
    (part,) = loader(pipe, Batch(9, 9, 1, 1), steps=1, allow_pipe=True)
    assert sorted(part.targets.tolist()) == sorted(row % NUM_CLASSES for row in range(9))
