"""Requests run against a reader, and what is kept of the times that they took."""

from __future__ import annotations

import math
import os
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastqcow._types import Path

__all__ = ["OCTAVE", "Latency", "Run", "Times", "Trace", "Work", "read_trace", "replay", "time_text"]

OCTAVE = 8
TRACE_REQUESTS_MAX = 1 << 20
TRACE_LINE_NBYTES_MAX = 64
TRACE_REQUEST_NBYTES_MAX = 32 << 20  # as much as QEMU's NBD server takes


@dataclass(frozen=True, slots=True)
class Latency:
    """How long single reads took, over all rounds, in nanoseconds.

    Attributes:
        median_ns, p90_ns, p99_ns: what 50, 90 and 99 % of them took at most, to within a tenth; longest_ns is exact.
        histogram: pairs of a bin and how many are in it: bin b holds those from 2**(b/8) up to 2**((b+1)/8) ns.
    """

    median_ns: float
    p90_ns: float
    p99_ns: float
    longest_ns: int
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Work:
    """The requests of one run, in bytes. stride: start, length, step, if they are the same distance apart."""

    offsets: Sequence[int]
    lengths: Sequence[int]
    stride: tuple[int, int, int] | None = None
    threads: int = 1

    @property
    def nbytes(self) -> int:
        return sum(self.lengths)


class Run(NamedTuple):
    """latencies_ns: of each request, where one thread reads. clusters_inflated: where the reader tells."""

    seconds: float
    latencies_ns: Sequence[int] = ()
    clusters_inflated: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded requests in order: where each starts and its length, in bytes."""

    path: str
    offsets: array[int]
    lengths: array[int]


@dataclass(slots=True)
class Times:
    """What is kept of a reader's runs: of its latencies a histogram."""

    seconds: list[float] = field(default_factory=list)
    histogram: Counter[int] = field(default_factory=Counter)
    longest_ns: int = 0

    def add(self, run: Run) -> None:
        self.seconds.append(run.seconds)
        self.histogram.update(int(math.log2(ns) * OCTAVE) if ns > 1 else 0 for ns in run.latencies_ns)
        self.longest_ns = max(self.longest_ns, max(run.latencies_ns, default=0))

    def latency(self) -> Latency | None:
        if not self.histogram:
            return None
        return Latency(
            self._up_to(0.5), self._up_to(0.9), self._up_to(0.99), self.longest_ns, tuple(sorted(self.histogram.items()))
        )

    def _up_to(self, share: float) -> float:
        left = share * self.histogram.total()
        bins = iter(sorted(self.histogram.items()))
        while left > 0:
            number, count = next(bins)
            left -= count
        return min(float(2 ** ((number + 1) / OCTAVE)), float(self.longest_ns))


def read_trace(path: Path, size: int) -> Trace:
    """Read a trace: a line for each request, with its offset and its length, in decimal bytes.

    Args:
        size: of the disk, in bytes, within which requests have to lie.

    Raises:
        ValueError: a line that is none, a request that no disk of this size gets, none at all, or too many.
        OSError: the file cannot be read.
    """
    name = os.fsdecode(path)
    trace = Trace(name, array("Q"), array("Q"))
    with open(path, "rb") as f:
        for number in range(1, TRACE_REQUESTS_MAX + 2):
            line = f.readline(TRACE_LINE_NBYTES_MAX)
            if not line:
                break
            words = line.split()
            if len(words) != 2 or not (words[0].isdigit() and words[1].isdigit()):
                raise ValueError(f"{name}: line {number} is not an offset and a length in decimal bytes")
            offset, nbytes = map(int, words)
            if not 0 < nbytes <= TRACE_REQUEST_NBYTES_MAX:
                raise ValueError(f"{name}: line {number} has a length of {nbytes} bytes; 1 to {TRACE_REQUEST_NBYTES_MAX} can be")
            if offset + nbytes > size:
                raise ValueError(f"{name}: line {number} ends at {offset + nbytes}, and the disk at {size}")
            trace.offsets.append(offset)
            trace.lengths.append(nbytes)
        else:
            raise ValueError(f"{name}: there are more than {TRACE_REQUESTS_MAX} requests")
    if not trace.offsets:
        raise ValueError(f"{name}: there are no requests")
    return trace


def replay(read: Callable[[list[memoryview], int], object], work: Work) -> Run:
    """Run all requests by `read(buffers, offset)`, from as many threads as the work says."""
    if work.threads > 1:
        return _by_threads(read, work)
    buffers = _buffers(work.lengths)
    clock = time.perf_counter_ns
    stamps = array("Q", bytes(8 * (len(work.offsets) + 1)))
    stamps[0] = clock()
    for number, (offset, nbytes) in enumerate(zip(work.offsets, work.lengths, strict=True), 1):
        read(buffers[nbytes], offset)
        stamps[number] = clock()
    return Run(max(stamps[-1] - stamps[0], 1) / 1e9, [end - start for start, end in pairwise(stamps)])


def _buffers(lengths: Sequence[int]) -> dict[int, list[memoryview]]:
    """For each length a buffer, all in the same memory."""
    room = memoryview(bytearray(max(lengths)))
    return {nbytes: [room[:nbytes]] for nbytes in set(lengths)}


def _by_threads(read: Callable[[list[memoryview], int], object], work: Work) -> Run:
    """Whatever ends it early, be it Ctrl-C while threads are started, ends the threads: a process waits for them."""
    go = threading.Event()
    errors: list[BaseException] = []

    def share(number: int) -> None:
        try:
            buffers = _buffers(work.lengths)
            go.wait()
            for offset, nbytes in zip(work.offsets[number :: work.threads], work.lengths[number :: work.threads], strict=True):
                if errors:
                    return
                read(buffers[nbytes], offset)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=share, args=(number,)) for number in range(work.threads)]
    try:
        for thread in threads:
            thread.start()
        started = time.perf_counter()
        go.set()
        for thread in threads:
            thread.join()
    except BaseException as e:
        errors.append(e)
        go.set()
        raise
    if errors:
        raise errors[0]
    return Run(max(time.perf_counter() - started, 1e-9))


def time_text(ns: float) -> str:
    """Nanoseconds for people: three digits and a unit."""
    for unit, limit in (("ns", 1e3), ("us", 1e6), ("ms", 1e9)):
        if ns < 0.9995 * limit:
            return f"{ns / limit * 1e3:.3g} {unit}"
    return f"{ns / 1e9:.3g} s"
