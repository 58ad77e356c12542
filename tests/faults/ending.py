"""The interpreter ends while daemon threads read; what C does after that takes until somebody writes to standard input."""

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
from images import plain_and_compressed

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


def work(image: fastqcow.Image) -> None:
    while True:
        image.pread(2 << 20, random.randrange(1 << 20))
        image.pread(5000, random.randrange(3 << 20))


def main(kind: str) -> None:
    Path("disk.qcow2").write_bytes(IMAGE)
    sources: dict[str, Callable[[], Any]] = {"path": lambda: "disk.qcow2", "file": lambda: File(IMAGE), "remote": lambda: Remote(IMAGE)}
    images = [fastqcow.open(sources[kind](), threads=4, cache_size=1 << 20) for _ in range(3)]
    for i in range(9):
        threading.Thread(target=work, args=(images[i % 3],), daemon=True).start()
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.getchar, None, None)
    time.sleep(0.2)
    print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
