"""Workload: the most compressed 64 MiB through Python, in order, in pieces of one size, from an image just opened."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from alternating import Alternating
from peers import Pread

import fastqcow

SPAN = 64 << 20
MIB = 1 << 20


def densest(image: Path) -> range:
    """The guest bytes of that stretch, which starts at a multiple of 1 MiB."""
    with fastqcow.open(image) as disk:
        found = [0] * (disk.size // MIB + 1)
        for extent in disk.map():
            if extent.compressed:
                for at in range(extent.start, extent.start + extent.length, 65536):
                    found[at // MIB] += 1
        span = min(SPAN, disk.size)
    sums = [0, *accumulate(found)]
    start = max(range(len(sums) - span // MIB), key=lambda i: sums[i + span // MIB] - sums[i])
    return range(start * MIB, start * MIB + span)


@pytest.mark.parametrize("nbytes", [4096, 65536, 1 << 20])
def test_sequential(
    alternating: Alternating,
    image: Path,
    raw_of: Callable[[Path], Path],
    readers: Callable[[Path, Path], dict[str, Callable[[], Pread]]],
    nbytes: int,
) -> None:
    span = densest(image)

    def read(opened: Callable[[], Pread]) -> Callable[[], object]:
        def run() -> None:
            pread = opened()
            for offset in range(span.start, span.stop, nbytes):
                pread(nbytes, offset)

        return run

    alternating({name: read(opened) for name, opened in readers(image, raw_of(image)).items()})
