"""Allocations of Python fail, from the nth on and for a while: MemoryError or the right bytes, and nothing is left."""

from __future__ import annotations

import _testcapi  # type: ignore[import-not-found]
import gc
import os
import sys
import traceback
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import fastqcow
from capabilities import descriptors
from images import plain_and_compressed

IMAGE, CONTENTS = plain_and_compressed(12)
DAMAGED = IMAGE[: len(IMAGE) - 100_000]


def read(path: Path) -> None:
    image = fastqcow.open(path, threads=2)
    assert image.pread(70_000, 100) == CONTENTS[100:70_100]
    image.close()


def read_into(path: Path) -> None:
    buffer = bytearray(200_000)
    image = fastqcow.open(path, threads=2)
    assert image.preadv([memoryview(buffer)[:100], memoryview(buffer)[100:]], 5) == 200_000
    assert buffer == CONTENTS[5:200_005]
    image.close()


class Wrapped:
    """Made here, as Python 3.13 crashes where it has no memory to make a function."""

    def __init__(self, file: FileIO) -> None:
        self.file = file

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def read(self, nbytes: int) -> bytes:
        return self.file.read(nbytes)


def read_a_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        image = fastqcow.open(Wrapped(file), threads=2)
        assert image.pread(70_000, 100) == CONTENTS[100:70_100]
        image.close()


def look(path: Path) -> None:
    image = fastqcow.open(path)
    assert sum(extent.length for extent in image.map()) == image.size
    image.close()


def meet_damage(path: Path) -> None:
    image = fastqcow.open(path.with_name("damaged.qcow2"))
    try:
        image.read()
    except fastqcow.FormatError:
        image.close()
    else:
        raise AssertionError("damage was read")


def write(path: Path) -> None:
    fastqcow.convert(path, path.with_name("out"), format="qcow2", threads=1)


def inflate(path: Path) -> None:
    assert fastqcow.parse_l2(bytes(64), cluster_bits=16).kind[0] == 0


def once(operation: Callable[[Path], None], path: Path, nth: int, count: int) -> bool:
    """The nth allocation and the `count` from there on fail. Whether it was done all the same."""
    files = descriptors()
    _testcapi.set_nomemory(nth, nth + count)
    try:
        operation(path)
    except BaseException as e:
        _testcapi.remove_mem_hooks()
        frames, error = traceback.extract_tb(e.__traceback__), repr(e)
        where = frames[-1].filename if frames else ""
        # Some of the interpreter's own functions take no memory for something else, or forget to say so.
        named = str(e) in ("error return without exception set", "can't allocate lock")
        right = isinstance(e, MemoryError) or named or "fastqcow" not in where
        del e
    else:
        _testcapi.remove_mem_hooks()
        return True
    assert right, (operation.__name__, nth, count, where, error)
    if where.endswith(".pyx") and descriptors() != files:
        gc.collect()  # elsewhere Python 3.11 itself loses the arguments of a call whose frame has no room
        assert descriptors() == files, (operation.__name__, nth, count, where, error)
    return False


def main(folder: Path) -> None:
    path = folder / "disk.qcow2"
    path.write_bytes(IMAGE)
    path.with_name("damaged.qcow2").write_bytes(DAMAGED)
    injected = 0
    for operation in (read, read_into, read_a_file, look, meet_damage, inflate, write):
        for _ in range(3):
            operation(path)  # what is imported and cached is there
        names = sorted(os.listdir(folder))
        for count in (1, 30):  # not all: Python 3.11 unwinds for ever where it never gets any
            nth, done = 1, 0
            while done < 8 and nth < (500 if operation is write else 3000):  # Python goes on without some of what it asks for
                done = done + 1 if once(operation, path, nth, count) else 0
                injected += done == 0
                nth += 19 if operation is write else 1 if nth < 60 else 11
        assert sorted(os.listdir(folder)) == names, operation.__name__
        operation(path)
    print(injected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
