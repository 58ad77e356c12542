"""What the suites share: images to work on, and runs that take turns.

A machine's speed drifts, by more than what is to be measured. So peers are not timed one after the other: each round runs every
peer once, in an order that changes, and what counts is the median, over the rounds, of each peer's time over the subject's.
pytest-benchmark keeps the subject's rounds; the peers' medians and the ratios are in its `extra_info`, and are printed at the end.

FASTQCOW_DATA is the folder of boot-zlib.qcow2 (`../shared/data` by default). Without it the suites run on the project's small
image, which only shows that they work. With `--large` some also run on a disk of 640 MiB of this machine's own files, which is made
in build/bench when it is first needed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_peers import missing, qemu_nbd
from peers import Pread
from peers import readers as peers_in_process
from pytest_benchmark.fixture import BenchmarkFixture

import fastqcow

ROUNDS = 15
SLOW_SECONDS, SLOW_ROUNDS = 1.5, 3
LARGE = Path(__file__).parents[1] / "build" / "bench"
LARGE_NBYTES = 640 << 20
_lines: list[str] = []


@pytest.fixture(scope="session")
def zlib_image() -> Path:
    here = Path(__file__).parents[1]
    real = Path(os.environ.get("FASTQCOW_DATA") or here.parent / "shared" / "data") / "boot-zlib.qcow2"
    return real if real.exists() else here / "tests" / "data" / "demo.qcow2"


def compressed(source: Path, path: Path, method: str) -> Path:
    """The disk of an image, written by qemu-img with all its clusters compressed."""
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")
    fmt = "qcow2" if source.suffix == ".qcow2" else "raw"
    options = ["-m", "16", "-c", "-f", fmt, "-O", "qcow2", "-o", f"compression_type={method}"]
    subprocess.run(["qemu-img", "convert", *options, source, path.with_suffix(".part")], check=True)
    return path.with_suffix(".part").rename(path)


@pytest.fixture(scope="session")
def zstd_image(zlib_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(zlib_image, tmp_path_factory.mktemp("zstd") / "disk.qcow2", "zstd")


@pytest.fixture(scope="session")
def raw(zlib_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same disk, uncompressed."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    fastqcow.convert(zlib_image, path)
    return path


@pytest.fixture(scope="session")
def large_raw() -> Path:
    """An ext4 file system of files of this machine, in the order of their names, until there are enough."""
    path = LARGE / "disk.raw"
    if path.exists():
        return path
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if mkfs is None:
        pytest.skip("mkfs.ext4 is not installed")
    LARGE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LARGE) as folder:
        copied = 0
        for directory, names, files in os.walk("/usr"):
            names.sort()
            for name in sorted(files):
                file = Path(directory, name)
                if file.is_file() and not file.is_symlink() and copied + file.stat().st_size <= LARGE_NBYTES:
                    to = Path(folder) / file.relative_to("/")
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, to)
                    copied += file.stat().st_size
        part = path.with_suffix(".part")
        subprocess.run([mkfs, "-q", "-d", folder, part, f"{2 * LARGE_NBYTES >> 10}k"], check=True)
    return part.rename(path)


@pytest.fixture
def image(request: pytest.FixtureRequest) -> Path:
    """Each image in turn: conftest.py names them."""
    large, _, method = request.param.rpartition(" ")
    if not large:
        small: Path = request.getfixturevalue(f"{method}_image")
        return small
    path = LARGE / f"{method}.qcow2"
    return path if path.exists() else compressed(request.getfixturevalue("large_raw"), path, method)


@pytest.fixture
def raw_of(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """The file that has the bytes of an image uncompressed."""
    return lambda image: Path(request.getfixturevalue("large_raw" if image.parent == LARGE else "raw"))


@pytest.fixture
def readers() -> Iterator[Callable[[Path, Path], dict[str, Callable[[], Pread]]]]:
    """How to open an image anew by each reader there is, fastqcow first; qemu-nbd's server ends with the test."""
    with contextlib.ExitStack() as stack:

        def found(image: Path, raw: Path) -> dict[str, Callable[[], Pread]]:
            peers = peers_in_process(image, raw)
            if not missing("qemu-nbd"):
                peers["qemu-nbd"] = stack.enter_context(qemu_nbd(image))
            return peers

        yield found


class Alternating:
    def __init__(self, benchmark: BenchmarkFixture, title: str) -> None:
        self.benchmark = benchmark
        self.title = title

    def __call__(
        self, peers: dict[str, Callable[[], object]], rounds: int = ROUNDS, before: Callable[[str], object] = lambda name: None
    ) -> None:
        """Time the peers in turn; the first one is the subject. Slow ones only take part in the first rounds.

        before: called before each run of a peer, with its name, and not timed.
        """
        subject, *names = peers

        def timed(name: str) -> float:
            before(name)
            return _timed(peers[name])

        if self.benchmark.disabled:  # whether they work
            for name in (*names, subject):
                timed(name)
            self.benchmark(lambda: None)
            return
        own: list[float] = []
        times: dict[str, list[float]] = {name: [] for name in names}
        slow = {name for name in names if timed(name) > SLOW_SECONDS}  # which also warms up caches, the same for all
        timed(subject)

        def subject_after_peers() -> tuple[tuple[()], dict[str, Any]]:
            """pytest-benchmark calls this before each round, untimed."""
            for name in names:
                if name not in slow or len(own) < SLOW_ROUNDS:
                    times[name].append(timed(name))
            names.append(names.pop(0)) if names else None
            before(subject)
            return (), {}

        def run() -> None:
            own.append(_timed(peers[subject]))

        self.benchmark.pedantic(run, setup=subject_after_peers, rounds=rounds)  # type: ignore[no-untyped-call]
        self.report(subject, own, {subject: own, **times})

    def report(self, subject: str, own: list[float], times: dict[str, list[float]]) -> None:
        """A peer's ratio is the median, over the rounds, of its time over the subject's."""
        for name, found in times.items():
            ratio = statistics.median(peer / mine for peer, mine in zip(found, own, strict=False))
            self.benchmark.extra_info[name] = {
                "median_s": statistics.median(found),
                "least_s": min(found),
                "most_s": max(found),
                "over_subject": ratio,
            }
            _lines.append(
                f"{self.title:<44} {name:<28} {statistics.median(found) * 1e3:9.1f} ms  "
                f"[{min(found) * 1e3:.1f} .. {max(found) * 1e3:.1f}]  {ratio:6.2f} x {subject}"
            )


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.fixture
def alternating(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[Alternating]:
    yield Alternating(benchmark, request.node.name.removeprefix("test_"))
    gc.collect()  # some peers leave closing their files to it: see conftest.py


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _lines:
        terminalreporter.section("medians of alternating runs")
        for line in _lines:
            terminalreporter.line(line)
