import dataclasses
import io
import os
import pickle
import resource
import tarfile
from weakref import WeakSet

import numpy as np
import pytest
from data_sets import pixel_source, write_pixels

from vitds.data import reader, ustar
from vitds.data.decode import decode
from vitds.data.index import read_index, write_index
from vitds.data.reader import ShardReader
from vitds.data.verify import verify_dataset
from vitds.errors import DataError, DataUnavailable


@pytest.fixture
def dataset(tmp_path):
    return write_pixels(tmp_path / "out")


def test_every_sample_comes_back_as_it_went_in(dataset):
    source, split = pixel_source(53, seed=1), ShardReader(dataset, "train")
    assert len(split) == 53 and split.classes == source.classes and len(split.classes) == 5
    for sample_id in range(53):
        sample = split.read(sample_id)
        row = int(sample.key.removeprefix("image-"))
        assert sample.extension == "png" and sample.label == source.labels[row]
        np.testing.assert_array_equal(decode(sample.data).transpose(1, 2, 0), source.images[row])


def test_a_flipped_bit_anywhere_in_a_sample_is_found_and_named(dataset):
    split = ShardReader(dataset, "val")
    start, size = int(split.index.offset[3]), int(split.index.size[3])
    shard = dataset / "val" / split.index.shards[0]
    whole = shard.read_bytes()
    for place in (0, 130, 512 + 40, size - 1024, size - 512, size - 1):
        damaged = bytearray(whole)
        damaged[start + place] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match="crc32") as caught:
            split.read(3)
        assert shard.name in str(caught.value) and "image-3" in str(caught.value) and caught.value.exit_code == 3
        assert split.read(2).key == "image-2" and split.read(4).key == "image-4"


def test_a_truncated_or_missing_shard_is_named_when_the_split_is_opened(dataset):
    shard = dataset / "val" / "pixels-val-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"(?s)pixels-val-000001.tar.*truncated"):
        ShardReader(dataset, "val")
    shard.unlink()
    with pytest.raises(DataError, match=r"pixels-val-000001\.tar"):
        ShardReader(dataset, "val")


def test_a_shard_that_shrinks_under_an_open_reader_is_named(dataset):
    split = ShardReader(dataset, "val")
    with open(dataset / "val" / split.index.shards[0], "r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(DataError, match="truncated"):
        split.read(0)


def test_wrong_places_are_told_apart(dataset, tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        ShardReader(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="not a data set"):
        ShardReader(tmp_path, "train")
    with pytest.raises(DataError, match='no split "test"') as caught:
        ShardReader(dataset, "test")
    assert "train, val" in caught.value.fix
    (dataset / "val" / "index.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match="index cannot be read"):
        ShardReader(dataset, "val")
    (dataset / "val" / "index.parquet").unlink()
    with pytest.raises(DataError, match=r"no index\.parquet"):
        ShardReader(dataset, "val")


@pytest.mark.parametrize("name", ["../../outside.tar", "/etc/passwd", "..", "a/b.tar", "a\0b.tar"])
def test_an_index_cannot_name_files_elsewhere(dataset, name):
    path = dataset / "val/index.parquet"
    index = read_index(path)
    (dataset / "val" / index.shards[0]).rename(dataset.parent / "outside.tar")
    write_index(path, dataclasses.replace(index, shards=[name, *index.shards[1:]]))
    with pytest.raises(DataError, match="outside of its directory") as caught:
        ShardReader(dataset, "val")
    assert caught.value.where == str(path)
    (finding,) = [line for line in verify_dataset(dataset, decode_images=False).findings if "outside of" in line]
    assert finding.startswith(str(path))


def test_few_descriptors_suffice_and_a_reader_can_be_pickled(dataset, monkeypatch):
    monkeypatch.setattr(reader, "_readers", WeakSet())
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 2)
    split = ShardReader(dataset, "train")
    keys = [split.read(sample_id).key for sample_id in (*range(53), *range(53))]
    assert keys[:53] == keys[53:] and len(split._descriptors) == 2
    assert pickle.loads(pickle.dumps(split)).read(7).key == keys[7]
    split.close()
    assert split.read(7).key == keys[7]


def num_open(dataset):
    """How many descriptors of this process are of files of a data set."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(dataset)) for link in links if os.path.islink(link))


def test_readers_share_the_descriptors_of_a_process_and_let_go_of_them(tmp_path, monkeypatch):
    dataset = write_pixels(tmp_path / "out", samples_per_shard=1)
    monkeypatch.setattr(reader, "_readers", WeakSet())
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, old[1]))  # so 40 are for shards
    try:
        splits = [ShardReader(dataset, "train") for _ in range(3)]
        assert len(splits[0].index.shards) == 53
        most = 0
        for sample_id in range(53):
            assert len({split.read(sample_id).key for split in splits}) == 1
            most = max(most, num_open(dataset))
        assert most == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    splits.clear()
    assert num_open(dataset) == 0


def test_what_the_machine_cannot_do_makes_no_sample_bad(dataset):
    split = ShardReader(dataset, "val")
    shard = dataset / "val" / split.index.shards[0]
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, old[1]))
    try:
        with pytest.raises(DataUnavailable, match="Too many open files") as caught:
            split.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert caught.value.where == str(shard) and caught.value.exit_code == 3
    shard.unlink()
    with pytest.raises(DataError, match="No such file") as caught:
        split.read(0)
    assert not isinstance(caught.value, DataUnavailable)
    shard.symlink_to("/proc/self/mem")  # opens, and fails to be read where nothing is mapped
    with pytest.raises(DataUnavailable, match="Input/output error") as caught:
        split.read(0)
    assert caught.value.where == str(shard)
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(DataUnavailable, match="cannot be opened: Too many levels of symbolic links"):
        ShardReader(dataset, "val")


def test_the_image_of_a_foreign_sample_is_its_first_member_named_like_one(dataset):
    """However its tar was written: here the label comes first, under a long name of GNU's format, then a mask."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for extension, content in (("cls", b"1"), ("mask.png", b"mask"), ("PNG", b"image")):
            info = tarfile.TarInfo("k" * 120 + "." + extension)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert ustar.image_in(stream.getvalue()) == ("png", b"image")
    with pytest.raises(ValueError, match="no image"):
        ustar.image_in(ustar.member("a.cls", b"1"))
