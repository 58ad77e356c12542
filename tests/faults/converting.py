"""Each call on the target and on the source fails once, wherever there is one; nothing is left that looks like a target."""

from __future__ import annotations

import errno
import gc
import os
import sys
from pathlib import Path
from typing import Any

import fastqcow
from capabilities import descriptors
from faults import Fault
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
]
OF_SOURCE = [("pread", errno.EIO), ("pread", errno.EINTR), ("pread", SHORT)]
GOES_ON = {("pwrite", errno.EINTR), ("pwrite", SHORT), ("pread", errno.EINTR), ("pread", SHORT)}
WAYS: dict[str, dict[str, Any]] = {
    "raw": {},
    "raw, allocated": {"preallocation": "falloc"},
    "raw, copied": {"copy_offload": True},
    "qcow2": {"format": "qcow2"},
    "qcow2, zlib": {"format": "qcow2", "compress": True},
    "qcow2, zstd": {"format": "qcow2", "compress": True, "compression_type": "zstd", "cluster_size": 4096},
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
        assert not fault.struck or (call, error) in GOES_ON or call == "copy_file_range" or where == "disk.qcow2", said
    assert sorted(os.listdir(folder)) == before, said
    if descriptors() != files:
        gc.collect()  # contextlib makes a circle of an exception that meets another on its way out
    assert descriptors() == files, said
    return fault.struck


def main(folder: Path) -> None:
    (folder / "disk.qcow2").write_bytes(IMAGE)
    count = 0
    faults = [(call, error, "out") for call, error in OF_TARGET] + [(call, error, "disk.qcow2") for call, error in OF_SOURCE]
    for options in WAYS.values():
        for call, error, where in faults:
            for threads in (1, 3) if where == "out" else (3,):
                nth = 1
                while strike(folder, call, error, nth, where, threads, options):
                    count += 1
                    nth += 1 if nth < 10 else nth // 3
    print(count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
