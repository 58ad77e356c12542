"""The interpreter ends while daemon threads are at work; what C does after that takes until somebody writes to standard input."""

from __future__ import annotations

import ctypes
import io
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastqcow
from fastqcow import _reader
from images import plain_and_compressed, text

IMAGE, CONTENTS = plain_and_compressed(60)


class File(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.0005)
        return super().read(size)


class Remote(File):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> list[bytes]:
        time.sleep(0.0005)
        data = self.getbuffer()
        return [bytes(data[host_off : host_off + nbytes]) for host_off, nbytes in wanted]


def read(image: fastqcow.Image) -> None:
    image.pread(2 << 20, random.randrange(1 << 20))
    image.pread(5000, random.randrange(3 << 20))


def large() -> str:
    """Of clusters that take long enough for the interpreter to be gone when they are done."""
    Path("large.raw").write_bytes(text(24 << 20))
    fastqcow.convert(fastqcow.open_raw("large.raw"), "large.qcow2", format="qcow2", compress=True, cluster_size=2 << 20)
    return "large.qcow2"


def digest(image: fastqcow.Image) -> None:
    fastqcow.convert(image, f"out-{threading.get_ident()}", checksum="sha256", threads=4)


def check(image: fastqcow.Image) -> None:
    fastqcow.check(image.name)  # which has no refcounts: each cluster is a finding


def decrypt(image: fastqcow.Image) -> None:
    ciphers = {"data": bytes, "counters": bytes, "tweaks": bytes, "vector_keys": bytes}
    _reader.Crypt("ecb", "plain", 16, by_guest_off=False, **ciphers).decrypt(bytes(1 << 20), 0)


def for_ever(work: Callable[[fastqcow.Image], None], image: fastqcow.Image) -> None:
    while True:
        work(image)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[fastqcow.Image], None]]] = {
    "path": (lambda: "disk.qcow2", read),
    "file": (lambda: File(IMAGE), read),
    "remote": (lambda: Remote(IMAGE), read),
    "digest": (large, digest),
    "check": (lambda: "disk.qcow2", check),
    "cipher": (lambda: "disk.qcow2", decrypt),
}


def main(kind: str) -> None:
    Path("disk.qcow2").write_bytes(IMAGE)
    source, work = KINDS[kind]
    images = [fastqcow.open(source(), threads=4, cache_size=1 << 20) for _ in range(3)]
    for i in range(9):
        threading.Thread(target=for_ever, args=(work, images[i % 3]), daemon=True).start()
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.getchar, None, None)
    time.sleep(0.2)
    print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
