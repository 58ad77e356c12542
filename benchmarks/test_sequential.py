"""Workload: the first 64 MiB through Python, in order, in pieces of one size, from an image just opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating
from peers import Pread, readers


@pytest.mark.parametrize("nbytes", [4096, 65536, 1 << 20])
def test_sequential(alternating: Alternating, zlib_image: Path, raw: Path, nbytes: int) -> None:
    end = min(64 << 20, raw.stat().st_size)

    def read(opened: Callable[[], Pread]) -> Callable[[], object]:
        def run() -> None:
            pread = opened()
            for offset in range(0, end, nbytes):
                pread(nbytes, offset)

        return run

    alternating({name: read(opened) for name, opened in readers(zlib_image, raw).items()})
