"""A web server on this machine, with ranges, whose misbehaviour tests set."""

import hashlib
import http.server
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote


class Server:
    """What the server has, how it misbehaves, and what it was asked for."""

    def __init__(self):
        self.files = {}  # path, decoded -> bytes
        self.root = None  # a directory that is served too
        self.ranges = True  # honours Range
        self.range_offset = 0  # added to where an answer to Range starts
        self.drop_after = None  # bytes of a body after which the connection is closed
        self.num_drops = math.inf
        self.is_reset = False  # ... and not politely: the client sees "connection reset"
        self.claimed_size = None  # instead of the true Content-Length
        self.says_sizes = True
        self.status = 200
        self.num_failures = math.inf  # answers with that status, if it is not 200
        self.stall_s = 0.0  # at the head of a body, then the connection is closed
        self.num_stalls = math.inf
        self.pause_s = 0.0  # after each of `trickle` bytes
        self.trickle = None
        self.redirects = {}  # path -> address
        self.has_versions = True  # sends an ETag
        self.requests = []  # (path as sent, Range or None)
        self.tokens = []  # Authorization of each, or None

    def content(self, path):
        if path in self.files or self.root is None:
            return self.files.get(path)
        file = Path(self.root) / path.lstrip("/")
        return file.read_bytes() if file.is_file() else None

    def answer(self, handler):
        asked = handler.headers.get("Range")
        path = unquote(handler.path.partition("?")[0])
        self.requests.append((handler.path, asked))
        self.tokens.append(handler.headers.get("Authorization"))
        if path in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[path])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = self.content(path)
        if (self.status != 200 and self.num_failures > 0) or body is None:
            self.num_failures -= 1
            handler.send_error(self.status if self.status != 200 else 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        total = self.claimed_size or len(body)
        if start and start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            start += self.range_offset
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{total}")
        if self.has_versions:
            handler.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        if self.says_sizes:
            handler.send_header("Content-Length", str(total - start))
        handler.end_headers()
        self._send(handler, body[start:])

    def _send(self, handler, sent):
        if self.stall_s and self.num_stalls > 0:
            self.num_stalls -= 1
            time.sleep(self.stall_s)
            return
        if self.drop_after is not None and self.num_drops > 0:
            sent, self.num_drops = sent[: self.drop_after], self.num_drops - 1
            if self.is_reset:
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        step = self.trickle or len(sent) or 1
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked has left
            for place in range(0, len(sent), step):
                handler.wfile.write(sent[place : place + step])
                time.sleep(self.pause_s)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serve until the block ends; gives the server's address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *arguments):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
