"""Allocations of Python fail, one or thirty in a row, wherever an operation has one: MemoryError or the right bytes.

Some of the interpreter's own functions raise something else where they have no memory (INSTEAD). And the file that a conversion
writes beside its target may be left, where there is no memory to remove it either.
"""

from __future__ import annotations

import _testcapi  # type: ignore[import-not-found]
import gc
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import fastqcow
from capabilities import descriptors
from faults import tell
from images import plain_and_compressed

IMAGE, CONTENTS = plain_and_compressed(12)
DAMAGED = IMAGE[: len(IMAGE) - 100_000]
OLD = b"what was there before"
INSTEAD = (
    (SystemError, "error return without exception set"),
    (RuntimeError, "can't allocate lock"),
    (TypeError, "expected str, bytes or os.PathLike object, not PosixPath"),  # os.fspath
)


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


def once(operation: Callable[[Path], None], path: Path, nth: int, count: int) -> str | None:
    """The nth allocation and the `count` from there on fail. What was raised, or None if it was done all the same."""
    files = descriptors()
    _testcapi.set_nomemory(nth, nth + count)
    try:
        operation(path)
    except BaseException as e:
        _testcapi.remove_mem_hooks()
        frames, error, kind = traceback.extract_tb(e.__traceback__), repr(e), type(e)
        said = str(e)
        del e
    else:
        _testcapi.remove_mem_hooks()
        return None
    where = frames[-1].filename if frames else ""
    told = operation.__name__, nth, count, where, error
    assert kind is MemoryError or (kind, said) in INSTEAD, told
    if where.endswith((".pyx", ".pxi")) and descriptors() != files:
        gc.collect()  # elsewhere Python 3.11 itself loses the arguments of a call whose frame has no room
        assert descriptors() == files, told
    return kind.__name__


def main(folder: Path) -> None:
    path, out = folder / "disk.qcow2", folder / "out"
    path.write_bytes(IMAGE)
    path.with_name("damaged.qcow2").write_bytes(DAMAGED)
    injected: Counter[str] = Counter()
    for operation in (read, read_into, read_a_file, look, meet_damage, inflate, write):
        for _ in range(3):
            operation(path)  # what is imported and cached is there
        whole = out.read_bytes() if operation is write else OLD
        names = sorted(os.listdir(folder))
        for count in (1, 30):  # not all: Python 3.11 unwinds for ever where it never gets any
            nth, done = 1, 0
            while done < 8:  # Python goes on without some of what it asks for
                if operation is write:
                    out.write_bytes(OLD)
                raised = once(operation, path, nth, count)
                if raised:
                    injected[f"{count} in a row: {raised}"] += 1
                    assert operation is not write or out.read_bytes() in (OLD, whole)
                done = 0 if raised else done + 1
                nth += 1
        left = [name for name in os.listdir(folder) if name not in names]
        assert not left or operation is write, left
        injected["files left"] += len(left)
        for name in left:
            assert name.startswith(".out.")
            assert name.endswith(".part")
            (folder / name).unlink()
        operation(path)
    tell(injected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
