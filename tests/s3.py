"""A real S3 server on this machine (moto), over HTTP; it can be made slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "yard"


class Quiet(WSGIRequestHandler):
    def log(self, _type: str, _message: str, *_args: Any) -> None:
        pass


@dataclass
class ObjectStore:
    """Where it listens, and how long it takes for a PUT of something whose key ends so."""

    environment: dict[str, str]
    slow: dict[str, float]
    url: str = f"s3://{BUCKET}"

    def keys(self, prefix: str = "") -> dict[str, str]:
        """Key → ETag of everything under `prefix`."""
        client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", [])}


@contextmanager
def an_object_store() -> Iterator[ObjectStore]:
    """Serves a fresh bucket; `environment` is what a client needs to be told."""
    slow: dict[str, float] = {}
    backend = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT":
            time.sleep(max((s for ending, s in slow.items() if environ["PATH_INFO"].endswith(ending)), default=0.0))
        answer: Iterable[bytes] = backend(environ, respond)
        return answer

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    ).create_bucket(Bucket=BUCKET)
    try:
        yield ObjectStore(environment, slow)
    finally:
        server.shutdown()
        thread.join()
