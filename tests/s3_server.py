"""A server that speaks S3 on this machine (moto), with one bucket."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from vitds import transport


@contextmanager
def s3_bucket() -> Iterator[Callable[..., None]]:
    """Serve `s3://bucket` to this environment until the block ends; gives a function that puts an object there."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }
    try:
        # A process that reads object stores keeps the environment that it was started with.
        with patch.dict(os.environ, environment), patch.object(transport, "_idle_helpers", []) as helpers:
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket")
            yield lambda key, body, **more: client.put_object(Bucket="bucket", Key=key, Body=body, **more)
            for helper in helpers:
                helper.end()
    finally:
        server.stop()
