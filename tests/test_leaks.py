"""Nothing is left of images that were opened, read and closed, or could not be opened, however many."""

from __future__ import annotations

import gc
import io
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastqcow
import faults
from capabilities import descriptors
from conftest import Qemu
from faults import allocated_by_c
from images import PAYLOAD, build, data_entry, extension, patched, plain_and_compressed
from luksmaker import relocked

IMAGE, CONTENTS = plain_and_compressed(12)
COUNT = 10_000
OFFSET = 70_000
LEFT_MAX = (0, 50, 50, 16 << 10)
SECONDS = 20


class Remote(io.BytesIO):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> list[bytes]:
        return [IMAGE[host_off : host_off + nbytes] for host_off, nbytes in wanted]


class Failing(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise ConnectionError("the cable is out")


def read(source: Any, expected: bytes = CONTENTS, **options: Any) -> None:
    with fastqcow.open(source, threads=2, **options) as image:
        assert image.pread(5000, OFFSET) == expected[OFFSET : OFFSET + 5000]


def read_raw(path: Path) -> None:
    with fastqcow.open_raw(path) as disk:
        assert disk.pread(5000, OFFSET) == CONTENTS[OFFSET : OFFSET + 5000]


def read_all(path: Path) -> None:
    with fastqcow.open(path, threads=2) as image:
        assert image.pread(len(CONTENTS), 0) == CONTENTS
        assert sum(extent.length for extent in image.map()) == len(CONTENTS)


def read_a_snapshot(path: Path) -> None:
    with fastqcow.open(path) as image, image.snapshot("one") as snapshot:
        image.close()
        assert snapshot.pread(5000, OFFSET) == CONTENTS[OFFSET : OFFSET + 5000]


def read_encrypted(path: Path) -> None:
    """It was not encrypted, and so is noise."""
    with fastqcow.open(path, password="x") as image:
        assert image.pread(5000, OFFSET) != CONTENTS[OFFSET : OFFSET + 5000]


def read_url(url: str) -> None:
    from fastqcow.integrations.fsspec import RemoteFile, open_url

    with open_url(url) as file:
        assert isinstance(file, RemoteFile)
        read(file)


def forget(path: Path) -> None:
    """Without closing it, in the middle of what is read ahead."""
    image = fastqcow.open(path, threads=2)
    for at in range(0, 40_000, 4096):
        image.pread(4096, at)


def fail(error: type[Exception], source: Any, **options: Any) -> None:
    """To open it, or to read it."""
    try:
        with fastqcow.open(source, **options) as image:
            image.read()
    except error:
        return
    raise AssertionError("nothing was raised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, qemu: Qemu) -> Path:
    """Images of all kinds."""
    folder = tmp_path_factory.mktemp("images")
    data = build([data_entry(i << 16) for i in range(12)], extensions=extension(0x44415441, b"raw"))
    images = {
        "disk": IMAGE,
        "top": build([0] * 12, backing=("disk", "qcow2")),
        "over raw": build([0] * 12, backing=("raw", "raw")),
        "raw": CONTENTS,
        "data file": patched(data, 72, struct.pack(">Q", 4)),
        "aes": patched(build([data_entry(PAYLOAD + i << 16) for i in range(12)], CONTENTS), 32, struct.pack(">I", 1)),
        "damaged": build([data_entry(512)]),
        "no image": b"no image",
    }
    for name, image in images.items():
        (folder / name).write_bytes(image)
    qemu.img("convert", "-c", "-O", "qcow2", folder / "disk", folder / "moment")
    qemu.img("snapshot", "-c", "one", folder / "moment")
    return folder


@pytest.fixture(scope="module")
def luks(qemu: Qemu, folder: Path) -> Path:
    """Whose password does not take long to try."""
    path = folder / "luks"
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    qemu.img("create", "-q", "-f", "qcow2", *secret, path, "1M")
    path.write_bytes(relocked(path.read_bytes(), b"x", cipher="aes", key_nbytes=32, mode="cbc-plain64"))
    return path


def open_url_of(folder: Path) -> Callable[[], None]:
    """Of an asynchronous file system, as servers are read by."""
    asyn = pytest.importorskip("fsspec.asyn")
    fsspec = pytest.importorskip("fsspec")

    class Memory(asyn.AsyncFileSystem):  # type: ignore[misc, name-defined]
        protocol = "leaks"

        async def _info(self, path: str, **options: Any) -> dict[str, Any]:
            return {"name": path, "size": len(IMAGE), "type": "file"}

        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            return IMAGE[start:end]

    fsspec.register_implementation("leaks", Memory, clobber=True)
    return partial(read_url, "leaks://disk")


WAYS: dict[str, Callable[[Path], Callable[[], None]]] = {
    "image": lambda folder: partial(read, folder / "disk"),
    "backing file": lambda folder: partial(read, folder / "top"),
    "raw backing file": lambda folder: partial(read, folder / "over raw"),
    "data file": lambda folder: partial(read, folder / "data file"),
    "raw": lambda folder: partial(read_raw, folder / "raw"),
    "aes": lambda folder: partial(read_encrypted, folder / "aes"),
    "snapshot": lambda folder: partial(read_a_snapshot, folder / "moment"),
    "file object": lambda folder: lambda: read(io.BytesIO(IMAGE)),
    "remote": lambda folder: lambda: read(Remote(IMAGE)),
    "url": open_url_of,
    "no cache": lambda folder: partial(read, folder / "disk", cache_size=0),
    "all of it": lambda folder: partial(read_all, folder / "disk"),
    "not closed": lambda folder: partial(forget, folder / "disk"),
    "no image": lambda folder: partial(fail, fastqcow.FormatError, folder / "no image"),
    "folder": lambda folder: partial(fail, IsADirectoryError, folder),
    "file object that fails": lambda folder: lambda: fail(ConnectionError, Failing(IMAGE)),
    "no password": lambda folder: partial(fail, fastqcow.PasswordError, folder / "aes"),
    "damaged": lambda folder: partial(fail, fastqcow.FormatError, folder / "damaged"),
}


def there_are() -> tuple[int, int, int, int]:
    """Descriptors, Python's objects and blocks, and bytes of C's memory."""
    gc.collect()
    return descriptors(), len(gc.get_objects()), sys.getallocatedblocks(), allocated_by_c()


def nothing_is_left(way: Callable[[], None], count: int) -> None:
    """fsspec's thread is given time to end what it is at."""
    for _ in range(count // 5):
        way()
    before = there_are()
    for _ in range(count):
        way()
    deadline = time.monotonic() + SECONDS
    while True:
        left = [now - then for now, then in zip(there_are(), before, strict=True)]
        if all(n <= most for n, most in zip(left, LEFT_MAX, strict=True)):
            return
        assert time.monotonic() < deadline, f"left of descriptors, objects, blocks and bytes: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("name", WAYS)
def test_10000_images(folder: Path, name: str) -> None:
    """Descriptors, Python's objects and blocks, and C's memory are as many after hundreds as before, for each way to open one."""
    if name in ("aes", "no password"):
        pytest.importorskip("cryptography")
    nothing_is_left(WAYS[name](folder), COUNT // len(WAYS))


def test_images_whose_keys_are_derived(luks: Path) -> None:
    pytest.importorskip("cryptography")
    nothing_is_left(partial(read, luks, bytes(1 << 20), password="x"), 50)
    nothing_is_left(partial(fail, fastqcow.PasswordError, luks, password="y"), 25)


def test_every_exception_of_the_bridge(tmp_path: Path) -> None:
    """Each way that one takes, hundreds of times, with references, objects, blocks, descriptors and C's memory counted."""
    rows, lines = map(int, faults.run("exceptions.py", folder=tmp_path).split())
    assert rows > 60
    assert lines > 60
