"""Workload: whole processes, of which the most memory that they held is what counts: a conversion, and random reads of 4 KiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

READS = """
import random, sys, fastqcow
with fastqcow.open(sys.argv[1]) as image:
    rng = random.Random(1)
    for _ in range(20_000):
        image.pread(4096, rng.randrange(image.size // 4096) * 4096)
"""
CONVERT = """
import sys
from fastqcow.cli import main
main(["convert", *sys.argv[1:]])
"""
# What a process says of itself: what is said of it when it has ended counts the process that it was forked from, too.
SAYS = """
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def most_nbytes(code: str, *arguments: str | Path) -> int:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much memory a process held")
    done = subprocess.run([sys.executable, "-c", code + SAYS, *arguments], stdout=subprocess.PIPE, check=True)
    return int(done.stdout) << 10


def test_memory_of_convert(benchmark: BenchmarkFixture, image: Path, tmp_path: Path) -> None:
    nbytes = benchmark.pedantic(most_nbytes, args=(CONVERT, image, tmp_path / "out"), rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["memory_nbytes"] = nbytes


def test_memory_of_random_reads(benchmark: BenchmarkFixture, image: Path) -> None:
    nbytes = benchmark.pedantic(most_nbytes, args=(READS, image), rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["memory_nbytes"] = nbytes
