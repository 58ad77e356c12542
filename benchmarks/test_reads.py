"""Workload: reads through Python, sequential by size, and those of a machine that boots.

Peers: the engine libz, which shows what libdeflate gains; and the same reads from the raw file in the page cache, which show what
is left of the cost of compression.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating

import fastqcow


@pytest.fixture(scope="module")
def raw(zlib_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    fastqcow.convert(zlib_image, path)
    return path


@pytest.mark.parametrize("nbytes", [4096, 65536, 1 << 20])
def test_sequential(alternating: Alternating, zlib_image: Path, raw: Path, nbytes: int) -> None:
    """The first 64 MiB."""
    end = min(64 << 20, raw.stat().st_size)

    def read(engine: str) -> Callable[[], object]:
        def run() -> None:
            with fastqcow.open(zlib_image, engine=engine) as disk:  # type: ignore[arg-type]
                for offset in range(0, end, nbytes):
                    disk.pread(nbytes, offset)

        return run

    def read_raw() -> None:
        fd = os.open(raw, os.O_RDONLY)
        for offset in range(0, end, nbytes):
            os.pread(fd, nbytes, offset)
        os.close(fd)

    alternating({"fastqcow": read("libdeflate"), "fastqcow, libz": read("libz"), "raw file": read_raw})


def test_recorded_boot(alternating: Alternating, zlib_image: Path, raw: Path) -> None:
    """boot.trace, from an image just opened."""
    trace_file = zlib_image.with_name("boot.trace")
    if not trace_file.exists():
        pytest.skip(f"no {trace_file.name} beside the image")
    trace = [tuple(map(int, line.split())) for line in trace_file.read_text().splitlines()]

    def boot() -> None:
        with fastqcow.open(zlib_image) as disk:
            for offset, nbytes in trace:
                disk.pread(nbytes, offset)

    def boot_raw() -> None:
        fd = os.open(raw, os.O_RDONLY)
        for offset, nbytes in trace:
            os.pread(fd, nbytes, offset)
        os.close(fd)

    alternating({"fastqcow": boot, "raw file": boot_raw})
