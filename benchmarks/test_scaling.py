"""Workload: one, two and more threads at the same work, in one process: into memory, and to a file.

The limit: the same clusters inflated from memory by as many threads, with nothing around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating
from peers import Streams

import fastqcow
from fastqcow.cpus import available_cpus

CPUS = available_cpus()
THREADS = sorted({*(n for n in (1, 2, 4, 8, 16) if n <= CPUS), CPUS})
PIECE = 4 << 20


def threads_text(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def most_threads_first(call: Callable[[int], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {threads_text(n): call(n) for n in reversed(THREADS)}


def test_read_into_memory(alternating: Alternating, image: Path) -> None:
    """By preadv of 4 MiB into one buffer, where data is; and on the streams in memory, fastqcow.inflate_into (the limit), and what
    Python has."""
    buffer = bytearray(PIECE)

    def read(threads: int) -> Callable[[], object]:
        disk = fastqcow.open(image, threads=threads)
        stored = [extent for extent in disk.map() if extent.data]
        pieces = {piece for e in stored for piece in range(e.start // PIECE, (e.start + e.length - 1) // PIECE + 1)}

        def run() -> None:
            for piece in sorted(pieces):
                disk.preadv([buffer], piece * PIECE)

        return run

    peers = most_threads_first(read)
    streams = Streams(image)
    clusters = sorted(streams.by_cluster)
    peers[f"limit, {threads_text(THREADS[-1])}"] = streams.inflate(clusters, THREADS[-1])
    name, peers[name] = streams.inflate_by_python(clusters)
    alternating(peers)


@pytest.mark.parametrize("engine", ["libdeflate", "libz"])
def test_convert_to_a_file(alternating: Alternating, zlib_image: Path, tmp_path: Path, engine: str) -> None:
    numbers = itertools.count()

    def convert(threads: int) -> Callable[[], object]:
        disk = fastqcow.open(zlib_image, threads=threads, engine=engine)  # type: ignore[arg-type]

        def run() -> None:
            out = tmp_path / str(next(numbers))
            fastqcow.convert(disk, out)
            out.unlink()

        return run

    alternating(most_threads_first(convert))
