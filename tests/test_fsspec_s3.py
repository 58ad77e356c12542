"""Images in S3: by s3fs, from a store on the loopback interface that counts what it is asked for."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from fastqcow.cli import main
from webserver import CLUSTER, CONTENTS, IMAGE, refused

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

from fastqcow.integrations.fsspec import RemoteFile, open_url  # noqa: E402


class Store:
    """What moto answers, and how much of it.

    Attributes:
        requests: method and path of each.
        sent: bytes of all bodies.
    """

    def __init__(self) -> None:
        self.app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        body = list(self.app(environ, start))
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            self.sent += sum(map(len, body))
        return body


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[Store, str]]:
    """A store, and its URL."""

    class Handler(serving.WSGIRequestHandler):  # type: ignore[misc, name-defined]
        def log(self, *_: Any) -> None:
            pass

    store = Store()
    server = serving.make_server("127.0.0.1", 0, store, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield store, f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(started: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """With an image in it, and an environment in which nobody asks for another store."""
    store, url = started
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.call_s3("create_bucket", Bucket="bucket")
    fs.pipe("bucket/disk.qcow2", IMAGE)
    s3fs.S3FileSystem.clear_instance_cache()
    store.requests.clear()
    store.sent = 0
    return store


def test_partition_table(store: Store) -> None:
    with fastqcow.open("s3://bucket/disk.qcow2") as image:
        assert image.pread(34 * 512, 0) == CONTENTS[: 34 * 512]
    assert 2 < len(store.requests) < 10
    assert 34 * 512 < store.sent < 1_000_000 < len(IMAGE)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_of_it(store: Store, threads: int) -> None:
    with fastqcow.open("s3://bucket/disk.qcow2", threads=threads) as image:
        assert image.name == "s3://bucket/disk.qcow2"
        assert image.read() == CONTENTS
        with pickle.loads(pickle.dumps(image)) as other:
            assert other.pread(100, 60 * CLUSTER) == CONTENTS[60 * CLUSTER : 60 * CLUSTER + 100]
    assert store.sent < 2 * len(IMAGE)


def test_convert(store: Store, tmp_path: Path) -> None:
    assert main(["convert", "s3://bucket/disk.qcow2", str(tmp_path / "disk.raw")]) == 0
    assert (tmp_path / "disk.raw").read_bytes() == CONTENTS


def test_options(store: Store, started: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = {"key": "test", "secret": "test", "endpoint_url": started[1]}
    with open_url("s3://bucket/disk.qcow2", **options) as file, fastqcow.open(file) as image:
        assert isinstance(file, RemoteFile)
        assert image.read() == CONTENTS
    with pytest.raises(PermissionError, match="Forbidden") as caught:
        open_url("s3://bucket/disk.qcow2", anon=True, endpoint_url=started[1])
    assert caught.value.filename == "s3://bucket/disk.qcow2"


def test_what_is_not_there(store: Store) -> None:
    refused("s3://bucket/none", FileNotFoundError)
    refused("s3://none/disk.qcow2", FileNotFoundError)


def test_what_is_gone_meanwhile(store: Store) -> None:
    with fastqcow.open("s3://bucket/disk.qcow2") as image:
        s3fs.S3FileSystem().rm("bucket/disk.qcow2")
        with pytest.raises(FileNotFoundError) as caught:
            image.read()
    assert caught.value.filename == "s3://bucket/disk.qcow2"
