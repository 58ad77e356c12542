"""Workload: reads of 4 KiB anywhere in compressed clusters: each cluster for the first time, and again when it is cached.

The limit for the first time: one bare inflation of each of these clusters. Cached: os.pread of the raw file.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

from alternating import Alternating
from peers import Pread, Streams

import fastqcow

READS = 20_000


def some(streams: Streams) -> list[int]:
    """Clusters that fit into the default cache, in no order."""
    chosen = sorted(streams.by_cluster)
    random.Random(1).shuffle(chosen)
    return chosen[:300]


Readers = Callable[[Path, Path], dict[str, Callable[[], Pread]]]


def test_first_time(alternating: Alternating, image: Path, raw_of: Callable[[Path], Path], readers: Readers) -> None:
    streams = Streams(image)
    clusters = some(streams)

    def read(opened: Callable[[], Pread]) -> Callable[[], object]:
        def run() -> None:
            pread = opened()
            for i, cluster in enumerate(clusters):
                pread(4096, cluster * streams.cluster_size + i % 16 * 4096)

        return run

    peers = {name: read(opened) for name, opened in readers(image, raw_of(image)).items()}
    peers["limit, 1 thread"] = streams.inflate(clusters)
    alternating(peers)


def cached(pread: Pread, streams: Streams, clusters: list[int], count: int = READS) -> Callable[[], object]:
    """Reads clusters that have all been read before."""
    rng = random.Random(2)
    size = streams.cluster_size
    offsets = [rng.choice(clusters) * size + rng.randrange(size // 4096) * 4096 for _ in range(count)]
    for cluster in clusters * 2:
        pread(4096, cluster * size)

    def run() -> None:
        for offset in offsets:
            pread(4096, offset)

    return run


def test_cached(alternating: Alternating, zlib_image: Path, raw: Path, readers: Readers) -> None:
    streams = Streams(zlib_image)
    clusters = some(streams)
    keep_nothing = ("libqcow", "qemu-nbd")
    preads = {name: opened() for name, opened in readers(zlib_image, raw).items() if name not in keep_nothing}
    alternating({name: cached(pread, streams, clusters) for name, pread in preads.items()})


def test_cached_by_many_threads(alternating: Alternating, zlib_image: Path) -> None:
    """The same number of reads, shared out."""
    streams = Streams(zlib_image)
    clusters = some(streams)
    image = fastqcow.open(zlib_image)

    def share_out(count: int) -> Callable[[], object]:
        reads = [cached(image.pread, streams, clusters, READS // count) for _ in range(count)]

        def run() -> None:
            threads = [threading.Thread(target=read) for read in reads]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return run

    alternating({f"{count} threads": share_out(count) for count in (8, 2, 1)})
