"""Workload: a raw disk to a compressed image, page cache warm, into a name that is new each time. As whole processes, by an image's
method, at the default and at the fast level; and within one process by more and fewer threads, and at every level.

Peers: qemu-img as it is, and with what makes it fastest (16 coroutines, writes out of order), at its only level.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alternating import Alternating
from test_memory import CONVERT, most_nbytes
from test_scaling import most_threads_first

import fastqcow

ROUNDS = 5
QCOW2 = ("convert", "-c", "-f", "raw", "-O", "qcow2")
LEVELS: list[dict[str, Any]] = [
    {"compression_level": 6},
    *({"compression_level": level} for level in ("fast", 1, 2, 3, 4, 5, 7, 8, 9)),
    *({"compression_type": "zstd", "compression_level": level} for level in range(1, 20)),
]
needs_isal = pytest.mark.skipif(fastqcow.build_info().isal is None, reason="built without ISA-L")


def method_of(image: Path) -> str:
    with fastqcow.open(image) as disk:
        return disk.header.compression_type


@pytest.fixture
def raw_of(raw_of: Callable[[Path], Path], request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Path]:
    """Where nothing is timed, a small disk in place of an image's, as the slowest levels take minutes for that."""
    if not request.config.getoption("benchmark_disable"):
        return raw_of
    small = tmp_path / "small.raw"
    fastqcow.convert(Path(__file__).parents[1] / "tests" / "data" / "demo.qcow2", small)
    return lambda image: small


class Writing:
    """Peers that write, and how large what they wrote is."""

    def __init__(self, raw: Path, folder: Path) -> None:
        self.raw, self.folder, self.numbers = raw, folder, itertools.count()
        self.peers: dict[str, Callable[[], object]] = {}
        self.nbytes: dict[str, int] = {}

    def add(self, name: str, write: Callable[[Path], object]) -> None:
        def run() -> None:
            out = self.folder / str(next(self.numbers))
            write(out)
            self.nbytes[name] = out.stat().st_size
            out.unlink()

        self.peers[name] = run

    def add_process(self, name: str, *command: str) -> None:
        self.add(name, lambda out: subprocess.run([*command, self.raw, out], check=True))

    def run(self, alternating: Alternating, rounds: int = ROUNDS) -> None:
        alternating(self.peers, rounds)
        for name, nbytes in self.nbytes.items():
            alternating.benchmark.extra_info.setdefault(name, {})["nbytes"] = nbytes


def write(alternating: Alternating, image: Path, raw: Path, folder: Path, *options: str) -> None:
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")
    method = ("-o", f"compression_type={method_of(image)}")
    writing = Writing(raw, folder)
    writing.add_process("fastqcow", sys.executable, "-m", "fastqcow", *QCOW2, *method, *options)
    writing.add_process("fastqcow -m 1", sys.executable, "-m", "fastqcow", *QCOW2, *method, *options, "-m", "1")
    writing.add_process("qemu-img", "qemu-img", *QCOW2, *method)
    writing.add_process("qemu-img -m 16 -W", "qemu-img", *QCOW2, *method, "-m", "16", "-W")
    writing.run(alternating)


def test_write(alternating: Alternating, image: Path, raw_of: Callable[[Path], Path], tmp_path: Path) -> None:
    write(alternating, image, raw_of(image), tmp_path)


def test_write_fast(alternating: Alternating, image: Path, raw_of: Callable[[Path], Path], tmp_path: Path) -> None:
    if method_of(image) == "zlib" and fastqcow.build_info().isal is None:
        pytest.skip("built without ISA-L")
    write(alternating, image, raw_of(image), tmp_path, "-o", "compression_level=fast")


def convert(raw: Path, out: Path, threads: int | None = None, **options: Any) -> None:
    with fastqcow.open_raw(raw, threads=threads) as disk:
        fastqcow.convert(disk, out, format="qcow2", compress=True, **options)


@pytest.mark.parametrize("level", ["zlib", "zstd", pytest.param("fast", marks=needs_isal)])
def test_write_by_threads(
    alternating: Alternating, zlib_image: Path, raw_of: Callable[[Path], Path], tmp_path: Path, level: str
) -> None:
    options: dict[str, Any] = {"compression_level": level} if level == "fast" else {"compression_type": level}
    raw = raw_of(zlib_image)
    writing = Writing(raw, tmp_path)

    def by(threads: int) -> Callable[[], object]:
        writing.add(str(threads), lambda out: convert(raw, out, threads, **options))
        return writing.peers[str(threads)]

    alternating(most_threads_first(by), ROUNDS)


def test_levels(alternating: Alternating, zlib_image: Path, raw_of: Callable[[Path], Path], tmp_path: Path) -> None:
    raw = raw_of(zlib_image)
    writing = Writing(raw, tmp_path)
    for options in LEVELS:
        if options["compression_level"] != "fast" or fastqcow.build_info().isal:
            name = f"{options.get('compression_type', 'zlib')} {options['compression_level']}"
            writing.add(name, lambda out, options=options: convert(raw, out, **options))  # type: ignore[misc]
    writing.run(alternating, rounds=2)


@pytest.mark.parametrize("options", ["", ",cluster_size=2M"])
def test_memory_of_writing(benchmark: Any, image: Path, raw_of: Callable[[Path], Path], tmp_path: Path, options: str) -> None:
    arguments = (*QCOW2[1:], "-o", f"compression_type={method_of(image)}{options}", raw_of(image), tmp_path / "out")
    nbytes = benchmark.pedantic(most_nbytes, args=(CONVERT, *arguments), rounds=1)
    benchmark.extra_info["memory_nbytes"] = nbytes
