"""Shards over http and S3: one bounded cache for many processes, exact whatever the server and the processes suffer."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rank_processes import ROOT
from web_server import Server, serving

from vitds import transport
from vitds.data.cache import Cache
from vitds.data.prefetch import Prefetcher, RemoteShard
from vitds.errors import DataError, DataUnavailable
from vitds.transport import Patience, Url

SIZE = 20_000
TICK_S = 0.02  # older kernels tell the times of files apart by 4 or 10 ms


def body(number, size=SIZE):
    return np.random.default_rng(number).bytes(size)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transport, "PATIENT", Patience(3, 3, 0.01, 0.01))
    monkeypatch.setattr(transport, "_CHUNK_BYTES", 4_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.files = {f"/data/{number}.tar": body(number) for number in range(8)}
    with serving(server) as server.address:
        yield server


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 3 * SIZE)


def read(cache, url, **options):
    with open(cache.open(url, **options), "rb") as file:
        return file.read()


def urls(server):
    return [Url(server.address) / "data" / f"{number}.tar" for number in range(8)]


def held(cache):
    """The numbers of the shards that are whole in a cache."""
    return {int(path.stem.partition("-")[2]) for path in cache.directory.glob("*.tar")}


def test_a_file_is_fetched_once_and_the_bound_holds(server, cache):
    for number, url in enumerate(urls(server)):
        assert read(cache, url) == body(number) and read(cache, url) == body(number)
        assert sum(path.stat().st_size for path in cache.directory.glob("*.tar*") if path.suffix != ".json") <= 3 * SIZE
        time.sleep(TICK_S)
    assert len(server.requests) == 8 and held(cache) == {5, 6, 7}
    assert not list(cache.directory.glob("*.part")) and len(list(cache.directory.glob("*.json"))) == 3


def test_what_was_used_longest_ago_goes_first(server, cache):
    for number in (0, 1, 2):
        read(cache, urls(server)[number])
        os.utime(cache._path(urls(server)[number]), (1000 + number, 1000 + number))
    read(cache, urls(server)[0])  # used now
    read(cache, urls(server)[3])
    assert held(cache) == {0, 2, 3}


def test_who_reads_an_evicted_file_reads_on(server, cache):
    with open(cache.open(urls(server)[0]), "rb") as file:
        for url in urls(server)[1:]:
            read(cache, url)
        assert 0 not in held(cache) and file.read() == body(0)


def test_nothing_is_removed_that_the_cache_did_not_fetch(server, cache):
    mine = {"0123456789abcdef-mine.tar": b"x" * 3 * SIZE, "thesis.tar": b"y", "a.json": b"{}", "b.tar.part": b"z"}
    lookalike = {"0123456789abcdef-mine.tar.json": json.dumps({"url": "http://h/x", "size": 1, "version": ""}).encode()}
    cache.directory.mkdir()
    for name, content in (mine | lookalike).items():
        (cache.directory / name).write_bytes(content)
    for number, url in enumerate(urls(server)):
        assert read(cache, url) == body(number)
    assert all((cache.directory / name).read_bytes() == content for name, content in (mine | lookalike).items())


def test_a_download_that_was_cut_off_is_continued(server, cache):
    server.drop_after = 5_000
    server.num_drops = 1
    server.ranges = False  # the second connection starts over, and the server then dies
    real = server.answer

    def answer(handler):
        real(handler) if len(server.requests) < 1 else handler.send_error(500)

    server.answer = answer
    with pytest.raises(DataUnavailable, match="500") as caught:
        read(cache, urls(server)[0])
    assert urls(server)[0] in caught.value.where and caught.value.exit_code == 3
    assert [path.stat().st_size for path in cache.directory.glob("*.part")] == [5_000]
    server.answer, server.ranges, server.requests = real, True, []
    assert read(cache, urls(server)[0]) == body(0)
    assert server.requests == [("/data/0.tar", "bytes=5000-")]


def test_a_part_of_an_older_version_is_not_continued(server, cache):
    server.drop_after = 5_000
    with pytest.raises(DataUnavailable):
        server.ranges = False
        read(cache, urls(server)[0])
    server.drop_after, server.ranges = None, True
    server.files["/data/0.tar"] = body(99)
    assert read(cache, urls(server)[0]) == body(99)


@pytest.mark.parametrize("has_versions", [True, False])
def test_a_file_that_must_be_current_is_asked_for_again(server, cache, has_versions):
    url, server.has_versions = urls(server)[0], has_versions
    assert read(cache, url, is_checked=True) == read(cache, url, is_checked=True) == body(0)
    server.files["/data/0.tar"] = body(99)
    assert read(cache, url) == body(0)
    assert read(cache, url, is_checked=True) == read(cache, url) == body(99)


def test_wrong_bytes_are_fetched_once_more_for_each_version(server, cache):
    url = urls(server)[0]
    descriptor = cache.open(url)
    cache._path(url).write_bytes(b"damaged")
    assert cache.renew(url, descriptor, 0) and read(cache, url) == body(0)
    assert cache.renew(url, descriptor, 0)  # this reader comes late: the file is another by now
    again = cache.open(url)
    assert not cache.renew(url, again, 0)  # the server has nothing else
    server.files["/data/0.tar"] = body(99)
    assert cache.renew(url, again, 0) and read(cache, url) == body(99)
    os.close(descriptor)
    os.close(again)


def test_a_shard_shorter_than_its_index_is_refused_by_name(server, cache):
    with pytest.raises(DataUnavailable, match="is truncated: 20,000 bytes, the index knows 20,001") as caught:
        cache.open(urls(server)[0], at_least=SIZE + 1)
    assert caught.value.where == urls(server)[0] and not list(cache.directory.glob("*.part"))


@pytest.mark.parametrize("status", [403, 404, 503])
def test_an_answer_that_is_no_file_names_the_address(server, cache, status):
    server.status = status
    with pytest.raises(DataUnavailable, match=str(status)) as caught:
        cache.open(urls(server)[0])
    assert urls(server)[0] in str(caught.value)
    assert not list(cache.directory.glob("*.part")) and not list(cache.directory.glob("*.json"))


def test_a_cache_smaller_than_a_shard_or_a_window_is_said(server, cache):
    with pytest.raises(DataUnavailable, match=r"too small for a shard.*data\.cache_gib"):
        Cache(cache.directory, SIZE - 1).open(urls(server)[0])
    cache.check_room([SIZE] * 8, num_together=2)
    with pytest.raises(DataError, match=r"3 shards shuffled together.*data\.cache_gib"):
        cache.check_room([SIZE] * 8, num_together=3)
    with pytest.raises(DataError, match="all shards"):
        cache.check_room([SIZE] * 8, num_together=8)
    with pytest.raises(DataError, match="the disk of the cache has room for"):
        Cache(cache.directory, 2**60).check_room([2**58], num_together=1)


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "No space left"), (errno.EIO, "error")])
def test_a_disk_that_is_full_or_fails_is_said(server, cache, monkeypatch, number, said):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transport, "_write", fails)
    with pytest.raises(DataUnavailable, match=said) as caught:
        cache.open(urls(server)[0])
    assert caught.value.where == str(cache.directory) and "cache_dir" in caught.value.fix
    blocked = Cache(Path(__file__), 100)
    with pytest.raises(DataUnavailable, match="cannot be used"):
        blocked.open(urls(server)[0])


def test_a_file_of_the_cache_that_cannot_be_opened_is_the_disks_fault(server, cache):
    """Also when it came while this waited for its turn: no sample is to blame."""
    url = urls(server)[0]
    os.close(cache.open(url))
    path = cache._path(url)
    path.unlink()
    path.symlink_to(path)  # opening it says ELOOP
    for is_checked in (False, True):
        with pytest.raises(DataUnavailable, match="Too many levels"):
            cache.open(url, is_checked=is_checked)


def test_on_a_disk_with_less_room_than_the_bound_the_oldest_make_room(server, cache, monkeypatch):
    large = Cache(cache.directory, 10**9)
    real = shutil.disk_usage

    def usage(path):  # a disk of two and a half shards
        held = sum(file.stat().st_size for file in large.directory.glob("*.tar*") if file.suffix != ".json")
        return real(path)._replace(free=5 * SIZE // 2 - held)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for number in (0, 1, 2):
        assert read(large, urls(server)[number]) == body(number)
        time.sleep(TICK_S)
    assert held(large) == {1, 2}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=0))
    server.files["/data/3.tar"] = body(3, 3 * SIZE)
    with pytest.raises(DataUnavailable, match="No space left"):
        large.open(urls(server)[3])


def test_a_query_is_sent_and_not_kept(server, cache):
    url = Url(f"{server.address}/data?token=first") / "0.tar"
    assert read(cache, url) == read(cache, Url(f"{server.address}/data?token=second") / "0.tar") == body(0)
    assert server.requests == [("/data/0.tar?token=first", None)]
    assert not any("token" in path.read_text() for path in cache.directory.glob("*.json"))


def test_one_downloads_and_the_others_wait(server, cache):
    server.trickle, server.pause_s = 4_000, 0.02
    results = []
    threads = [threading.Thread(target=lambda: results.append(read(cache, urls(server)[0]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [body(0)] * 6 and len(server.requests) == 1


def test_more_readers_than_there_is_room_for_take_turns(server, cache):
    """Each holds its lock while it waits for room; nobody waits for ever."""
    server.trickle, server.pause_s = 4_000, 0.005
    small = Cache(cache.directory, SIZE + SIZE // 2)
    results = {}

    def work(number):
        for _ in range(3):
            results.setdefault(number, []).append(read(small, urls(server)[number]) == body(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: [True] * 3 for number in range(8)} and len(held(small)) == 1


READER = """
import sys
from pathlib import Path
from vitds.data.cache import Cache
from vitds.transport import Url
sys.stdout.buffer.write(open(Cache(Path(sys.argv[1]), 10**6).open(Url(sys.argv[2])), "rb").read())
"""


def test_a_killed_download_is_continued_by_who_waited(server, cache):
    server.files["/data/0.tar"] = content = body(0, 400_000)
    server.trickle, server.pause_s = 4_000, 0.01
    command = [sys.executable, "-c", READER, str(cache.directory), str(urls(server)[0])]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    part = cache._path(urls(server)[0]).with_suffix(".tar.part")
    wait_until(lambda: part.exists() and part.stat().st_size >= 40_000)
    second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == content and second.returncode == 0 and first.wait() == -signal.SIGKILL
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for _, asked in server.requests]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 40_000


def test_parts_that_nobody_fills_make_room(server, cache):
    server.drop_after, server.ranges = 5_000, False
    for url in urls(server)[:3]:
        with pytest.raises(DataUnavailable):
            read(cache, url)
    server.drop_after = None
    assert len(list(cache.directory.glob("*.part"))) == 3  # all the room there is
    assert read(cache, urls(server)[4]) == body(4)
    assert len(list(cache.directory.glob("*.part"))) == 2


def test_shards_are_fetched_ahead_of_their_readers_as_far_as_there_is_room(server, cache):
    shards = [None, *(RemoteShard(url, SIZE) for url in urls(server))]  # the first is on disk
    prefetcher = Prefetcher(cache, shards, lambda position: range(position, len(shards)))
    prefetcher.advance(0)
    wait_until(lambda: held(cache) == {0, 1, 2})
    prefetcher.advance(5)
    wait_until(lambda: held(cache) == {4, 5, 6})
    prefetcher.close()
    assert prefetcher._process.returncode == -signal.SIGKILL and len(server.requests) == 6


def test_items_are_passed_on_while_shards_are_fetched_ahead(server, cache):
    prefetcher = Prefetcher(cache, [RemoteShard(urls(server)[0], SIZE)], lambda _: [0])
    passing = prefetcher.before(iter("abc"), range(3))
    wait_until(lambda: held(cache) == {0})  # before anything was asked for
    assert list(passing) == list("abc") and prefetcher._process.returncode is not None


def test_the_prefetching_process_ends_with_its_parent(server, cache):
    prefetcher = Prefetcher(cache, [RemoteShard(urls(server)[0], SIZE)], lambda _: [0])
    prefetcher.advance(0)
    wait_until(lambda: held(cache) == {0})
    prefetcher._process.stdin.close()  # what the kernel does for a parent that was killed
    assert prefetcher._process.wait(timeout=20) == 0


def wait_until(holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)
