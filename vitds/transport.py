"""Bytes from an address into a file: resumed where a connection broke off, tried again with pauses, never a hang.

http and https go through urllib, whatever else `pyarrow.fs` knows (s3, gs, hdfs) through a process of its own
(`vitds.object_store`), for pyarrow's clients do not survive a fork and data workers are forks.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Protocol
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from vitds.errors import DataMissing, DataUnavailable

SCHEMES = ("http", "https", "s3", "gs", "gcs", "hdfs", "viewfs")

_CHUNK_BYTES = 1024 * 1024
_TIMEOUT_S = 30.0  # of connecting, and without a byte
_LEAST_BYTES_PER_S, _SLOW_AFTER_S = 1024, 30.0  # a connection slower than this, for so long, is given up
_MOST_BYTES_IN_MEMORY = 2**28
_MEANT = "%!#$&'()*+,/:;=?@[]~"  # in an address as it was written; what else is no letter or digit is quoted
_END, _FAILED = 0, 2**32 - 1  # lengths of frames with a meaning, as vitds/object_store.py writes them

OnProgress = Callable[[int, int | None], None]  # bytes so far, and of the whole file where the server says it
OnNote = Callable[[str], None]


class Url(str):
    """An address; `/` goes down one level, as it does from a Path. A query stays at the end, as tokens need it."""

    def __truediv__(self, name: str) -> Url:
        """The address of what is called `name` at this one."""
        base, mark, query = self.partition("?")
        return Url(f"{base.rstrip('/')}/{quote(name) if self.is_http else name}{mark}{query}")

    @property
    def is_http(self) -> bool:
        """Whether a web server answers here."""
        return self.startswith(("http://", "https://"))

    @property
    def parent(self) -> Url:
        """The address one level up, without a query."""
        return Url(self.shown.rstrip("/").rpartition("/")[0])

    def read_bytes(self) -> bytes:
        """The content of a small file, with the errors that a Path has: FileNotFoundError, OSError."""
        try:
            return read_bytes(self)
        except NotThere as error:
            raise FileNotFoundError(str(error)) from None
        except (Refused, BrokenOff) as error:
            raise OSError(str(error)) from None

    def read_text(self, encoding: str = "utf-8") -> str:
        """The same as text."""
        return self.read_bytes().decode(encoding)

    @property
    def name(self) -> str:
        """The last part, as of a Path."""
        return self.shown.rstrip("/").rpartition("/")[2]

    @property
    def shown(self) -> str:
        """The address without its query, which may hold a secret."""
        return self.partition("?")[0]


def hugging_face() -> str:
    """The address of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def location(path: str | Path) -> Path | Url:
    """Where data are: at an address, or on a disk."""
    scheme, mark, _ = str(path).partition("://")
    return Url(path) if mark and scheme in SCHEMES else Path(path)


class Refused(Exception):
    """The answer says that the file cannot be had, now or later."""


class NotThere(Refused):
    """The answer says that there is nothing at this address."""


class BrokenOff(Exception):
    """The connection failed in a way that another one may mend; `is_slow`: what it brought is no progress."""

    is_slow = False


class Patience(NamedTuple):
    """How often connections in a row may bring nothing new, and the pauses between them, doubled up to the longest."""

    num_tries: int
    num_first_tries: int  # before anything came at all
    pause_s: float
    longest_pause_s: float


PATIENT = Patience(8, 8, 0.5, 30.0)  # a minute: a run waits for a server that starts anew
BRIEF = Patience(3, 3, 0.5, 1.0)  # before a run: somebody may have misspelt the address


class _Stream(Protocol):
    def read1(self, num_bytes: int, /) -> bytes:
        """The next bytes; none at the end."""

    def close(self) -> None:
        """Let go."""


@dataclass
class Answer:
    """A file as a server offers it: bytes from `start` on, its size and its version where the server says them."""

    stream: _Stream
    start: int
    size: int | None
    version: str  # changes with the file; "" where the server names none
    _waited_s: float = 0.0  # since the pace was last looked at
    _num_brought: int = 0

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self, num_bytes: int | None = None) -> bytes:
        """The next chunk, empty at the end.

        Raises: BrokenOff, also when the connection is too slow: of the time that was spent waiting for it.
        """
        if self._waited_s > _SLOW_AFTER_S:
            if self._num_brought < _LEAST_BYTES_PER_S * self._waited_s:
                broken = BrokenOff(f"only {self._num_brought:,} bytes in {self._waited_s:.0f} s")
                broken.is_slow = True
                raise broken
            self._waited_s, self._num_brought = 0.0, 0
        since = time.monotonic()
        try:
            data = self.stream.read1(_CHUNK_BYTES if num_bytes is None else num_bytes)
        except (OSError, HTTPException) as error:
            raise BrokenOff(_reason(error)) from None
        self._waited_s += time.monotonic() - since
        self._num_brought += len(data)
        return data


class Tries:
    """The connections that may still bring nothing new; one that did, and was not slow, gives all of them back."""

    def __init__(self, patience: Patience, num_bytes: int = 0) -> None:
        """Begin where `num_bytes` of the file are there."""
        self._patience, self._largest = patience, num_bytes
        self._num_left, self._pause_s = patience.num_first_tries, patience.pause_s

    def pause_after(self, broken: BrokenOff, num_bytes: int) -> float:
        """How many seconds to wait before the next connection, after one that broke off at `num_bytes` of the file.

        Raises: `broken` when patience is at its end.
        """
        if num_bytes > self._largest and not broken.is_slow:
            self._num_left, self._pause_s = self._patience.num_tries, self._patience.pause_s
        else:
            self._num_left -= 1
        self._largest = max(self._largest, num_bytes)
        if not self._num_left:
            raise broken
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, self._patience.longest_pause_s)
        return pause_s


def fetch(
    url: Url,
    file: BinaryIO,
    patience: Patience,
    version: str | None = None,
    at_least: int = 0,
    on_answer: Callable[[Answer, bytes], None] = lambda answer, first: None,
    on_progress: OnProgress = lambda done, size: None,
    on_note: OnNote = lambda note: None,
) -> None:
    """Complete what `file` (writable, unbuffered) holds of the bytes at `url`, in as many connections as it takes.

    What is there is taken for the beginning of `version`, or of whatever the server has (None), and is written anew
    where the server has another version or does not continue. A server that does not say the size has sent the whole
    when there are `at_least` so many bytes. `on_answer` is told each answer with its first chunk,
    and may raise.

    Raises: Refused for an answer that no other try would change, BrokenOff when patience is at its end.
    """
    tries = Tries(patience, _size(file))

    def note(answer: Answer, first: bytes) -> None:
        nonlocal version
        version = answer.version or version  # what the next connection has to continue
        on_answer(answer, first)

    while True:
        try:
            return _receive(url, file, version, at_least, note, on_progress, on_note)
        except BrokenOff as broken:
            size = _size(file)
            pause_s = tries.pause_after(broken, size)
            on_note(f"broken off at {size:,} bytes ({broken}), going on")
            time.sleep(pause_s)


def read_bytes(url: Url, patience: Patience = BRIEF) -> bytes:
    """A small file's content.

    Raises: Refused, BrokenOff.
    """

    def check(done: int, _: int | None) -> None:
        if done > _MOST_BYTES_IN_MEMORY:
            raise Refused(f"has more than {_MOST_BYTES_IN_MEMORY:,} bytes")

    with tempfile.TemporaryFile(buffering=0) as file:
        fetch(url, file, patience, on_progress=check)
        file.seek(0)
        return file.read()


def connect_patiently(url: Url, patience: Patience) -> Answer:
    """Ask for a whole file, again where that fails.

    Raises: Refused, BrokenOff.
    """
    pause_s = patience.pause_s
    for tries_left in reversed(range(patience.num_first_tries)):
        try:
            return connect(url, 0)
        except BrokenOff:
            if not tries_left:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, patience.longest_pause_s)
    raise AssertionError("patience without a try")


def connect(url: Url, have: int) -> Answer:
    """Ask for the bytes from `have` on. A server that does not honour that, or has no more than `have`, starts at 0.

    Raises: Refused, BrokenOff.
    """
    return _connect_http(url, have) if url.is_http else _connect_object(url, have)


def unavailable(url: Url, error: Refused | BrokenOff) -> DataUnavailable:
    """The error that says why a file of the data cannot be had."""
    if isinstance(error, NotThere):
        return DataMissing(str(error), where=url.shown)
    if isinstance(error, Refused):
        return DataUnavailable(str(error), where=url.shown, on_one_rank=False)
    return DataUnavailable(
        f"cannot be fetched, after several tries: {error}",
        where=url.shown,
        fix="when the server can be reached again, the same command goes on from the last checkpoint, "
        "or begins again if there is none",
    )


def _receive(
    url: Url,
    file: BinaryIO,
    version: str | None,
    at_least: int,
    on_answer: Callable[[Answer, bytes], None],
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """One connection: append what `file` lacks, or write it anew.

    Raises: BrokenOff when bytes are missing at its end; Refused.
    """
    have = _size(file)
    answer = connect(url, have)
    if answer.start and version and answer.version and answer.version != version:
        answer.stream.close()
        answer = connect(url, 0)
    with answer:
        if answer.start < have:
            on_note(f"the server does not continue at {have:,} bytes: starting over")
        done, chunk = answer.start, answer.read()
        on_answer(answer, chunk)
        file.seek(done)
        file.truncate()
        while chunk:
            _write(file, chunk)
            done += len(chunk)
            on_progress(done, answer.size)
            chunk = answer.read()
    if done < (at_least if answer.size is None else answer.size):
        raise BrokenOff("the connection was closed")


def _write(file: BinaryIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:  # an unbuffered file may take a part
        left = left[file.write(left) :]


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


class _HttpOnly(HTTPRedirectHandler):
    """Follows a redirect to http and https, and to nothing else."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not Url(newurl).is_http:
            raise Refused(f'the server redirects to "{newurl}", which is no http')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _connect_http(url: Url, have: int) -> Answer:
    headers = {"User-Agent": "vitds", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        request = Request(quote(url, safe=_MEANT), headers=headers)
        if url.startswith(hugging_face() + "/") and (token := os.environ.get("HF_TOKEN")):
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for where it redirects to
        response: HTTPResponse = build_opener(_HttpOnly).open(request, timeout=_TIMEOUT_S)
    except HTTPError as error:
        with error:
            if error.code == 416 and have:
                is_whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
                return Answer(BytesIO(), have, have, _version(error.headers)) if is_whole else _connect_http(url, 0)
            answer = f"the server answers {error.code} {error.reason}"
            if error.code in (408, 429) or error.code >= 500:
                raise BrokenOff(answer) from None
            raise (NotThere if error.code in (404, 410) else Refused)(answer) from None
    except InvalidURL as error:
        raise Refused(str(error)) from None
    except (OSError, HTTPException) as error:
        raise BrokenOff(_reason(error)) from None
    except ValueError as error:  # of an address that is none
        raise Refused(str(error)) from None
    version = _version(response.headers)
    if response.status == 206:
        answered = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if answered and int(answered[1]) == have:
            return Answer(response, have, None if answered[2] == "*" else int(answered[2]), version)
        response.close()
        if not have:
            raise Refused("the server sends a part where the whole was asked for")
        return _connect_http(url, 0)
    length = response.headers.get("Content-Length", "")
    return Answer(response, 0, int(length) if length.isdecimal() else None, version)


def _version(headers: Message) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _reason(error: Exception) -> str:
    """What went wrong with a connection, in the system's words."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


class _Helper:
    """A process of vitds/object_store.py: takes requests on its stdin, answers on its stdout, ends with its owner."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("object_store.py")
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def ask(self, url: str, start: int) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"url": url, "start": start, "timeout_s": _TIMEOUT_S}).encode() + b"\n")
        return json.loads(self.take(int.from_bytes(self.take(4))))

    def take(self, num_bytes: int) -> bytes:
        """So many bytes of the answer.

        Raises: OSError when they do not come.
        """
        assert self.process.stdout is not None
        descriptor, parts = self.process.stdout.fileno(), bytearray()
        while len(parts) < num_bytes:
            # Its own client times out and tries again before that.
            if not select.select([descriptor], [], [], 4 * _TIMEOUT_S)[0]:
                raise TimeoutError("timed out")
            part = os.read(descriptor, num_bytes - len(parts))
            if not part:
                raise ConnectionError("the process that reads object stores died")
            parts += part
        return bytes(parts)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


_idle_helpers: list[_Helper] = []
_helpers_lock = threading.Lock()


def _take_helper() -> _Helper:
    with _helpers_lock:
        while _idle_helpers:
            helper = _idle_helpers.pop()
            if helper.owner == os.getpid():  # else of the process that this one was forked from
                return helper
    return _Helper()


class _ObjectStream:
    """The bytes that a helper sends; the helper is kept for the next file when they were read to their end."""

    def __init__(self, helper: _Helper) -> None:
        self.helper: _Helper | None = helper
        self.left = 0  # of the frame

    def read1(self, num_bytes: int, /) -> bytes:
        if self.helper is None:
            return b""
        if not self.left:
            self.left = int.from_bytes(self.helper.take(4))
            if self.left == _FAILED:
                reason = json.loads(self.helper.take(int.from_bytes(self.helper.take(4))))["error"]
                self._give_back()
                raise OSError(reason)
            if self.left == _END:
                self._give_back()
                return b""
        data = self.helper.take(min(num_bytes, self.left))
        self.left -= len(data)
        return data

    def close(self) -> None:
        if self.helper is not None:
            self.helper.end()
            self.helper = None

    def _give_back(self) -> None:
        assert self.helper is not None
        with _helpers_lock:
            _idle_helpers.append(self.helper)
        self.helper = None


def _connect_object(url: Url, have: int) -> Answer:
    helper = _take_helper()
    stream = _ObjectStream(helper)
    try:
        head = helper.ask(url, have)
    except OSError as error:
        stream.close()
        raise BrokenOff(_reason(error)) from None
    if "error" in head:
        stream._give_back()
        raise {"missing": NotThere, "refused": Refused, "passing": BrokenOff}[head["kind"]](head["error"])
    return Answer(stream, head["start"], head["size"], head["version"])
