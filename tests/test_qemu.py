"""QEMU's tools as peers of a benchmark."""

from __future__ import annotations

import io
import shutil
from ctypes.util import find_library
from pathlib import Path

import pytest

import fastqcow
from fastqcow import libnbd
from fastqcow.qemu import PeerError, Qemu, why_not
from faults import UNDER_ASAN
from test_makeup import mixed_image


@pytest.fixture
def image(tmp_path: Path) -> fastqcow.Image:
    path = tmp_path / "a disk.qcow2"
    path.write_bytes(mixed_image())
    return fastqcow.open(path)


def test_read_from_qemu_nbd(image: fastqcow.Image) -> None:
    if not (shutil.which("qemu-nbd") and find_library("nbd")):
        pytest.skip("qemu-nbd or libnbd is not installed")
    with Qemu(image, 10).served() as client:
        assert client.pread(4096, 65536 - 1000) == image.pread(4096, 65536 - 1000)
        buffers = [bytearray(100), bytearray(image.size - 100)]
        assert client.preadv(buffers, 0) == image.size
        assert b"".join(buffers) == image.pread(image.size, 0)
        with pytest.raises(OSError, match=r"\w"):
            client.pread(1, image.size)
    client.close()  # once more does no harm


@pytest.mark.skipif(UNDER_ASAN, reason="libnbd starts the server, with ASan before it, and so it does not end")
def test_a_server_that_does_not_start(image: fastqcow.Image) -> None:
    if not (shutil.which("qemu-nbd") and find_library("nbd")):
        pytest.skip("qemu-nbd or libnbd is not installed")
    qemu = Qemu(image, 10)
    qemu.path += ".gone"
    with pytest.raises(PeerError, match="qemu-nbd does not start"), qemu.served():
        pass


def test_without_libnbd(image: fastqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = Qemu(image, 10)
    monkeypatch.setattr(libnbd, "NAME", "libnbd.so.none")
    libnbd._library.cache_clear()
    try:
        assert not libnbd.is_installed()
        qemu.nbd = "qemu-nbd"
        with pytest.raises(PeerError, match="libnbd is not installed"), qemu.served():
            pass
    finally:
        libnbd._library.cache_clear()


def test_without_qemu(image: fastqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    qemu = Qemu(image, 10)
    assert qemu.version() is None
    with pytest.raises(PeerError, match="qemu-nbd is not installed"), qemu.served():
        pass


def test_what_it_cannot_be_asked(image: fastqcow.Image) -> None:
    assert why_not(image) is None
    with open(image.name, "rb") as file, fastqcow.open(file) as same:
        assert why_not(same) is None  # a file that has a name
    with fastqcow.open(io.BytesIO(Path(image.name).read_bytes())) as other:
        assert "without a path" in (why_not(other) or "")
