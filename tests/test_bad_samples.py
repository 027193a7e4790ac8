"""Every kind of image that turns up in the wild, named .jpg, through sharding, indexing, training and evaluation."""

import io
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vitds.data.adopt import index_shards
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.order import NaturalOrder
from vitds.data.reader import ShardReader
from vitds.data.sources import open_source
from vitds.data.writer import WriteOptions, write_dataset
from vitds.ds_config import Batch
from vitds.errors import DataError
from vitds.run_config import DataConfig
from vitds.world import World

SIZE = (16, 16)
PIXELS = np.add.outer(np.arange(40) * 3, np.arange(56) * 2)[..., None].astype(np.uint8) + np.uint8([0, 40, 90])
PHOTO = Image.fromarray(PIXELS)


def encoded(kind: str, image: Image.Image = PHOTO, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises this many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


def jpeg_that_claims(height: int, width: int) -> bytes:
    data = bytearray(JPEG)
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


JPEG, PNG, WEBP = encoded("JPEG", quality=95), encoded("PNG"), encoded("WEBP", lossless=True)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # "turn me by 90 degrees"
FRAMES = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]

GOOD = {
    "plain": JPEG,
    "progressive": encoded("JPEG", progressive=True),
    "grey": encoded("JPEG", PHOTO.convert("L")),
    "cmyk": encoded("JPEG", PHOTO.convert("CMYK")),
    "rotated-by-exif": encoded("JPEG", quality=95, exif=EXIF),
    "garbage-behind": JPEG + b"garbage" * 9,
    "png": PNG,
    "webp": WEBP,
    "palette": encoded("PNG", PHOTO.convert("P")),
    "alpha": encoded("PNG", PHOTO.convert("RGBA")),
    "grey-alpha": encoded("PNG", PHOTO.convert("LA")),
    "one-bit": encoded("PNG", PHOTO.convert("1")),
    "16-bit": encoded("PNG", Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8)),
    "animated": encoded("WEBP", FRAMES[0], save_all=True, append_images=FRAMES[1:], lossless=True),
    "wide": encoded("PNG", Image.new("RGB", (100_000, 1), "green")),
    "tall": encoded("PNG", Image.new("RGB", (1, 100_000), "green")),
    "one-pixel": encoded("PNG", Image.new("RGB", (1, 1), "green")),
}
BAD_HEADER = {
    "empty": b"",
    "text": b"not an image\n" * 99,
    "page": b"<!DOCTYPE html><html>404</html>",
    "cut-in-the-header": JPEG[:100],
    "webp-cut": WEBP[: len(WEBP) // 2],
    "bomb": png_that_claims(60_000, 60_000),
    "jpeg-bomb": jpeg_that_claims(65_000, 65_000),
}
BAD_PIXELS = {
    "cut": JPEG[: len(JPEG) // 2],
    "png-cut": PNG[: len(PNG) // 2],
    "png-flipped": PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 16]) + PNG[len(PNG) // 2 + 1 :],
}
ALL = GOOD | BAD_HEADER | BAD_PIXELS


@pytest.fixture
def shard(tmp_path):
    """A shard of somebody else's with all of them, as `KEY.jpg`; a `KEY.pyd` that must not be run beside each."""
    (tmp_path / "data/train").mkdir(parents=True)
    with tarfile.open(tmp_path / "data/train/wild.tar", "w") as tar:
        for label, (key, data) in enumerate(ALL.items()):
            for extension, content in (
                ("jpg", data),
                ("cls", b"%d" % (label % 3)),
                ("pyd", b"cposix\nsystem\n(S'x'\n"),
            ):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return tmp_path / "data"


def keys_named(lines) -> set[str]:
    return {key for key in ALL for line in lines if f"wild.tar {key}:" in line}


def train_loader(data, **options):
    reader, batch = ShardReader(data, "train"), Batch(8, 4, 1, 2)
    return [
        TrainLoader(
            reader, NaturalOrder(0, len(reader)), DataConfig(), SIZE, 3, batch, World(rank, rank, 2), 0, 0,
            3 * len(reader) // 8 + 1, 0, "cpu", torch.float32, **options,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_indexing_names_each_bad_sample_and_leaves_it_out_when_told_to(shard):
    with pytest.raises(DataError) as caught:
        index_shards(shard, WriteOptions("", verify=True))
    assert keys_named(str(caught.value).splitlines()) == BAD_HEADER.keys() | BAD_PIXELS.keys()
    summary = index_shards(shard, WriteOptions("", verify=True, skip_bad=True))
    assert keys_named(summary.splits["train"].bad) == BAD_HEADER.keys() | BAD_PIXELS.keys()
    reader = ShardReader(shard, "train")
    assert [reader.key(sample_id) for sample_id in range(len(reader))] == list(GOOD)


def test_training_replaces_what_only_decoding_finds_and_moves_no_other_sample(shard):
    summary = index_shards(shard, WriteOptions("", skip_bad=True))
    assert keys_named(summary.splits["train"].bad) == BAD_HEADER.keys()
    reader = ShardReader(shard, "train")
    bad_ids = {i for i in range(len(reader)) if reader.key(i) in BAD_PIXELS}
    loaders = train_loader(shard, max_bad_samples=0.5)
    order, seen = NaturalOrder(0, len(reader)), Counter()
    for loader in loaders:
        for step, micro_batch in enumerate(loader):
            positions = range(8 * step + 4 * loader.world.rank, 8 * step + 4 * loader.world.rank + 4)
            for planned, used in zip(order.at(positions).ids.tolist(), micro_batch.ids.tolist(), strict=True):
                assert used == planned or planned in bad_ids
                seen[planned] += 1
            assert micro_batch.targets.tolist() == [reader.index.label[i] for i in micro_batch.ids.tolist()]
    assert len(seen) == len(reader)
    named = [bad for loader in loaders for bad in loader.bad_samples]
    assert {bad.key for bad in named} == BAD_PIXELS.keys()
    assert all(bad.shard.endswith("wild.tar") and bad.reason for bad in named)

    with pytest.raises(DataError) as caught:
        [list(loader) for loader in train_loader(shard)]
    assert caught.value.exit_code == 3 and any(f"wild.tar {key}" in str(caught.value) for key in BAD_PIXELS)


@pytest.mark.parametrize("eval_crop", ["squash", "center"])
def test_evaluation_shows_every_good_image_and_stops_at_a_bad_one(shard, eval_crop):
    data = DataConfig(eval_crop=eval_crop)

    def evaluate():
        reader = ShardReader(shard, "train")
        loader = EvalLoader(reader, data, SIZE, 8, World(), 0, "cpu", torch.float32)
        return {
            reader.key(i): image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images, strict=True)
        }

    index_shards(shard, WriteOptions("", skip_bad=True, verify=True))
    images = evaluate()
    assert images.keys() == GOOD.keys()
    for same in ("webp", "alpha"):
        assert torch.equal(images[same], images["png"])
    for same in ("rotated-by-exif", "garbage-behind"):
        assert torch.equal(images[same], images["plain"])
    for near in ("progressive", "plain", "cmyk"):
        assert (images[near] - images["png"]).abs().mean() < 0.05
    assert (images["animated"] == torch.tensor([1.0, -1, -1])[:, None, None]).all()  # its first frame is red
    assert (images["grey"] == images["grey"][:1]).all() and (images["16-bit"] == images["16-bit"][:1]).all()
    assert torch.equal(images["wide"], images["tall"].transpose(1, 2))

    (shard / "_info.json").unlink()
    index_shards(shard, WriteOptions("", skip_bad=True))
    with pytest.raises(DataError, match=r"wild\.tar cut"):
        evaluate()


def test_class_folders_of_them_are_sharded_by_content(tmp_path):
    for key, data in (ALL | {"gif": encoded("GIF", FRAMES[0], save_all=True, append_images=FRAMES[1:])}).items():
        path = tmp_path / "tree" / "ab"[len(key) % 2] / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    source = open_source(str(tmp_path / "tree"), None, tmp_path)
    with pytest.raises(DataError) as caught:
        write_dataset(tmp_path / "out", source, WriteOptions("wild"))
    assert all(f"/{key}.jpg: " in str(caught.value) for key in BAD_HEADER) and not (tmp_path / "out").exists()
    summary = write_dataset(tmp_path / "out", source, WriteOptions("wild", skip_bad=True, verify=True))
    bad = {line.partition(".jpg: ")[0].rpartition("/")[2] for line in summary.splits["train"].bad}
    assert bad == BAD_HEADER.keys() | BAD_PIXELS.keys()
    reader = ShardReader(tmp_path / "out", "train")
    samples = {reader.key(i).rpartition("/")[2]: reader.read(i) for i in range(len(reader))}
    assert samples.keys() == {*GOOD, "gif"}
    kinds = {"png": "png", "webp": "webp", "animated": "webp", "gif": "png", "plain": "jpg", "wide": "png"}
    assert {key: samples[key].extension for key in kinds} == kinds
    assert all(samples[key].data == GOOD[key] for key in GOOD)
