"""What the suites share: images to work on, and runs that take turns.

A machine's speed drifts, by more than what is to be measured. So peers are not timed one after the other: each round runs every
peer once, in an order that changes, and what counts is the median, over the rounds, of each peer's time over the subject's.
pytest-benchmark keeps the subject's rounds; the peers' medians and the ratios are in its `extra_info`, and are printed at the end.

FASTQCOW_DATA is the folder of boot-zlib.qcow2 (`../shared/data` by default). Without it the suites run on the project's small
image, which only shows that they work.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastqcow

ROUNDS = 15
_lines: list[str] = []


@pytest.fixture(scope="session")
def zlib_image() -> Path:
    here = Path(__file__).parents[1]
    real = Path(os.environ.get("FASTQCOW_DATA") or here.parent / "shared" / "data") / "boot-zlib.qcow2"
    return real if real.exists() else here / "tests" / "data" / "demo.qcow2"


@pytest.fixture(scope="session")
def zstd_image(zlib_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same disk, compressed by qemu-img with zstd."""
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")
    path = tmp_path_factory.mktemp("zstd") / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", zlib_image, path], check=True)
    return path


@pytest.fixture(scope="session")
def raw(zlib_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same disk, uncompressed."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    fastqcow.convert(zlib_image, path)
    return path


@pytest.fixture(params=["zlib", "zstd"])
def image(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_image")
    return path


class Alternating:
    def __init__(self, benchmark: BenchmarkFixture, title: str) -> None:
        self.benchmark = benchmark
        self.title = title

    def __call__(self, peers: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> None:
        """Time the peers in turn; the first one is the subject."""
        names = list(peers)
        times: dict[str, list[float]] = {name: [] for name in names}
        if self.benchmark.disabled:
            rounds = 1

        def subject_after_peers() -> tuple[tuple[()], dict[str, Any]]:
            """pytest-benchmark calls this before each round, untimed."""
            for name in names[1:]:
                times[name].append(_timed(peers[name]))
            names[1:] = names[2:] + names[1:2]
            return (), {}

        def subject() -> None:
            times[names[0]].append(_timed(peers[names[0]]))

        for peer in peers.values():
            peer()  # warms up caches, the same for all
        self.benchmark.pedantic(subject, setup=subject_after_peers, rounds=rounds)  # type: ignore[no-untyped-call]
        if not self.benchmark.disabled:
            self.report(names[0], times)

    def report(self, subject: str, times: dict[str, list[float]]) -> None:
        for name, found in sorted(times.items()):
            ratio = statistics.median(peer / own for peer, own in zip(found, times[subject], strict=True))
            self.benchmark.extra_info[name] = {"median_s": statistics.median(found), "over_subject": ratio}
            _lines.append(
                f"{self.title:<44} {name:<28} {statistics.median(found) * 1e3:9.1f} ms  "
                f"[{min(found) * 1e3:.1f} .. {max(found) * 1e3:.1f}]  {ratio:6.2f} x {subject}"
            )


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.fixture
def alternating(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Alternating:
    return Alternating(benchmark, request.node.name.removeprefix("test_"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _lines:
        terminalreporter.section("medians of alternating runs")
        for line in _lines:
            terminalreporter.line(line)
