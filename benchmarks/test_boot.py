"""Workload: the reads of a machine that boots (boot.trace), one after the other, from an image just opened; and once more.

The limit: one bare inflation, by one thread, of each cluster that they touch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating
from peers import Pread, Streams

import fastqcow

CACHE_SIZE = 64 << 20


@pytest.fixture(scope="module")
def trace(zlib_image: Path) -> list[tuple[int, int]]:
    """(bytes, guest offset)"""
    path = zlib_image.with_name("boot.trace")
    if not path.exists():
        pytest.skip(f"no {path.name} beside the image")
    return [(int(nbytes), int(offset)) for offset, nbytes in map(str.split, path.read_text().splitlines())]


def replay(opened: Callable[[], Pread], trace: list[tuple[int, int]]) -> Callable[[], object]:
    def run() -> None:
        pread = opened()
        for nbytes, offset in trace:
            pread(nbytes, offset)

    return run


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_boot(
    alternating: Alternating,
    method: str,
    request: pytest.FixtureRequest,
    raw: Path,
    trace: list[tuple[int, int]],
    readers: Callable[[Path, Path], dict[str, Callable[[], Pread]]],
) -> None:
    image: Path = request.getfixturevalue(f"{method}_image")
    found = readers(image, raw)
    found["fastqcow"] = lambda: fastqcow.open(image, cache_size=CACHE_SIZE).pread
    peers = {name: replay(opened, trace) for name, opened in found.items()}
    streams = Streams(image)
    size = streams.cluster_size
    touched = {c for nbytes, offset in trace for c in range(offset // size, (offset + nbytes - 1) // size + 1)}
    peers["limit, 1 thread"] = streams.inflate(sorted(touched))
    alternating(peers)


def test_second_boot(
    alternating: Alternating,
    zlib_image: Path,
    raw: Path,
    trace: list[tuple[int, int]],
    readers: Callable[[Path, Path], dict[str, Callable[[], Pread]]],
) -> None:
    image = fastqcow.open(zlib_image, cache_size=CACHE_SIZE)
    others = readers(zlib_image, raw)
    peers = {"fastqcow": replay(lambda: image.pread, trace), "raw file": replay(others["raw file"], trace)}
    if "qemu-nbd" in others:
        peers["qemu-nbd"] = replay(others["qemu-nbd"], trace)
    alternating(peers)
