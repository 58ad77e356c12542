"""Each call on the target and on the source fails once, at every place; nothing is left that looks like a target."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fastqcow
from capabilities import descriptors
from faults import Fault, tell
from images import plain_and_compressed

IMAGE, CONTENTS = plain_and_compressed(24)
OLD = b"what was there before"
SHORT = 0
OF_TARGET = [
    ("pwrite", errno.ENOSPC),
    ("pwrite", errno.EIO),
    ("pwrite", errno.EDQUOT),
    ("pwrite", errno.EINTR),
    ("pwrite", SHORT),
    ("close", errno.ENOSPC),
    ("close", errno.EIO),
    ("ftruncate", errno.EIO),
    ("fallocate", errno.ENOSPC),
    ("copy_file_range", errno.EIO),
    ("copy_file_range", errno.EINTR),
    ("rename", errno.EIO),
    ("fsync", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("pread", errno.EIO),
    ("pread", errno.EINTR),
    ("pread", SHORT),
]
OF_SOURCE = [("pread", errno.EIO), ("pread", errno.EINTR), ("pread", SHORT)]
GOES_ON = {("pwrite", errno.EINTR), ("pwrite", SHORT), ("pread", errno.EINTR), ("pread", SHORT)}
GOES_ON |= {("copy_file_range", error) for error in (errno.EIO, errno.EINTR)}  # what the kernel does not copy is read and written
WAYS: dict[str, dict[str, Any]] = {
    "raw": {},
    "raw, allocated": {"preallocation": "falloc"},
    "raw, copied": {"copy_offload": True},
    "qcow2": {"format": "qcow2"},
    "qcow2, zlib": {"format": "qcow2", "compress": True, "compression_level": 1},
    "qcow2, zstd": {"format": "qcow2", "compress": True, "compression_level": 1, "compression_type": "zstd", "cluster_size": 4096},
    "raw, verified": {"verify": True},
    "qcow2, verified": {"format": "qcow2", "verify": True},
}


def contents_of(out: Path, options: dict[str, Any]) -> bytes:
    if "format" not in options:
        return out.read_bytes()
    with fastqcow.open(out) as made:
        return made.read()


def strike(folder: Path, call: str, error: int, nth: int, where: str, threads: int, options: dict[str, Any]) -> bool:
    """One conversion; whether the fault came."""
    out = folder / "out"
    out.write_bytes(OLD)
    before, raised = sorted(os.listdir(folder)), None
    files = descriptors()
    with Fault(call, nth, error, where) as fault:
        try:
            fastqcow.convert(folder / "disk.qcow2", out, threads=threads, **options)
        except OSError as e:
            raised = e.errno, e.filename  # not e: it would hold the image by its traceback, and with it the file
    said = f"{call}, errno {error}, call {nth}, {threads} threads, {options}: {raised!r}"
    if raised is not None:
        assert fault.struck, said
        assert raised[0] == error, said
        assert raised[1] in (str(out), str(folder / "disk.qcow2")), said
        assert out.read_bytes() == OLD, said
    else:
        assert contents_of(out, options) == CONTENTS, said
        # Of a target that is verified the descriptor is closed first by which it was read back, after all was stored.
        was_read_back = call == "close" and nth == 1 and "verify" in options
        assert not fault.struck or (call, error) in GOES_ON or where == "disk.qcow2" or was_read_back, said
    assert sorted(os.listdir(folder)) == before, said
    if descriptors() != files:
        gc.collect()  # contextlib makes a circle of an exception that meets another on its way out
    assert descriptors() == files, said
    return fault.struck


def main(folder: Path) -> None:
    (folder / "disk.qcow2").write_bytes(IMAGE)
    injected: Counter[str] = Counter()
    faults = [(call, error, "out") for call, error in OF_TARGET] + [(call, error, "disk.qcow2") for call, error in OF_SOURCE]
    for call, error, where in faults:
        what = f"{'target' if where == 'out' else 'source'}: {call}: {errno.errorcode.get(error, 'short')}"
        for options in WAYS.values():
            for threads in (1, 3) if where == "out" else (3,):
                nth = 1
                while strike(folder, call, error, nth, where, threads, options):
                    injected[what] += 1
                    nth += 1
        assert injected[what], what
    tell(injected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
