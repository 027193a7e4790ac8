"""Bytes over http and S3: whatever a server does, what arrives is the file or a message that says why not."""

from pathlib import Path

import pytest
from s3_server import s3_bucket
from web_server import Server, serving

from vitds import transport
from vitds.transport import BrokenOff, Patience, Refused, Url, fetch, location, read_bytes, unavailable

BODY = bytes(range(256)) * 400
HASTY = Patience(3, 3, 0.0, 0.0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transport, "_CHUNK_BYTES", 10_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.files["/data/a b.tar"] = BODY
    with serving(server) as server.address:
        server.url = Url(server.address) / "data" / "a b.tar"
        yield server


def fetched(url, path, begun=b"", version=None, **options):
    path.write_bytes(begun)
    with path.open("r+b", buffering=0) as file:
        fetch(url, file, HASTY, version, **options)
    return path.read_bytes()


def test_an_address_goes_down_like_a_path_and_keeps_its_query():
    url = Url("https://host/data/?sig=a%2Fb") / "train" / "x y.tar"
    assert url == "https://host/data/train/x%20y.tar?sig=a%2Fb" and url.name == "x%20y.tar"
    assert url.shown == "https://host/data/train/x%20y.tar"
    assert Url("s3://bucket/a") / "x y.tar" == "s3://bucket/a/x y.tar"
    assert (url.parent / "y").shown == "https://host/data/train/y"
    for address in ("s3://b/x", "https://h/x", "hdfs://h/x"):
        assert isinstance(location(address), Url)
    for path in ("data/x", Path("data"), "pipe:cat x", "file:///x"):
        assert isinstance(location(path), Path)


@pytest.mark.parametrize("begun", [b"", BODY[:1], BODY[:70_000], BODY, b"x" * 200_000])
def test_whatever_was_there_before_the_whole_file_is_there_afterwards(server, tmp_path, begun):
    assert fetched(server.url, tmp_path / "f", begun) == BODY


@pytest.mark.parametrize("is_reset", [True, False])
@pytest.mark.parametrize("has_ranges", [True, False])
def test_broken_connections_are_gone_on_from(server, tmp_path, has_ranges, is_reset):
    server.drop_after, server.ranges, server.is_reset = 30_000, has_ranges, is_reset
    server.num_drops = 4 if has_ranges else 1
    assert fetched(server.url, tmp_path / "f") == BODY
    starts = [asked for _, asked in server.requests]
    if is_reset:  # what was on its way may be lost with it
        assert len(starts) > 1
    else:
        assert starts[1] == "bytes=30000-" and len(starts) == (4 if has_ranges else 2)


def test_without_a_stated_size_a_body_that_ends_early_is_gone_on_from(server, tmp_path):
    server.says_sizes, server.drop_after, server.num_drops = False, 30_000, 2
    assert len(fetched(server.url, tmp_path / "f", at_least=len(BODY) - 1024)) >= len(BODY) - 1024


def test_a_stall_is_noticed_and_another_connection_made(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "_TIMEOUT_S", 3.0)
    server.stall_s, server.num_stalls = 10.0, 1
    assert fetched(server.url, tmp_path / "f") == BODY and len(server.requests) > 1


def test_a_trickle_is_no_progress(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "_SLOW_AFTER_S", 0.1)
    monkeypatch.setattr(transport, "_LEAST_BYTES_PER_S", 10**9)
    server.trickle, server.pause_s = 100, 0.02
    with pytest.raises(BrokenOff, match=r"only \d+ bytes"):
        fetched(server.url, tmp_path / "f")
    assert len(server.requests) == HASTY.num_tries


def test_a_server_in_trouble_is_asked_again_and_one_that_says_no_is_not(server, tmp_path):
    server.status, server.num_failures = 503, 2
    assert fetched(server.url, tmp_path / "f") == BODY
    for status, kind, num_requests in ((503, BrokenOff, 3), (429, BrokenOff, 3), (404, Refused, 1), (403, Refused, 1)):
        server.status, server.num_failures, server.requests = status, 9, []
        with pytest.raises(kind, match=str(status)):
            fetched(server.url, tmp_path / "f")
        assert len(server.requests) == num_requests


def test_another_version_is_not_joined_to_what_is_there(server, tmp_path):
    versions = []
    fetched(server.url, tmp_path / "f", on_answer=lambda answer, _: versions.append(answer.version))
    old, new = BODY[:50_000], bytes(reversed(BODY))
    server.files["/data/a b.tar"] = new
    assert fetched(server.url, tmp_path / "f", old, versions[0]) == new


def test_a_file_that_changes_between_two_connections_is_begun_anew(server, tmp_path):
    new = bytes(reversed(BODY))
    server.drop_after, server.num_drops = 30_000, 1

    def on_progress(done, _):
        if done == 30_000:
            server.files["/data/a b.tar"] = new

    assert fetched(server.url, tmp_path / "f", on_progress=on_progress) == new


def test_redirects_lead_to_http_only(server, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    server.redirects = {"/there": server.url, "/file": f"file://{tmp_path}/secret", "/ftp": "ftp://127.0.0.1/x"}
    assert read_bytes(Url(server.address) / "there") == BODY
    for name in ("file", "ftp"):
        with pytest.raises(Refused):
            read_bytes(Url(server.address) / name)


def test_an_address_may_be_written_as_people_read_it_and_one_that_is_none_is_asked_once(server, monkeypatch):
    server.files["/data/ä 1.tar"] = b"1"
    assert read_bytes(Url(f"{server.address}/data/a b.tar")) == BODY
    assert read_bytes(Url(f"{server.address}/data/ä%201.tar?sig=a%2Fb+c")) == b"1"
    assert server.requests[-1][0] == "/data/%C3%A4%201.tar?sig=a%2Fb+c"
    monkeypatch.setattr(transport.time, "sleep", lambda _: pytest.fail("asked again"))
    with pytest.raises(Refused, match="port"):
        read_bytes(Url("http://127.0.0.1:x/a"))


def test_what_is_read_into_memory_is_bounded(server, monkeypatch):
    monkeypatch.setattr(transport, "_MOST_BYTES_IN_MEMORY", 50_000)
    with pytest.raises(Refused, match="more than"):
        read_bytes(server.url)


def test_a_server_that_stays_away_is_no_promise_of_a_checkpoint():
    error = unavailable(Url("http://h/x.tar?token=secret"), BrokenOff("timed out"))
    assert str(error).splitlines()[0] == "data error  http://h/x.tar  cannot be fetched, after several tries: timed out"
    assert error.fix.endswith("from the last checkpoint, or begins again if there is none")


def test_no_server_is_said(tmp_path):
    with pytest.raises(BrokenOff, match="refused"):
        fetched(Url("http://127.0.0.1:9/x"), tmp_path / "f")


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server that speaks S3, to which the environment points."""
    with s3_bucket() as bucket:
        yield bucket


def test_s3_objects_arrive_from_their_beginning_or_from_where_a_part_ends(bucket, tmp_path):
    bucket.put("data/x y.tar", BODY)
    url = Url("s3://bucket") / "data" / "x y.tar"
    answers = []
    assert fetched(url, tmp_path / "f", on_answer=lambda answer, _: answers.append(answer)) == BODY
    assert answers[0].size == len(BODY) and answers[0].version
    for begun in (BODY[:70_000], BODY, BODY + b"x"):
        assert fetched(url, tmp_path / "f", begun, answers[0].version) == BODY
    assert fetched(url, tmp_path / "f", b"x" * 500, "of another version") == BODY
    assert len(transport._idle_helpers) == 1  # one process did it all


def test_s3_objects_and_buckets_that_are_not_there_are_said(bucket):
    for url in ("s3://bucket/none", "s3://no-such-bucket/x"):
        with pytest.raises(Refused, match="no such object"):
            read_bytes(Url(url))


def test_a_helper_that_dies_is_replaced(bucket, tmp_path):
    bucket.put("x", BODY)
    read_bytes(Url("s3://bucket/x"))
    transport._idle_helpers[-1].process.kill()
    assert fetched(Url("s3://bucket/x"), tmp_path / "f") == BODY


@pytest.mark.parametrize("stall_s", [0.0, 20.0])
@pytest.mark.parametrize("bad_after", [100, 30_000])
def test_s3_connections_that_are_reset_or_stall_are_made_again(bucket, tmp_path, monkeypatch, stall_s, bad_after):
    monkeypatch.setattr(transport, "_TIMEOUT_S", 3.0)
    monkeypatch.setattr(transport, "_idle_helpers", [])
    bucket.put("x", BODY)
    line = bucket.line
    line.num_connections, line.num_bad, line.bad_after, line.stall_s = 0, 2, bad_after, stall_s
    assert fetched(Url("s3://bucket/x"), tmp_path / "f") == BODY
    assert line.num_connections > 2 and not line.num_bad


def test_an_s3_server_that_always_breaks_off_is_said(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "_idle_helpers", [])
    bucket.put("x", BODY)
    bucket.line.num_bad, bucket.line.bad_after, bucket.line.stall_s = 10**6, 100, 0.0
    try:
        with pytest.raises(BrokenOff, match=r"(?i)network|connection"):
            fetched(Url("s3://bucket/x"), tmp_path / "f")
    finally:
        bucket.line.num_bad = 0


def test_a_public_bucket_needs_no_credentials(bucket, monkeypatch):
    bucket.put("x", BODY, ACL="public-read")
    bucket.put("y", BODY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(transport, "_idle_helpers", [])
    assert read_bytes(Url("s3://bucket/x")) == BODY
    with pytest.raises(Refused, match="access denied"):
        read_bytes(Url("s3://bucket/y"))


def test_no_s3_server_is_said(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(transport, "_idle_helpers", [])
    with pytest.raises(BrokenOff, match=r"(?i)connect"):
        transport.connect(Url("s3://bucket/x"), 0)
