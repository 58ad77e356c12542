"""Nothing is left of images that were opened, read and closed, or could not be opened, however many."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastqcow
import faults
from capabilities import descriptors, need_proc, resident
from conftest import Qemu
from faults import UNDER_ASAN, UNDER_TSAN
from images import build, data_entry, plain_and_compressed

IMAGE, CONTENTS = plain_and_compressed(12)
COUNT = 10_000


class Remote(io.BytesIO):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> list[bytes]:
        return [IMAGE[host_off : host_off + nbytes] for host_off, nbytes in wanted]


class Failing(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise ConnectionError("the cable is out")


def read(source: Any, **options: Any) -> None:
    with fastqcow.open(source, threads=2, **options) as image:
        assert image.pread(5000, 70_000) == CONTENTS[70_000:75_000]


def read_all(path: Path) -> None:
    with fastqcow.open(path, threads=2) as image:
        assert image.pread(len(CONTENTS), 0) == CONTENTS
        assert sum(extent.length for extent in image.map()) == len(CONTENTS)


def read_a_snapshot(path: Path) -> None:
    with fastqcow.open(path) as image, image.snapshot("one") as snapshot:
        image.close()
        assert snapshot.pread(5000, 70_000) == CONTENTS[70_000:75_000]


def forget(path: Path) -> None:
    """Without closing it, in the middle of what is read ahead."""
    image = fastqcow.open(path, threads=2)
    for at in range(0, 40_000, 4096):
        image.pread(4096, at)


def fail_to_open(source: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fastqcow.open(source)


def fail_to_read(path: Path) -> None:
    with fastqcow.open(path) as image, contextlib.suppress(fastqcow.FormatError):
        image.read()
        raise AssertionError("damage was read")


def test_10000_images(qemu: Qemu, tmp_path: Path) -> None:
    """Descriptors, memory, and Python's objects and blocks are as many after ten thousand as after one thousand."""
    need_proc()
    path, top, damaged, text = (tmp_path / name for name in ("disk.qcow2", "top.qcow2", "damaged.qcow2", "text"))
    path.write_bytes(IMAGE)
    top.write_bytes(build([0] * 12, backing=(path.name, "qcow2")))
    damaged.write_bytes(build([data_entry(512)]))
    text.write_text("no image")
    moment = tmp_path / "moment.qcow2"
    qemu.img("convert", "-c", "-O", "qcow2", path, moment)
    qemu.img("snapshot", "-c", "one", moment)
    ways: list[Callable[[], None]] = [
        lambda: read(path),
        lambda: read(top),
        lambda: read_a_snapshot(moment),
        lambda: read(io.BytesIO(IMAGE)),
        lambda: read(Remote(IMAGE)),
        lambda: read(path, cache_size=0),
        lambda: read_all(path),
        lambda: forget(path),
        lambda: fail_to_open(text, fastqcow.FormatError),
        lambda: fail_to_open(tmp_path, IsADirectoryError),
        lambda: fail_to_open(Failing(IMAGE), ConnectionError),
        lambda: fail_to_read(damaged),
    ]

    def once(count: int) -> tuple[int, int, int, int]:
        for i in range(count):
            ways[i % len(ways)]()
        gc.collect()
        return descriptors(), len(gc.get_objects()), sys.getallocatedblocks(), resident()

    once(COUNT // 20)
    before = once(COUNT // 20)
    after = once(COUNT - COUNT // 10)
    files, objects, blocks, nbytes = (b - a for a, b in zip(before, after, strict=True))
    assert files == 0
    assert objects < 100
    assert blocks < 300
    if not (UNDER_ASAN or UNDER_TSAN):  # which keep what was freed for a while
        assert nbytes < 8 << 20


def test_every_exception_of_the_bridge(tmp_path: Path) -> None:
    """Each line of it that raises, hundreds of times, with references, objects, blocks, descriptors and C's memory counted."""
    rows, lines = map(int, faults.run("exceptions.py", folder=tmp_path).split())
    assert rows > 50
    assert lines >= 40
