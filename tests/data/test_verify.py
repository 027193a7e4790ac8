"""Whatever is done to a data set, verifying finds it, and names it."""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import files_of, pixel_source, write_pixels
from PIL import Image

from vitds.data.adopt import index_shards
from vitds.data.index import Index, repeated, repeated_keys
from vitds.data.sources import open_source
from vitds.data.verify import Verified, verify_dataset
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError

SHARD = "train/pixels-train-000001.tar"


def verify(root: Path, decode_images: bool = False, workers: int = 1) -> Verified:
    return verify_dataset(root, decode_images=decode_images, workers=workers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("whole") / "out", 20, 9)


@pytest.fixture()
def dataset(tmp_path, whole):
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.mark.parametrize("decode_images", [False, True])
def test_a_data_set_as_it_was_written_is_whole(whole, decode_images):
    found = verify(whole, decode_images, workers=2)
    assert found.findings == []
    assert found.num_images == {"train": 20, "val": 9} and found.num_shards == {"train": 3, "val": 2}
    assert found.notes == ["9 keys are in train and in val: " + ", ".join(f"image-{row}" for row in range(9))]


def test_several_labels_a_sample_are_compared_too(tmp_path):
    source = pixel_source(9)
    source.labels = [(row % 5, 4) if row % 5 < 4 else () for row in range(9)]
    write_dataset(tmp_path / "out", {"train": source}, WriteOptions("several"))
    assert verify(tmp_path / "out").findings == []
    edit(tmp_path / "out", "label", lambda column: [*column[:3], [1], *column[4:]])
    assert any("in the index" in line for line in verify(tmp_path / "out").findings)


def test_a_cut_at_every_block_is_found(dataset):
    shard = dataset / SHARD
    content = shard.read_bytes()
    for end in range(0, len(content), 512):
        shard.write_bytes(content[:end])
        found = verify(dataset).findings
        assert found and all(str(shard) in line for line in found), end
    shard.write_bytes(content + bytes(512))
    assert verify(dataset).findings == [f"{shard}: has {len(content) + 512} bytes, not {len(content)}"]


def test_a_flipped_bit_anywhere_is_found(dataset):
    shard = dataset / SHARD
    content = bytearray(shard.read_bytes())
    chance = random.Random(0)
    header, image, padding, end_mark = [3, 124, 150, 257, 400], [512, 700], [1250, 1535], [-1, -512, -513, -1024]
    for place in header + image + padding + end_mark + [chance.randrange(len(content)) for _ in range(60)]:
        content[place] ^= (bit := 1 << chance.randrange(8))
        shard.write_bytes(content)
        found = verify(dataset).findings
        assert found and all(str(shard) in line for line in found), place
        content[place] ^= bit
    shard.write_bytes(content)
    assert verify(dataset).findings == []


@pytest.mark.parametrize("what", ["missing", "empty", "zeros", "swapped", "another", "without split", "hidden member"])
def test_shards_that_are_not_those_of_the_index_are_found(dataset, what):
    shard, other = dataset / SHARD, dataset / "train/pixels-train-000000.tar"
    if what == "missing":
        shard.unlink()
    elif what == "empty":
        shard.write_bytes(b"")
    elif what == "zeros":
        shard.write_bytes(bytes(shard.stat().st_size))
    elif what == "swapped":
        content = shard.read_bytes()
        shard.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif what == "another":
        shard = dataset / "train/more.tar"
        shutil.copy(other, shard)
    elif what == "hidden member":
        with tarfile.open(shard, "a") as tar:
            tar.addfile(tarfile.TarInfo(".hidden"), io.BytesIO())
    else:
        shutil.rmtree(dataset / "train")
        shard = dataset / "train"
    found = verify(dataset).findings
    assert found and any(line.startswith(str(shard)) for line in found)


def edit(dataset: Path, column: str, change) -> None:
    path = dataset / "train/index.parquet"
    table = pq.read_table(path)
    values = change(table[column].to_pylist())
    place = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(column), pa.array(values, table.schema.types[place])), path
    )


def test_keys_that_repeat_are_named_by_both_shards(dataset):
    edit(dataset, "key", lambda keys: [*keys[:-1], keys[0]])
    key = pq.read_table(dataset / "train/index.parquet")["key"][0].as_py()
    line = f"{dataset}/train/pixels-train-000002.tar {key}: duplicate key, first in pixels-train-000000.tar"
    assert line in verify(dataset).findings
    edit(dataset, "key", lambda keys: [keys[0]] * 20 + keys[20:])
    assert sum("duplicate key" in line for line in verify(dataset).findings) == 19


def test_of_many_keys_that_repeat_some_are_named_and_the_others_counted():
    numbers = np.random.default_rng(0).integers(0, 5, 100)
    rows, firsts = repeated(pa.array(map(str, numbers), pa.string()))
    assert rows.tolist() == [row for row in range(100) if numbers[row] in numbers[:row]]
    assert [numbers[first] for first in firsts] == [numbers[row] for row in rows]
    assert all(numbers[first] not in numbers[:first] for first in firsts)
    assert [len(each) for each in repeated(pa.array([], pa.string()))] == [0, 0]
    columns = dict.fromkeys(("offset", "size", "label", "width", "height", "crc32"), np.zeros(100, np.int64))
    index = Index(["0.tar", "1.tar"], np.repeat([0, 1], 50), pa.array(["k"] * 100), **columns)
    lines = repeated_keys(Path("train"), index)
    assert lines[0] == "train/0.tar k: duplicate key, first in 0.tar" and len(lines) == 21
    assert lines[-1] == "train: 79 more samples have a key that an earlier one has"


@pytest.mark.parametrize(
    "column, change",
    [
        ("sample_id", lambda ids: ids[::-1]),
        ("key", lambda keys: ["other", *keys[1:]]),
        ("key", lambda keys: [keys[1], *keys[1:]]),
        ("offset", lambda offsets: [offsets[0] + 512, *offsets[1:]]),
        ("offset", lambda offsets: [-512, *offsets[1:]]),
        ("size", lambda sizes: [sizes[0] - 512, *sizes[1:]]),
        ("size", lambda sizes: [2**40, *sizes[1:]]),
        ("label", lambda labels: [(labels[0] + 1) % 5, *labels[1:]]),
        ("label", lambda labels: [5, *labels[1:]]),
        ("label", lambda labels: [-1, *labels[1:]]),
        ("width", lambda widths: [widths[0] + 1, *widths[1:]]),
        ("height", lambda heights: [1, *heights[1:]]),
        ("crc32", lambda checksums: [checksums[0] ^ 1, *checksums[1:]]),
        ("shard", lambda shards: ["absent.tar", *shards[1:]]),
    ],
)
def test_an_edited_index_is_found(dataset, column, change):
    edit(dataset, column, change)
    assert verify(dataset).findings


@pytest.mark.parametrize("rows", [slice(0, 19), slice(1, 20), slice(8, 20)])
def test_samples_and_shards_that_the_index_lacks_are_found(dataset, rows):
    path = dataset / "train/index.parquet"
    table = pq.read_table(path).slice(rows.start, rows.stop - rows.start)
    pq.write_table(table.set_column(0, "sample_id", pa.array(np.arange(len(table)))), path)
    assert any("is not in the index" in line for line in verify(dataset).findings)


@pytest.mark.parametrize("name", ["classes.json", "_info.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"splits": {}}', '["only one"]'])
def test_classes_and_info_must_agree_with_the_index(dataset, name, content):
    (dataset / name).unlink()
    if content:
        (dataset / name).write_text(content)
    assert any(name in line for line in verify(dataset).findings)


@pytest.mark.parametrize("content", ["{", "[]", "1", '{"splits": {"train": 1}}', '{"splits": [{}]}',
                                     '{"splits": {"train": {"unreadable": [1]}}}'])  # fmt: skip
def test_a_damaged_health_report_is_a_finding(dataset, content):
    (dataset / "health.json").write_text(content)
    (line,) = verify(dataset).findings
    assert line.startswith(f"{dataset}/health.json: ")


def test_counts_in_info_are_compared(dataset):
    info = json.loads((dataset / "_info.json").read_text())
    info["splits"]["val"]["shard_lengths"] = [9]
    (dataset / "_info.json").write_text(json.dumps(info))
    assert verify(dataset).findings == [f"{dataset}/_info.json: shard_lengths of val is not that of the index"]


def test_verifying_changes_nothing_and_an_index_that_is_no_parquet_is_named(dataset):
    before = files_of(dataset)
    verify(dataset, True)
    assert files_of(dataset) == before
    (dataset / "val/index.parquet").write_bytes(b"PAR1")
    assert any("val/index.parquet: index cannot be read" in line for line in verify(dataset).findings)


def test_a_jpeg_whose_damage_a_decoder_would_cover_is_found_when_it_is_sharded_and_when_it_is_decoded(tmp_path):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    whole = stream.getvalue()
    for number, data in enumerate((whole, whole[: len(whole) * 2 // 3] + b"\xff\xd9")):
        (tmp_path / "in/train/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/train/a/{number}.jpg").write_bytes(data)
    sources = open_source(str(tmp_path / "in"), None, tmp_path)
    what = "Corrupt JPEG data: premature end of data segment"
    with pytest.raises(DataError, match=f"1 of 2 images cannot be used(?s:.*)in/train/a/1.jpg: {what}"):
        write_dataset(tmp_path / "strict", sources, WriteOptions("strict", verify=True))
    out = tmp_path / "out"
    write_dataset(out, sources, WriteOptions("out"))
    assert verify(out).findings == []
    assert verify(out, decode_images=True).findings == [f"{out}/train/out-train-000000.tar a/1: {what}"]


def foreign(root: Path, tar_format: int) -> Path:
    """Somebody else's shards: long names, other members between and inside samples, tar's own padding."""
    source = pixel_source(12)
    for split, rows in (("train", range(8)), ("val", range(8, 12))):
        (root / split).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(root / split / f"part-{shard}.tar", "w", format=tar_format) as tar:
                members = [("README", b"about"), (".hidden", b"x" * 700)]
                for row in rows[shard::2]:
                    key = f"{'folder/' * 20}{split}-{row}"
                    members += [(f"{key}.json", b'{"a": 1}'), (f"{key}.png", source.read(row))]
                    members += [(f"{key}.cls", b"%d" % source.labels[row]), ("notes/LICENSE", b"mine")]
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shards_that_were_only_indexed_are_proved_as_well(tmp_path, tar_format):
    root = foreign(tmp_path / "foreign", tar_format)
    index_shards(root, WriteOptions("foreign"))
    assert verify(root, decode_images=True).findings == []
    shard = root / "train/part-1.tar"
    content = bytearray(shard.read_bytes())
    table = pq.read_table(root / "train/index.parquet").to_pylist()
    spans = [(row["offset"], row["offset"] + row["size"]) for row in table if row["shard"] == "part-1.tar"]
    chance = random.Random(1)
    for first, last in spans * 8:
        place, bit = chance.randrange(first, last), 1 << chance.randrange(8)
        content[place] ^= bit
        shard.write_bytes(content)
        assert any(line.startswith(str(shard)) for line in verify(root).findings), place
        content[place] ^= bit
    for end in range(0, spans[-1][1] + 512, 512):
        shard.write_bytes(content[:end])
        assert verify(root).findings, end
