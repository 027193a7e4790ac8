"""Shards fetched ahead of their readers: by one process a node (this file is its program), told which come next."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from vitds import transport
from vitds.data.cache import Cache
from vitds.errors import DataError
from vitds.transport import Url

_NUM_CONNECTIONS = 4
_PAUSE_S = 5.0  # after a shard that could not be fetched: its reader will say why

T = TypeVar("T")


class RemoteShard(NamedTuple):
    """A shard to fetch, and how many bytes of it the index knows."""

    url: Url
    at_least: int


class Prefetcher:
    """Fetches shards ahead of their readers, in a process of its own; a context manager that ends it.

    `upcoming(position)` gives the numbers of the shards read from a position of the stream on, those needed first in
    front; shards on disk are None. It never fails a run: what cannot be fetched is asked for again by its reader, who
    says why.
    """

    def __init__(
        self, cache: Cache, shards: Sequence[RemoteShard | None], upcoming: Callable[[int], Sequence[int]]
    ) -> None:
        self.cache, self.shards, self.upcoming = cache, shards, upcoming
        self._upcoming: Sequence[int] = ()
        root = Path(transport.__file__).parent.parent  # a checkout works without being installed
        program = f"import sys; sys.path.insert(0, {str(root)!r}); from vitds.data import prefetch; prefetch.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    def advance(self, position: int) -> None:
        """Tell it where the readers are."""
        upcoming = self.upcoming(position)
        if upcoming == self._upcoming or self._process.stdin is None:
            return
        self._upcoming = upcoming
        wanted, room = [], self.cache.max_bytes
        for shard in (self.shards[number] for number in upcoming):
            if shard is None:
                continue
            room -= shard.at_least
            if room < 0:
                break
            wanted.append(shard)
        order = {"directory": str(self.cache.directory), "max_bytes": self.cache.max_bytes, "wanted": wanted}
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process; what it was fetching is continued by whoever needs it."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()

    def before(self, items: Iterator[T], positions: Iterable[int]) -> Iterator[T]:
        """Pass `items` on, advancing to the position of each before it is asked for: to the first now."""
        positions = iter(positions)
        first = next(positions, None)
        if first is None:
            self.close()
            return items
        self.advance(first)
        return self._passed_on(items, itertools.chain([first], positions))

    def _passed_on(self, items: Iterator[T], positions: Iterable[int]) -> Iterator[T]:
        try:
            for position in positions:
                self.advance(position)
                yield next(items)
        finally:
            self.close()


class _Wanted:
    """The shards to be fetched next, shared by the threads of the prefetching process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._cache: Cache | None = None
        self._open: list[RemoteShard] = []
        self._being_fetched: set[RemoteShard] = set()

    def replace(self, cache: Cache, wanted: list[RemoteShard]) -> None:
        with self._changed:
            self._cache = cache
            self._open = [shard for shard in wanted if shard not in self._being_fetched]
            self._changed.notify_all()

    def serve(self) -> None:
        """Fetch one after another, for ever."""
        while True:
            with self._changed:
                while not self._open:
                    self._changed.wait()
                shard, cache = self._open.pop(0), self._cache
                self._being_fetched.add(shard)
            assert cache is not None
            try:
                os.close(cache.open(shard.url, shard.at_least))
            except DataError:
                time.sleep(_PAUSE_S)
            finally:
                with self._changed:
                    self._being_fetched.discard(shard)


def main() -> None:
    """Be the prefetching process: take a line of JSON for what is wanted from now on, and end with stdin."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they reach the rank too, which ends this
        signal.signal(number, signal.SIG_IGN)
    wanted = _Wanted()
    for _ in range(_NUM_CONNECTIONS):
        threading.Thread(target=wanted.serve, daemon=True).start()
    for line in sys.stdin:
        order = json.loads(line)
        shards = [RemoteShard(Url(url), at_least) for url, at_least in order["wanted"]]
        wanted.replace(Cache(Path(order["directory"]), order["max_bytes"]), shards)
    os._exit(0)
