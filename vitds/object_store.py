"""Objects of s3, gs and hdfs, read with pyarrow in a process of its own; `vitds.transport` starts it and speaks to it.

A request is a line {"url", "start", "timeout_s"} on stdin. The answer is a head {"start", "size", "version"} or
{"error", "kind"}, and then the bytes from `start` on in frames, the last of length 0; length 2^32 - 1 announces
an {"error"}. Heads and errors are JSON after their length; lengths are 4 bytes, big-endian. The process ends with its
stdin. It imports nothing of vitds.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO
from urllib.parse import urlsplit

_CHUNK_BYTES = 8 * 1024 * 1024  # one request to the store
_FAILED = 2**32 - 1


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are none."""
    for line in requests:
        request = json.loads(line)
        try:
            filesystem, path, info = _find(request["url"], request["timeout_s"])
            file = filesystem.open_input_file(path)
        except Exception as error:
            _send_json(answers, {"error": _message(error), "kind": _kind(error)})
            continue
        with file:
            start = min(request["start"], info.size)
            _send_json(answers, {"start": start, "size": info.size, "version": str(info.mtime_ns)})
            file.seek(start)
            _send_frames(answers, file)
        answers.flush()


def _kind(error: Exception) -> str:
    """Whether nothing is there, trying again is no use, or it may do next time."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "refused" if isinstance(error, PermissionError | ValueError | ImportError) else "passing"


def _find(url: str, timeout_s: float) -> tuple[Any, str, Any]:
    """The file system of an address, the path in it, and what it knows of it."""
    from pyarrow import fs

    scheme = url.partition("://")[0]
    if scheme != "s3" or "?" in url:
        filesystem, path = fs.FileSystem.from_uri(url)
        info = filesystem.get_file_info(path)
    else:
        path = url.removeprefix("s3://").rstrip("/")
        filesystem, info = _find_in_s3(path, timeout_s)
    if info.type != fs.FileType.File:
        raise FileNotFoundError("there is no such object")
    if not info.size or not info.mtime_ns:  # libcurl takes a head that breaks off for one that says no more
        raise ConnectionError("the network connection broke off")
    return filesystem, path, info


_is_anonymous: dict[str, bool] = {}  # by bucket, once found out


def _find_in_s3(path: str, timeout_s: float) -> tuple[Any, Any]:
    """Ask with the credentials of this machine; where those do not do, as a public bucket is asked."""
    bucket = path.partition("/")[0]
    for anonymous in (_is_anonymous.get(bucket, False), True):
        filesystem = _s3(bucket, timeout_s, anonymous)
        try:
            info = filesystem.get_file_info(path)
        except OSError as error:
            if "ACCESS_DENIED" not in str(error) and "HTTP status 403" not in str(error):
                raise
            denied = error
        else:
            _is_anonymous[bucket] = anonymous
            return filesystem, info
    raise PermissionError(f"access denied: {_message(denied)}")


@functools.cache
def _s3(bucket: str, timeout_s: float, anonymous: bool) -> Any:
    from pyarrow import fs

    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint.netloc:
        with suppress(OSError):  # a bucket of somebody else's, or no network: the SDK has its own ways
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        anonymous=anonymous,
        region=region,
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or None,
        connect_timeout=timeout_s,
        request_timeout=timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # who asks tries again, and says so
    )


def _send_frames(answers: BinaryIO, file: Any) -> None:
    while True:
        try:
            data = file.read(_CHUNK_BYTES)
        except Exception as error:
            answers.write(_FAILED.to_bytes(4))
            _send_json(answers, {"error": _message(error)})
            return
        answers.write(len(data).to_bytes(4))
        answers.write(data)
        if not data:
            return


def _send_json(answers: BinaryIO, content: dict[str, Any]) -> None:
    text = json.dumps(content).encode()
    answers.write(len(text).to_bytes(4) + text)
    answers.flush()


def _message(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGUSR1):  # its owner decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        main(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # its owner left
        os._exit(0)
