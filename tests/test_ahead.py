"""Read-ahead: workers inflate what a reader of small pieces will want next, and nothing else."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

import fastqcow
from capabilities import need_proc, resident
from faults import UNDER_ASAN
from images import PAYLOAD, build, compressed_entry, deflate, text

CLUSTER = 65536
COUNT = 200


@pytest.fixture(scope="module")
def made() -> tuple[bytes, bytes]:
    """An image of 200 compressed clusters, and its contents."""
    streams = [deflate(text(CLUSTER, i)) for i in range(8)]
    entries, payload = [], b""
    for i in range(COUNT):
        entries.append(compressed_entry(PAYLOAD * CLUSTER + len(payload), len(streams[i % 8]), 16))
        payload += streams[i % 8]
    return build(entries, payload), b"".join(text(CLUSTER, i % 8) for i in range(COUNT))


def test_workers_prepare_no_more_memory_than_there_is_use_for(path: Path) -> None:
    """However large the cache may become."""
    need_proc()
    before = resident()
    with fastqcow.open(path, cache_size=1 << 44, threads=2) as image:
        for cluster in range(20):
            image.pread(4096, cluster * CLUSTER)
        time.sleep(0.3)
        assert resident() - before < COUNT * CLUSTER + (48 << 20)


@pytest.fixture
def path(tmp_path: Path, made: tuple[bytes, bytes]) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(made[0])
    return path


def inflated(image: fastqcow.Image, seconds: float = 0.05) -> int:
    """Clusters inflated, once that number stays the same for a while."""
    while True:
        count = image.stats()["clusters_inflated"]
        time.sleep(seconds)
        if image.stats()["clusters_inflated"] == count:
            return count


def read_in_order(image: fastqcow.Image, start: int, end: int, step: int = 4096) -> bytes:
    return b"".join(image.pread(min(step, end - at), at) for at in range(start, end, step))


@pytest.mark.parametrize("step", [512, 4096, 65_536, 100_000, 300_000])
@pytest.mark.parametrize("threads", [2, 4])
def test_each_cluster_is_inflated_once(path: Path, made: tuple[bytes, bytes], step: int, threads: int) -> None:
    with fastqcow.open(path, threads=threads) as image:
        assert read_in_order(image, 0, image.size, step) == made[1]
        assert inflated(image) == COUNT


def test_what_comes_next_is_there_already(path: Path) -> None:
    with fastqcow.open(path, threads=2) as image:
        read_in_order(image, 0, 8 * CLUSTER)
        count = inflated(image)
        assert 8 < count <= 8 + 1 + 16  # the window is twice as long as what was read
        hits = image.stats()["cache_hits"]
        image.pread(512, 8 * CLUSTER)
        assert (inflated(image), image.stats()["cache_hits"]) == (count, hits + 1)


def test_small_gaps_are_no_jumps(path: Path) -> None:
    with fastqcow.open(path, threads=2) as image:
        for i in range(0, 16, 2):
            image.pread(CLUSTER, i * CLUSTER)
        assert inflated(image) > 16


@pytest.mark.parametrize("nbytes", [4096, 16_384, CLUSTER])
def test_jumps_inflate_nothing_more(path: Path, nbytes: int) -> None:
    with fastqcow.open(path, threads=4) as image:
        for i in range(50):
            image.pread(nbytes, i * 37 % COUNT * CLUSTER)
        assert inflated(image) == 50


def read_scattered(image: fastqcow.Image, clusters: Iterable[int]) -> list[int]:
    """Read a little of each cluster, and wait for what that brings along: how many clusters each read has had inflated."""
    counts = [0]
    for cluster in clusters:
        image.pread(4096, cluster * CLUSTER)
        counts.append(inflated(image, seconds=0.03))
    return [after - before for before, after in pairwise(counts)]


def test_neighbours_of_scattered_reads(path: Path) -> None:
    """Where reads come back near earlier ones, what lies behind a cluster that had to be inflated is inflated too."""
    starts = (0, 50, 100, 150)
    with fastqcow.open(path, threads=2) as image:
        assert read_scattered(image, starts) == [1, 1, 1, 1]
        later = read_scattered(image, [start + i for i in (1, 2, 3) for start in starts])
        assert later.count(0) >= 6
        assert sum(later) <= 6 * len(starts)  # three are read of each, and up to three more inflated


def test_neighbours_that_are_not_read(path: Path) -> None:
    """What was earned before is used up, and then nothing more is inflated in vain."""
    with fastqcow.open(path, threads=2) as image:
        read_scattered(image, (0, 20, 40, 1, 21, 41, 2, 22, 42))
        assert read_scattered(image, range(50, 150, 5))[-8:] == [1] * 8


def test_small_clusters_are_not_read_ahead(tmp_path: Path) -> None:
    """They are fetched together, and inflated in less time than it takes to hand them over."""
    data = text(4096)
    stream = deflate(data).ljust(4096, b"\0")
    path = tmp_path / "small.qcow2"
    path.write_bytes(build([compressed_entry(PAYLOAD * 4096, len(deflate(data)), 12)] * 100, stream, cluster_bits=12))
    with fastqcow.open(path, threads=4) as image:
        assert read_in_order(image, 0, 50 * 4096) == data * 50
        assert inflated(image) == 1  # all are the same one


def test_as_many_streams_as_there_can_be(path: Path, made: tuple[bytes, bytes]) -> None:
    """Their windows share the cache: what was inflated for one is not pushed out by another."""
    with fastqcow.open(path, threads=16) as image:
        for at in range(0, 25 * CLUSTER, CLUSTER):
            for start in range(0, 200 * CLUSTER, 25 * CLUSTER):
                assert image.pread(CLUSTER, start + at) == made[1][start + at : start + at + CLUSTER]
        assert inflated(image) <= 1.2 * COUNT


def test_several_streams(path: Path, made: tuple[bytes, bytes]) -> None:
    with fastqcow.open(path, threads=2) as image:
        for at in range(0, 20 * CLUSTER, 8192):
            for start in (0, 60 * CLUSTER, 120 * CLUSTER):
                assert image.pread(8192, start + at) == made[1][start + at : start + at + 8192]
        assert 60 < inflated(image) <= 3 * (20 + 41)


def test_window_is_bounded_by_the_cache(path: Path) -> None:
    with fastqcow.open(path, threads=2, cache_size=64 * CLUSTER) as image:
        read_in_order(image, 0, 100 * CLUSTER)
        assert 100 <= inflated(image) <= 100 + 16


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 4, "cache_size": 0}, {"threads": 4, "cache_size": 3 * CLUSTER}])
def test_there_is_none(path: Path, options: dict[str, int]) -> None:
    with fastqcow.open(path, **options) as image:  # type: ignore[arg-type]
        for i in range(20):
            image.pread(CLUSTER, i * CLUSTER)
        assert inflated(image) == 20


def test_file_objects_are_not_read_ahead(made: tuple[bytes, bytes]) -> None:
    """They are read in the order of their reader's wishes, and when it has some."""
    with fastqcow.open(io.BytesIO(made[0]), threads=4) as image:
        read_in_order(image, 0, 20 * CLUSTER)
        assert inflated(image) == 20


def test_damage_is_met_where_it_is(path: Path, made: tuple[bytes, bytes]) -> None:
    """Not before, although workers come there first."""
    with path.open("r+b") as f:
        f.seek(PAYLOAD * CLUSTER + sum(len(deflate(text(CLUSTER, i % 8))) for i in range(20)))
        f.write(b"\xff" * 8)  # a block of a type that does not exist
    with fastqcow.open(path, threads=2) as image:
        assert read_in_order(image, 0, 20 * CLUSTER) == made[1][: 20 * CLUSTER]
        for nbytes in (4096, CLUSTER):
            with pytest.raises(fastqcow.FormatError) as caught:
                image.pread(nbytes, 20 * CLUSTER)
            assert caught.value.guest_off == 20 * CLUSTER
        assert read_in_order(image, 21 * CLUSTER, 30 * CLUSTER) == made[1][21 * CLUSTER : 30 * CLUSTER]


def test_close_while_workers_inflate(path: Path) -> None:
    for i in range(1, 30):
        with fastqcow.open(path, threads=4) as image:
            read_in_order(image, 0, i * CLUSTER // 2)


@pytest.mark.skipif(UNDER_ASAN, reason="its allocator is locked for ever in a child of threads that allocate")
def test_fork_while_workers_inflate(path: Path, made: tuple[bytes, bytes]) -> None:
    for i in range(1, 15):
        with fastqcow.open(path, threads=3) as image:
            read_in_order(image, 0, i * CLUSTER)
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                same = read_in_order(image, 0, 40 * CLUSTER) == made[1][: 40 * CLUSTER]
                image.close()
                os._exit(0 if same else 1)
            read_in_order(image, i * CLUSTER, 20 * CLUSTER)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(UNDER_ASAN, reason="its allocator is locked for ever in a child of threads that allocate")
def test_fork_while_others_open_and_close(path: Path) -> None:
    """Images that never had a worker are closed by a child all the same."""
    script = f"""
import os, signal, threading, fastqcow
stop = threading.Event()
def work():
    while not stop.is_set():
        fastqcow.open({str(path)!r}, threads=1).close()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
failed = 0
for _ in range(200):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        fastqcow.open({str(path)!r}, threads=1).close()
        os._exit(0)
    failed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
stop.set()
for thread in threads: thread.join()
raise SystemExit(failed)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False)
    assert done.returncode == 0


def test_many_threads_of_one_image(path: Path, made: tuple[bytes, bytes]) -> None:
    wrong: list[int] = []
    with fastqcow.open(path, threads=3, cache_size=40 * CLUSTER) as image:

        def stroll(step: int) -> None:
            for at in range(0, image.size, step):
                if image.pread(step, at) != made[1][at : at + step]:
                    wrong.append(at)

        threads = [threading.Thread(target=stroll, args=(step,)) for step in (3000, 4096, 65_536, 70_000, 200_000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_copying_as_a_file(path: Path, made: tuple[bytes, bytes]) -> None:
    target = io.BytesIO()
    with fastqcow.open(path, threads=2) as image:
        shutil.copyfileobj(image, target)
        assert inflated(image) == COUNT
    assert target.getvalue() == made[1]
