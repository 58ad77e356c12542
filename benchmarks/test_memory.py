"""Workload: whole processes, of which the most memory that they held is what counts: a conversion, and random reads of 4 KiB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

READS = """
import random, sys, fastqcow
with fastqcow.open(sys.argv[1]) as image:
    rng = random.Random(1)
    for _ in range(20_000):
        image.pread(4096, rng.randrange(image.size // 4096) * 4096)
"""


def most_nbytes(*command: str | Path) -> int:
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << (0 if sys.platform == "darwin" else 10)


def test_memory_of_convert(benchmark: BenchmarkFixture, image: Path, tmp_path: Path) -> None:
    nbytes = benchmark.pedantic(most_nbytes, args=("-m", "fastqcow", "convert", image, tmp_path / "out"), rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["memory_nbytes"] = nbytes


def test_memory_of_random_reads(benchmark: BenchmarkFixture, image: Path) -> None:
    nbytes = benchmark.pedantic(most_nbytes, args=("-c", READS, image), rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["memory_nbytes"] = nbytes
