"""A server that speaks S3 on this machine (moto), with one bucket, behind a line that can be made bad."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

import pytest

from vitds import transport


class Line:
    """Passes connections on to a server; the next `num_bad` of them are cut off after so many bytes, or stall there."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.server, self.bad_after, self.num_bad, self.stall_s = address, 0, 0, 0.0
        self.num_connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self.listener.getsockname())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.server)
                self.num_connections += 1
                is_bad, self.num_bad = self.num_bad > 0, max(0, self.num_bad - 1)
                left = self.bad_after if is_bad else float("inf")
                threading.Thread(target=self._pass_on, args=(client, server, float("inf")), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, left), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, left: float) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(4096):
                target.sendall(data[: int(min(left, len(data)))])
                left -= len(data)
                if left <= 0:
                    time.sleep(self.stall_s)
                    break
            for end in (source, target):  # a close alone would wait for the thread of the other direction
                end.shutdown(socket.SHUT_RDWR)


class Bucket:
    """`s3://bucket`, and the line to it."""

    def __init__(self, client, line: Line) -> None:
        self.client, self.line = client, line

    def put(self, key: str, body: bytes, **more: str) -> None:
        """Store an object."""
        self.client.put_object(Bucket="bucket", Key=key, Body=body, **more)


@contextmanager
def s3_bucket() -> Iterator[Bucket]:
    """Serve `s3://bucket` to this environment until the block ends."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    line = Line(server.get_host_and_port())
    environment = {
        "AWS_ENDPOINT_URL": line.address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }
    try:
        # A process that reads object stores knows the server of its start: none is taken over from an earlier one.
        with patch.dict(os.environ, environment), patch.object(transport, "_idle_helpers", []) as helpers:
            client = boto3.client("s3", endpoint_url="http://{}:{}".format(*server.get_host_and_port()))
            client.create_bucket(Bucket="bucket")
            yield Bucket(client, line)
            for helper in helpers:
                helper.end()
    finally:
        line.listener.close()
        server.stop()
