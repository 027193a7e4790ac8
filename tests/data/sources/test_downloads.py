"""Parquet from addresses: a web server that breaks off, the hub's short names and tokens, and S3."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import s3_bucket
from web_server import Server, serving

from vitds import transport
from vitds.data.decode import encode_png
from vitds.data.reader import ShardReader
from vitds.data.sources import open_source
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError, DataUnavailable
from vitds.transport import Patience


def png(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def parquet(seeds: range) -> bytes:
    """A file as the hub has it: image {bytes, path}, a label, and the names of classes in its metadata."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds], kind)
    table = pa.table({"image": images, "label": pa.array([seed % 2 for seed in seeds], pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    stream = io.BytesIO()
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), stream, row_group_size=2)
    return stream.getvalue()


FILES = {"train-0-of-2": range(0, 4), "train-1-of-2": range(4, 8), "validation-0-of-1": range(8, 11)}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("vitds.data.sources.downloads.PATIENT", Patience(3, 3, 0.0, 0.0))
    monkeypatch.setattr(transport, "_CHUNK_BYTES", 2_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    with serving(server) as server.address:
        yield server


def shards(source: str, tmp_path, **options) -> dict[str, dict[str, bytes]]:
    out = tmp_path / "out"
    write_dataset(out, open_source(source, None, tmp_path / "in", **options), WriteOptions("test"))
    readers = {split: ShardReader(out, split) for split in ("train", "val") if (out / split).exists()}
    return {split: {s.key: s.data for s in map(of.read, range(len(of)))} for split, of in readers.items()}


EXPECTED = {
    "train": {str(seed): png(seed) for seed in range(8)}, "val": {str(seed): png(seed) for seed in range(8, 11)},
}  # fmt: skip
NAMES = "{train-{0..1}-of-2,validation-0-of-1}.parquet"


@pytest.mark.parametrize("ranges", [True, False])
def test_files_named_by_braces_arrive_although_connections_break(server, tmp_path, ranges):
    server.files = {f"/data/{name}.parquet": parquet(seeds) for name, seeds in FILES.items()}
    server.ranges, server.drop_after, server.num_drops = ranges, 4_000, 5 if ranges else 1
    assert shards(f"{server.address}/data/{NAMES}", tmp_path) == EXPECTED
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]
    num_requests = len(server.requests)
    assert any(asked for _, asked in server.requests) and not list(tmp_path.glob("in/**/*.part"))
    sources = open_source(f"{server.address}/data/{NAMES}", None, tmp_path / "in")
    assert len(server.requests) == num_requests  # what is here is not asked for again
    assert any("downloaded 3 files" in note for note in sources["train"].notes)


def test_files_on_the_hub_have_short_names_and_the_token_goes_no_further(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving(store := Server()) as address:
        for name, seeds in FILES.items():
            store.files[f"/{name}"] = parquet(seeds)
            server.redirects[f"/datasets/me/pets/resolve/main/data/{name}.parquet"] = f"{address}/{name}"
        assert shards(f"hf://datasets/me/pets/data/{NAMES}", tmp_path) == EXPECTED
    assert set(server.tokens) == {"Bearer secret"} and set(store.tokens) == {None}
    with pytest.raises(DataUnavailable, match="404"):
        open_source("hf://datasets/me/pets@v2/data/train-0-of-2.parquet", None, tmp_path / "in")
    assert server.requests[-1][0] == "/datasets/me/pets/resolve/v2/data/train-0-of-2.parquet"


def test_objects_of_s3(tmp_path):
    with s3_bucket() as bucket:
        for name, seeds in FILES.items():
            bucket.put(f"pets/{name}.parquet", parquet(seeds))
        assert shards(f"s3://bucket/pets/{NAMES}", tmp_path) == EXPECTED


@pytest.mark.parametrize(
    "source, message",
    [
        ("hf://datasets/me/pets", "names no file on the hub"),
        ("hf://datasets/me/pets/data/train-*.parquet", "names no file on the hub"),
        ("https://host/shards/train-{000..127}.tar", r"only Parquet .* no \.parquet"),
        ("https://host/{a", "braces that do not match"),
    ],
)
def test_addresses_of_other_things_are_refused_before_anything_is_asked(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        open_source(source, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_came_before_a_server_failed_for_good_is_kept_and_gone_on_from(server, tmp_path):
    body = parquet(range(4))
    server.files["/train.parquet"] = body
    server.drop_after, server.ranges = 2_000, False
    with pytest.raises(DataUnavailable, match="after several tries") as caught:
        open_source(f"{server.address}/train.parquet?token=secret", None, tmp_path)
    assert "secret" not in str(caught.value) and list(tmp_path.glob("**/train.parquet.part"))
    server.drop_after, server.ranges = None, True
    assert open_source(f"{server.address}/train.parquet?token=secret", None, tmp_path)["train"].keys == list("0123")
