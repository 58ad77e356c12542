"""Workload: a whole compressed disk hashed, and searched for a byte string, in chunks of 16 MiB: in one process that reads them one
after the other, and by Dask's clusters of 1, 2 and 4 worker processes on this machine, of one thread each.

The clusters run all the time, and have computed before. What it costs to start one is measured apart: until its workers have
computed something.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alternating import Alternating

import fastqcow

dask: Any = pytest.importorskip("dask")
distributed: Any = pytest.importorskip("distributed")

CHUNK = 16 << 20
NEEDLE = b"GNU/Linux"
Found = tuple[bytes, int]  # a chunk's digest, and how often the needle is in it


@pytest.fixture
def worker_counts(alternating: Alternating) -> tuple[int, ...]:
    """Each worker takes a second to start: two are enough to see that they work."""
    return (1, 2) if alternating.benchmark.disabled else (1, 2, 4)


def name_of(workers: int) -> str:
    return f"Dask, {workers} worker{'s' * (workers > 1)}"


@contextlib.contextmanager
def cluster(workers: int) -> Any:
    """The client of a new one."""
    options = {"n_workers": workers, "threads_per_worker": 1, "processes": True, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options) as started, distributed.Client(started, set_as_default=False) as client:
        yield client


def examine(chunk: Any) -> Found:
    return hashlib.sha256(chunk).digest(), len(re.findall(NEEDLE, chunk))


def in_one_process(image: Path, threads: int | None = None) -> list[Found]:
    with fastqcow.open(image, threads=threads) as disk:
        return [examine(disk.pread(CHUNK, guest_off)) for guest_off in range(0, disk.size, CHUNK)]


def by_dask(client: Any, image: Path) -> list[Found]:
    from fastqcow.integrations.dask import to_array

    with fastqcow.open(image) as disk:
        array: Any = to_array(disk, CHUNK)
    chunks = array.to_delayed()
    found: list[Found] = client.gather(client.compute([dask.delayed(examine)(chunk) for chunk in chunks]))
    return found


def test_workers(alternating: Alternating, worker_counts: tuple[int, ...], zlib_image: Path) -> None:
    digests: set[tuple[Found, ...]] = set()

    def noting(examined: Callable[[], list[Found]]) -> Callable[[], object]:
        return lambda: digests.add(tuple(examined()))

    with contextlib.ExitStack() as running:
        peers = {"one process": noting(lambda: in_one_process(zlib_image))}
        peers["one process, 1 thread"] = noting(lambda: in_one_process(zlib_image, 1))
        for workers in worker_counts:
            client = running.enter_context(cluster(workers))
            peers[name_of(workers)] = noting(lambda client=client: by_dask(client, zlib_image))  # type: ignore[misc]
        alternating(peers, rounds=7)
    assert len(digests) == 1


def test_workers_start(alternating: Alternating, worker_counts: tuple[int, ...]) -> None:
    with contextlib.ExitStack() as running:

        def start(workers: int) -> object:
            client = running.enter_context(cluster(workers))
            return client.gather(client.map(abs, range(workers)))

        peers: dict[str, Callable[[], object]] = {name_of(n): lambda n=n: start(n) for n in worker_counts}  # type: ignore[misc]
        alternating(peers, rounds=5, before=lambda name: running.close())
