"""A real S3 server (moto) on this machine, behind a relay that cuts connections."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

BUCKET = "models"


class Relay:
    """A TCP relay to the S3 server.

    It cuts the next `cuts` connections after `limit` bytes of answers, and every connection after `stop` bytes in all.
    """

    def __init__(self, port: int) -> None:
        self.target, self.cuts, self.limit = port, 0, 0
        self.bytes, self.stop = 0, 1 << 60
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answer: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if answer and self.bytes > self.stop:
                    break
                if answer and self.cuts and passed > self.limit:
                    self.cuts -= 1
                    break
                sink.sendall(data)
                self.bytes += len(data) if answer else 0
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[int]:
    """The port of an S3 server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def relay(s3_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Relay:
    """An empty bucket behind a relay, which every S3 client of this process and its children uses."""
    import boto3
    import s3fs

    from adapter_merge.files import object_storage

    relay = Relay(s3_server)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "ADAPTER_MERGE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # the client's own attempts, minutes in all
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    with suppress(client.exceptions.NoSuchBucket):
        for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.create_bucket(Bucket=BUCKET)
    return relay


def put(folder: Path, prefix: str) -> str:
    """Upload the files of a folder; return its address."""
    import boto3

    client = boto3.client("s3")
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())
    return f"s3://{BUCKET}/{prefix}"
