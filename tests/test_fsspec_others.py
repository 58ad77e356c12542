"""Images on other file systems of fsspec than HTTP: stores of objects, archives, local copies."""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import descriptors
from images import build
from webserver import CLUSTER, CONTENTS, IMAGE, WebServer, refused

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from fsspec.asyn import AsyncFileSystem  # noqa: E402

from fastqcow.integrations.fsspec import REQUESTS, open_file  # noqa: E402


def test_memory() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/disk.qcow2", IMAGE)
    with fastqcow.open("memory://bucket/disk.qcow2") as image, fastqcow.open("memory://bucket/disk.qcow2") as second:
        assert image.name == "memory://bucket/disk.qcow2"
        with ThreadPoolExecutor(4) as pool:  # both share one object of this file system, and its position
            offsets = range(0, len(CONTENTS) - 999, 99_999)
            found = list(pool.map(lambda at: (image if at % 2 else second).pread(999, at), offsets))
        assert found == [CONTENTS[at : at + 999] for at in offsets]
        assert image.read() == CONTENTS
        with pytest.raises(FileNotFoundError) as caught:
            fastqcow.open("memory://bucket/none")
        assert caught.value.filename == "memory://bucket/none"
    fs.rm("/bucket", recursive=True)


def test_file_of_another_file_system_pickles() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/disk.qcow2", IMAGE)
    with fastqcow.open(open_file(fs, "/bucket/disk.qcow2")) as image, pickle.loads(pickle.dumps(image)) as other:
        assert other.read() == CONTENTS
    fs.rm("/bucket", recursive=True)


def test_name_in_a_file_system_is_not_a_local_path(tmp_path: Path) -> None:
    """A file there may have the name of one that is here: what it names is not looked for beside that."""
    (tmp_path / "base.qcow2").write_bytes(IMAGE)
    (tmp_path / "overlay").touch()
    fs = fsspec.filesystem("memory")
    fs.pipe(f"{tmp_path}/overlay", build([0] * 100, backing=("base.qcow2", "qcow2")))
    with pytest.raises(fastqcow.PolicyError):
        fastqcow.open(open_file(fs, f"{tmp_path}/overlay"))
    fs.rm(str(tmp_path), recursive=True)


def test_local_file(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(IMAGE)
    before = descriptors()
    with fastqcow.open(f"file://{tmp_path}/disk.qcow2") as image:
        assert image.read() == CONTENTS
    assert descriptors() == before


def test_local_copy(server: WebServer, url: str) -> None:
    """For servers that send no ranges."""
    server.answer = lambda handler, data, span: handler.reply(200, data)
    with fastqcow.open(f"simplecache::{url}") as image:
        assert image.read() == CONTENTS
        assert image.name == f"simplecache::{url}"
        with pickle.loads(pickle.dumps(image)) as other:
            assert other.pread(10, 0) == CONTENTS[:10]


def test_archive(server: WebServer) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sub/disk.qcow2", IMAGE)
    server.files["a.zip"] = packed.getvalue()
    url = f"zip://sub/disk.qcow2::{server.url('a.zip')}"
    with fastqcow.open(url, threads=3) as image:
        assert image.read() == CONTENTS
        assert image.pread(10, CLUSTER) == CONTENTS[CLUSTER : CLUSTER + 10]


class Bucket(AsyncFileSystem):  # type: ignore[misc]
    """As stores of objects are: answers take a while, and many are given at the same time."""

    protocol = "bucket"
    cachable = False
    objects: dict[str, bytes] = {}  # noqa: RUF012
    answer: Callable[[bytes], Any] = staticmethod(lambda data: data)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at_once = self.most_at_once = self.calls = 0

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        size = None if path == "endless" else len(self.objects[path])
        return {"name": path, "size": size, "type": "directory" if path == "folder" else "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        import asyncio

        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0.03)
        self.at_once -= 1
        found: bytes = Bucket.answer(self.objects[path][start:end])
        return found


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "objects", {"disk.qcow2": IMAGE, "folder": b"", "endless": b""})
    return Bucket()


def test_objects_are_fetched_by_ranges(bucket: Bucket) -> None:
    with fastqcow.open(open_file(bucket, "disk.qcow2")) as image:
        assert image.name == "bucket://disk.qcow2"
        assert image.read() == CONTENTS
    assert 4 < bucket.most_at_once <= REQUESTS
    with fastqcow.open("bucket://disk.qcow2") as image, pickle.loads(pickle.dumps(image)) as other:
        assert other.pread(100, CLUSTER) == CONTENTS[CLUSTER : CLUSTER + 100]


def test_object_that_cannot_be_opened(bucket: Bucket) -> None:
    refused("bucket://none", FileNotFoundError)
    refused("bucket://folder", IsADirectoryError)
    assert "does not say how long" in str(refused("bucket://endless"))


def fail(data: bytes) -> bytes:
    raise RuntimeError("the store is on fire")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (fail, "RuntimeError the store is on fire"),
        (lambda data: data[1:], "the server sends"),
        (lambda data: data + b"x", "more than the"),
    ],
    ids=["raises", "short", "long"],
)
def test_object_that_fails(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, answer: Callable[[bytes], bytes], said: str) -> None:
    with fastqcow.open("bucket://disk.qcow2") as image:
        monkeypatch.setattr(Bucket, "answer", staticmethod(answer))
        with pytest.raises(OSError, match=f"{said}.*host offset 0x") as caught:
            image.read()
        assert caught.value.filename == "bucket://disk.qcow2"


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError])
def test_store_that_says_why(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, kind: type[OSError]) -> None:
    """As s3fs does: an error without a number, which comes from one of a package that we know nothing of."""

    def refuse(data: bytes) -> bytes:
        raise kind("the answer was no") from RuntimeError("NoSuchBucket")

    with fastqcow.open("bucket://disk.qcow2") as image:
        monkeypatch.setattr(Bucket, "answer", staticmethod(refuse))
        with pytest.raises(kind) as caught:
            image.read()
        assert caught.value.filename == "bucket://disk.qcow2"


def test_file_system_over_another_one(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "disk.qcow2").write_bytes(IMAGE)
    directory = importlib.import_module("fsspec.implementations.dirfs").DirFileSystem
    bucket.objects["sub/disk.qcow2"] = IMAGE
    for fs in (directory(path=str(tmp_path), fs=fsspec.filesystem("file")), directory(path="sub", fs=bucket)):
        with open_file(fs, "disk.qcow2", "dir://disk.qcow2") as file, fastqcow.open(file) as image:
            assert image.read() == CONTENTS
