"""What compression costs on an image: the same requests to it, to its bytes uncompressed, and to QEMU, in runs that take turns.

A machine's speed drifts, by more than what is to be measured. So readers are not timed one after the other: each round runs every
one of them once, in an order that changes, on the same requests, and what counts are medians over the rounds. How many requests
make a run is found out first, so that a measurement takes no longer than asked. Everything is read from the page cache, by a reader
that was just opened: what an earlier run has inflated is not there any more.

The uncompressed bytes are a file without a name, which is gone with the process whatever ends it. What conversions write has a name
for as long as they run.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fastqcow.conversion import convert
from fastqcow.cpus import available_cpus
from fastqcow.image import open_raw
from fastqcow.makeup import REQUEST_SIZES, MakeUp, make_up
from fastqcow.qemu import PeerError, Qemu, why_not
from fastqcow.replay import Latency, Run, Times, Trace, Work, replay

if TYPE_CHECKING:
    import io

    from fastqcow.header import Header
    from fastqcow.image import Image

__all__ = ["Benchmark", "Latency", "Measurement", "Result", "benchmark"]

CHUNK = 1 << 20
WINDOW = 1 << 30
CHUNKS_MAX = 1 << 18
PROBES = 4096
SCAN_SECONDS = 0.5
COPY_NBYTES_MAX = 1 << 30  # for each second that a measurement may take, and at least for one
REQUESTS_MAX = 1 << 18
MAPPED_REQUESTS_MAX = 4096
ROUNDS = 5
ROUNDS_MAX = 15
RANDOM_SIZE = 4096
THREADS_SIZE = 64 << 10
THREADS_MAX = 16
MARGIN_NBYTES = 64 << 20  # of space for temporary files that is left to others


@dataclass(frozen=True, slots=True)
class Result:
    """One reader's times.

    Attributes:
        reader: "fastqcow", "uncompressed" (the same bytes in a raw file), or a tool of QEMU by its command.
        seconds: of the median run. A conversion by qemu-img is a process, whose start counts; fastqcow's runs within this one.
        speed: over that of fastqcow, the median of the rounds: above 1, this reader is faster.
        nbytes_per_second: of the disk.
        latency: None where a reader does not tell it.
    """

    reader: str
    seconds: float
    speed: float
    nbytes_per_second: float
    latency: Latency | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One sort of work, as done by each reader.

    Attributes:
        name: "sequential", "random", "threads", "trace" or "convert".
        title: for people.
        request_nbytes: of each request; None where they differ.
        requests, nbytes: of a run; requests is 0 for a conversion.
        threads: how many read at once.
        rounds: how often each reader ran.
        inflated: bytes that fastqcow inflated for each byte that was asked for; where files of the backing chain have clusters of
            different sizes, as if they were of the mean.
        inflated_uncached: and what a reader inflates that keeps nothing from request to request, as QEMU's; None for a conversion.
    """

    name: str
    title: str
    request_nbytes: int | None
    requests: int
    nbytes: int
    threads: int
    rounds: int
    inflated: float
    inflated_uncached: float | None
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All that was found out.

    Attributes:
        filename: of the image, as it was given.
        engine: what inflates.
        qemu: version of qemu-img; None if it was not asked.
        left_out: what was not measured, and why.
    """

    filename: str
    fastqcow: str
    engine: str
    qemu: str | None
    cpus: int
    seconds: float
    make_up: MakeUp
    measurements: tuple[Measurement, ...]
    left_out: tuple[tuple[str, str], ...]


def benchmark(
    image: Image,
    *,
    seconds: float = 1.0,
    trace: Trace | None = None,
    uncompressed: bool = True,
    qemu: bool = True,
    report: Callable[[str], object] | None = None,
) -> Benchmark:
    """Look through an image and measure how fast it is read.

    Args:
        image: or a snapshot. It is opened again for each run.
        seconds: what each measurement may take, about. Of an image that holds more than a GiB for each of them a part is measured.
        trace: requests to replay.
        uncompressed: compare with a raw copy, in the directory for temporary files ($TMPDIR).
        qemu: compare with qemu-img, and qemu-nbd where libnbd is, if they are installed.
        report: called with the title of each measurement before it starts.

    Raises:
        FormatError, OSError: the image cannot be read, or temporary files not be written.
        ValueError: seconds is not a positive number, or the image is closed.
    """
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds is {seconds}; it can be more than 0, up to 3600")
    import tempfile

    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastqcow-bench-"))
        return _Bench(image, seconds, trace, directory, stack, report or (lambda _: None)).run(uncompressed, qemu)


class _Uncached(NamedTuple):
    """Bytes that were asked for, those of them that are stored, what a reader inflates for them that keeps nothing, and as what
    clusters."""

    asked: int
    stored: int
    inflated: int
    clusters: int

    @property
    def cluster_size(self) -> float:
        return self.inflated / self.clusters if self.clusters else 0.0


class _Bench:
    def __init__(
        self,
        image: Image,
        seconds: float,
        trace: Trace | None,
        directory: str,
        stack: contextlib.ExitStack,
        report: Callable[[str], object],
    ) -> None:
        self.image = image
        self.seconds = seconds
        self.trace = trace
        self.directory = directory
        self.stack = stack
        self.report = report
        self.copy_nbytes_max = int(COPY_NBYTES_MAX * max(seconds, 1))
        self.headers = _headers(image)
        self.qemu: Qemu | None = None
        self.raw: io.FileIO | None = None
        self.measurements: list[Measurement] = []
        self.left_out: dict[tuple[str, str], None] = {}

    def run(self, uncompressed: bool, qemu: bool) -> Benchmark:
        from fastqcow import __version__, build_info

        self.report("make-up")
        found = make_up(self.image)
        engines = build_info()
        deflate = self.image._options.engine if engines.libdeflate else "libz"
        used = {"libzstd" if head.compression_type == "zstd" else deflate for head in self.headers if head}
        if qemu:
            self.find_qemu()
        if self.image.size:
            self.measure_all(uncompressed)
        else:
            self.leave_out("measurements", "the disk has no bytes")
        return Benchmark(
            filename=self.image.name,
            fastqcow=__version__,
            engine=" and ".join(sorted(used)),
            qemu=self.qemu.version() if self.qemu else None,
            cpus=available_cpus(),
            seconds=self.seconds,
            make_up=found,
            measurements=tuple(self.measurements),
            left_out=tuple(self.left_out),
        )

    def leave_out(self, what: str, why: str) -> None:
        self.left_out[what, why] = None

    def find_qemu(self) -> None:
        found, why = Qemu(self.image, timeout_s=30 + 20 * self.seconds), why_not(self.image)
        if why is not None:
            self.leave_out("QEMU", why)
        elif found.img is None:
            self.leave_out("QEMU", "qemu-img is not installed")
        else:
            self.qemu = found

    # What is read

    def measure_all(self, uncompressed: bool) -> None:
        chunks, complete = self.chunks()
        start, end = _longest_run(chunks)
        end = min(end, start + self.copy_nbytes_max // CHUNK)
        stretch = (start * CHUNK, min(end * CHUNK, self.image.size)) if chunks else (0, min(self.copy_nbytes_max, self.image.size))
        whole = complete and len(chunks) * CHUNK <= self.copy_nbytes_max
        if uncompressed:
            self.copy(sorted(set(chunks if whole else range(start, end)) | self.trace_chunks()))
        for nbytes in REQUEST_SIZES:
            self.sequential(stretch, nbytes)
        self.scattered("random", f"random {_short(RANDOM_SIZE)}", stretch, RANDOM_SIZE, 1)
        threads = min(max(2 * available_cpus(), 4), THREADS_MAX)
        self.scattered("threads", f"{threads} threads, random {_short(THREADS_SIZE)}", stretch, THREADS_SIZE, threads)
        if self.trace:
            self.replay_trace(self.trace)
        if whole:
            self.convert(len(chunks) * CHUNK)
        else:
            self.leave_out("conversion", f"more than {_short(self.copy_nbytes_max)} are stored; give it more time with seconds")

    def chunks(self) -> tuple[array[int], bool]:
        """The chunks of the disk in which something is stored, and if these are all: the rest of a large disk is probed."""
        found, size = array("Q"), self.image.size
        deadline = time.monotonic() + SCAN_SECONDS

        def look(start: int, nbytes: int) -> None:
            for extent in self.image.map(start, nbytes):
                if extent.data:
                    first = max(extent.start // CHUNK, found[-1] + 1 if found else 0)
                    found.extend(range(first, (extent.start + extent.length - 1) // CHUNK + 1))

        at = 0
        while at < size and len(found) < CHUNKS_MAX and time.monotonic() < deadline:
            look(at, WINDOW)
            at += WINDOW
        step = max((size - at) // PROBES // CHUNK, 1) * CHUNK
        for probed in range(at, size, step)[:PROBES]:
            look(probed, CHUNK)
        return found, at >= size

    def trace_chunks(self) -> set[int]:
        """Where the trace reads; cut to what there may be copied."""
        found: set[int] = set()
        if self.trace:
            for number, (offset, nbytes) in enumerate(zip(self.trace.offsets, self.trace.lengths, strict=True)):
                found.update(range(offset // CHUNK, (offset + nbytes - 1) // CHUNK + 1))
                if len(found) * CHUNK > self.copy_nbytes_max:
                    self.leave_out("trace", f"all behind request {number}: there is too much to copy")
                    self.trace = Trace(self.trace.path, self.trace.offsets[: number + 1], self.trace.lengths[: number + 1])
                    break
        return found

    def copy(self, chunks: list[int]) -> None:
        """Write chunks uncompressed to a sparse file without a name."""
        import shutil
        import tempfile

        if shutil.disk_usage(self.directory).free < len(chunks) * CHUNK + MARGIN_NBYTES:
            return self.leave_out("uncompressed", f"no room for {_short(len(chunks) * CHUNK)} in {tempfile.gettempdir()}")
        self.report("raw copy")
        file = tempfile.TemporaryFile(buffering=0, dir=self.directory)  # noqa: SIM115 - for longer than this function
        raw: io.FileIO = self.stack.enter_context(file)
        try:
            os.ftruncate(raw.fileno(), self.image.size)
        except OSError as e:
            return self.leave_out("uncompressed", f"no file of that size in {tempfile.gettempdir()}: {e.strerror}")
        with self.image.reopened() as disk:
            for chunk in chunks:
                for extent in disk.map(chunk * CHUNK, CHUNK):
                    data = disk.pread(extent.length, extent.start) if extent.data else b""
                    if data.count(0) < len(data):
                        os.pwrite(raw.fileno(), data, extent.start)
        self.raw = raw
        return None

    # Who reads it

    def own(self, work: Work) -> Run:
        with self.image.reopened() as disk:
            run = replay(disk.preadv, work)
            return run._replace(clusters_inflated=disk.stats()["clusters_inflated"])

    def readers(self) -> dict[str, Callable[[Work], Run]]:
        found: dict[str, Callable[[Work], Run]] = {"fastqcow": self.own}
        if self.raw:
            found["uncompressed"] = partial(replay, partial(os.preadv, self.raw.fileno()))
        return found

    def bench(self, work: Work) -> Run:
        assert self.qemu
        assert work.stride
        return Run(self.qemu.bench(*work.stride, len(work.offsets), work.threads))

    # How it is timed

    def sequential(self, stretch: tuple[int, int], nbytes: int) -> None:
        start, end = stretch
        title = f"sequential {_short(nbytes)}"
        if end - start < nbytes:
            return self.leave_out(title, "nothing that is stored is so long")
        readers = self.readers()
        if self.qemu:
            readers["qemu-img bench"] = self.bench

        def plan(count: int) -> Work:
            return Work(range(start, end, nbytes)[:count], [nbytes] * count, (start, nbytes, nbytes))

        return self.measure("sequential", title, plan, (end - start) // nbytes, readers)

    def scattered(self, name: str, title: str, stretch: tuple[int, int], nbytes: int, threads: int) -> None:
        """Requests in random order; qemu-img bench reads the same in their order, which to who keeps nothing is no other."""
        import random

        start, end = stretch
        limit = (end - start) // nbytes
        if limit == 0:
            return self.leave_out(title, "nothing that is stored is so long")

        def plan(count: int) -> Work:
            step = limit // count * nbytes
            offsets = [start + i * step for i in range(count)]
            random.Random(count).shuffle(offsets)
            return Work(offsets, [nbytes] * count, (start, nbytes, step), threads)

        readers = self.readers()
        if self.qemu:
            readers["qemu-img bench"] = self.bench
        with contextlib.ExitStack() as stack:
            nbd = stack.enter_context(self.served()) if threads == 1 else {}
            return self.measure(name, title, plan, limit, {**readers, **nbd})

    def replay_trace(self, trace: Trace) -> None:
        def plan(count: int) -> Work:
            return Work(trace.offsets[:count], trace.lengths[:count])

        title = f"trace {os.path.basename(trace.path)}"
        with self.served() as nbd:
            self.measure("trace", title, plan, len(trace.offsets), {**self.readers(), **nbd}, rounds=1)

    @contextlib.contextmanager
    def served(self) -> Iterator[dict[str, Callable[[Work], Run]]]:
        """qemu-nbd as a reader, where it can be had."""
        with contextlib.ExitStack() as stack:
            found: dict[str, Callable[[Work], Run]] = {}
            if self.qemu:
                try:
                    client = stack.enter_context(self.qemu.served())
                    found["qemu-nbd"] = partial(replay, client.preadv)
                except PeerError as e:
                    self.leave_out("qemu-nbd", str(e))
            yield found

    def measure(
        self,
        name: str,
        title: str,
        plan: Callable[[int], Work],
        limit: int,
        readers: dict[str, Callable[[Work], Run]],
        rounds: int = ROUNDS,
    ) -> None:
        """rounds: that should fit into the time; a trace is rather replayed whole, and takes longer."""
        self.report(title)
        count = self.fit(plan, min(limit, REQUESTS_MAX), readers, self.seconds / rounds)
        work = plan(count)
        runs = {reader: partial(read, work) for reader, read in readers.items()}
        times, own = self.alternate(title, runs, self.seconds * max(ROUNDS / rounds / 2, 1), ROUNDS_MAX)
        if name == "trace" and count < limit:
            title += f", the first {count} of {limit} requests"
        same = len(set(work.lengths)) == 1 and name != "trace"
        nbytes, uncached = work.nbytes, self.uncached(zip(work.offsets[:MAPPED_REQUESTS_MAX], work.lengths, strict=False))
        self.measurements.append(
            Measurement(
                name=name,
                title=title,
                request_nbytes=work.lengths[0] if same else None,
                requests=count,
                nbytes=nbytes,
                threads=work.threads,
                rounds=len(times["fastqcow"].seconds),
                inflated=own.clusters_inflated * uncached.cluster_size / nbytes,
                inflated_uncached=uncached.inflated / uncached.asked,
                results=_results(times, nbytes),
            )
        )

    def fit(self, plan: Callable[[int], Work], limit: int, readers: dict[str, Callable[[Work], Run]], seconds: float) -> int:
        """How many requests all readers together get done in a time."""
        count = min(limit, 16)
        while True:
            work, started = plan(count), time.perf_counter()
            for name in list(readers):
                with contextlib.suppress(PeerError):  # said later, if it is still so
                    readers[name](work)
            spent = time.perf_counter() - started
            if count == limit or spent > seconds / 4:
                return max(1, min(limit, int(count * seconds / spent)))
            count = min(limit, count * 4)

    def alternate(
        self, title: str, runs: Mapping[str, Callable[[], Run]], seconds: float, rounds_max: int
    ) -> tuple[dict[str, Times], Run]:
        """Run all in turns for a time, at least once; a peer that fails is left out. Returns fastqcow's last run too."""
        times = {name: Times() for name in runs}
        order, own = list(runs), Run(0.0)
        started = time.monotonic()
        for done in range(1, rounds_max + 1):
            for name in list(order):
                try:
                    run = runs[name]()
                except PeerError as e:
                    self.leave_out(f"{name}, {title}", str(e))
                    order.remove(name)
                    del times[name]
                    continue
                times[name].add(run)
                own = run if name == "fastqcow" else own
            order = order[1:] + order[:1]
            if (time.monotonic() - started) * (done + 1) / done > seconds:
                break
        return times, own

    def convert(self, nbytes: int) -> None:
        import shutil

        title = "conversion to raw"
        if shutil.disk_usage(self.directory).free < nbytes + MARGIN_NBYTES:
            return self.leave_out(title, f"no room for {_short(nbytes)} in {os.path.dirname(self.directory)}")
        self.report(title)
        target = os.path.join(self.directory, "converted")

        def own() -> Run:
            with self.image.reopened() as disk:
                done = convert(disk, target)
            os.unlink(target)
            return Run(done.seconds, clusters_inflated=done.clusters_inflated)

        def uncompressed() -> Run:
            assert self.raw
            with open_raw(f"/dev/fd/{self.raw.fileno()}") as disk:  # opened anew, by a reader that may look for its holes
                done = convert(disk, target)
            os.unlink(target)
            return Run(done.seconds)

        def by_qemu(*options: str) -> Run:
            assert self.qemu
            run = Run(self.qemu.convert(target, *options))
            os.unlink(target)
            return run

        runs: dict[str, Callable[[], Run]] = {"fastqcow": own}
        if self.raw:
            runs["uncompressed"] = uncompressed
        if self.qemu:
            runs["qemu-img convert"] = by_qemu
            runs["qemu-img convert -m 16 -W"] = partial(by_qemu, "-m", "16", "-W")
        times, last = self.alternate(title, runs, self.seconds * 2, ROUNDS)
        uncached = self.uncached([(0, self.image.size)])
        stored = uncached.stored
        self.measurements.append(
            Measurement(
                name="convert",
                title=title,
                request_nbytes=None,
                requests=0,
                nbytes=stored,
                threads=available_cpus(),
                rounds=len(times["fastqcow"].seconds),
                inflated=last.clusters_inflated * uncached.cluster_size / stored if stored else 0.0,
                inflated_uncached=None,
                results=_results(times, stored),
            )
        )
        return None

    def uncached(self, requests: Iterable[tuple[int, int]]) -> _Uncached:
        """What requests, (offset, bytes), cost a reader that keeps nothing."""
        asked = stored = inflated = clusters = 0
        for offset, nbytes in requests:
            asked += nbytes
            for extent in self.image.map(offset, nbytes):
                stored += extent.length if extent.data else 0
                head = self.headers[extent.depth] if extent.compressed else None
                if head:
                    touched = (extent.start + extent.length - 1 >> head.cluster_bits) - (extent.start >> head.cluster_bits) + 1
                    clusters += touched
                    inflated += touched * head.cluster_size
        return _Uncached(asked, stored, inflated, clusters)


def _headers(image: Image) -> list[Header | None]:
    """Of the files of the chain, from the top down."""
    found, layer = [], image._chain
    while layer is not None:
        found.append(layer.header)
        layer = layer.backing
    return found


def _longest_run(chunks: array[int]) -> tuple[int, int]:
    """The first chunk of the longest stretch without a gap, and the one behind its last."""
    best = start = end = 0
    found = (0, 0)
    for chunk in chunks:
        start, end = (start if chunk == end else chunk), chunk + 1
        if end - start > best:
            best, found = end - start, (start, end)
    return found


def _results(times: dict[str, Times], nbytes: int) -> tuple[Result, ...]:
    own = times["fastqcow"].seconds
    found = []
    for name, each in times.items():
        seconds = statistics.median(each.seconds)
        speed = statistics.median(mine / other for mine, other in zip(own, each.seconds, strict=True))
        found.append(Result(name, seconds, speed, nbytes / seconds, each.latency()))
    return tuple(found)


def _short(nbytes: int) -> str:
    """A power of 1024 as a person writes it."""
    power = min((nbytes.bit_length() - 1) // 10, 3)
    return f"{nbytes / (1 << 10 * power):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
