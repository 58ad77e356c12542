"""Image: the file that it is, its positions, threads, and how it ends."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import pickle
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from faults import UNDER_ASAN
from images import PAYLOAD, ZERO, build, compressed_entry, data_entry, deflate, mixed, noise, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER


def many_clusters(count: int = 24) -> tuple[bytes, bytes]:
    """An image of compressed clusters side by side, with others between them, and its contents."""
    entries, payload, contents = [], b"", b""
    for i in range(count):
        if i % 6 == 4:
            entries.append(ZERO)
            contents += bytes(CLUSTER)
        elif i % 6 == 5:
            payload = payload.ljust(-(-len(payload) // CLUSTER) * CLUSTER, b"\0")
            entries.append(data_entry(AT + len(payload)))
            payload += noise(CLUSTER, i)
            contents += noise(CLUSTER, i)
        else:
            stream = deflate(text(CLUSTER, i))
            entries.append(compressed_entry(AT + len(payload), len(stream), 16))
            payload += stream
            contents += text(CLUSTER, i)
    return build(entries, payload), contents


IMAGE, CONTENTS = many_clusters()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


def test_it_is_a_raw_file(path: Path) -> None:
    with fastqcow.open(path) as image:
        assert isinstance(image, io.RawIOBase)
        assert image.readable()
        assert image.seekable()
        assert not image.writable()
        assert image.mode == "rb"
        assert len(image.read()) == image.size == len(CONTENTS)
        with pytest.raises(io.UnsupportedOperation):
            image.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            image.fileno()


def test_other_tools_take_it_for_a_file(path: Path) -> None:
    with fastqcow.open(path) as image:
        assert hashlib.file_digest(image, "sha256").digest() == hashlib.sha256(CONTENTS).digest()
        image.seek(0)
        out = io.BytesIO()
        shutil.copyfileobj(image, out)
        assert out.getvalue() == CONTENTS


def test_seek(path: Path) -> None:
    with fastqcow.open(path) as image:
        assert image.seek(10) == 10
        assert image.seek(5, os.SEEK_CUR) == 15
        assert image.seek(-5, os.SEEK_END) == image.size - 5
        assert image.read() == CONTENTS[-5:]
        assert image.seek(image.size + 100) == image.size + 100
        assert image.read(10) == b""
        for bad in ((-1,), (-1 - image.size, os.SEEK_END), (0, 9)):
            with pytest.raises(ValueError, match=r"negative|whence"):
                image.seek(*bad)
        assert image.tell() == image.size + 100


def test_pread_and_preadv_do_not_move(path: Path) -> None:
    with fastqcow.open(path) as image:
        image.seek(1234)
        image.pread(10, 0)
        image.preadv([bytearray(10)], 0)
        assert image.tell() == 1234


@pytest.mark.parametrize("offset", [0, 1, len(CONTENTS) - 1, len(CONTENTS), len(CONTENTS) + 1, 1 << 62, 1 << 70])
@pytest.mark.parametrize("nbytes", [0, 1, 100_000, 1 << 40])
def test_ends_of_the_disk(path: Path, offset: int, nbytes: int) -> None:
    with fastqcow.open(path) as image:
        assert image.pread(nbytes, offset) == CONTENTS[offset : offset + nbytes]


def test_preadv_with_no_buffers_and_empty_ones(path: Path) -> None:
    with fastqcow.open(path) as image:
        assert image.preadv([], 0) == 0
        assert image.preadv([bytearray()], 0) == 0
        first, last = bytearray(3), bytearray(4)
        assert image.preadv([bytearray(), first, bytearray(), last, bytearray()], 65530) == 7
        assert first + last == CONTENTS[65530:65537]
        assert image.preadv([bytearray(10)], len(CONTENTS)) == 0


def test_preadv_into_typed_buffers(path: Path) -> None:
    with fastqcow.open(path) as image:
        buffer = memoryview(bytearray(800)).cast("Q")
        assert image.preadv([buffer], 8) == 800
        assert buffer.tobytes() == CONTENTS[8:808]


@pytest.mark.parametrize("bad", [b"read-only", "text", 3, None])
def test_preadv_refuses_other_buffers_and_keeps_none(path: Path, bad: Any) -> None:
    good = bytearray(10)
    with fastqcow.open(path) as image, pytest.raises((TypeError, BufferError)):
        image.preadv([good, bad], 0)
    good.append(1)  # would raise BufferError if a view of it were still held


@pytest.mark.parametrize("call", [lambda i: i.pread(-1, 0), lambda i: i.pread(1, -1), lambda i: i.preadv([bytearray(1)], -1)])
def test_negative_numbers(path: Path, call: Any) -> None:
    with fastqcow.open(path) as image, pytest.raises(ValueError, match="negative"):
        call(image)


def test_more_memory_than_there_is(path: Path) -> None:
    path.write_bytes(build([0], size=1 << 55, cluster_bits=21, l1=[0] * (1 << 16)))
    with fastqcow.open(path) as image:
        assert image.size == 1 << 55
        with pytest.raises(MemoryError):
            image.pread(1 << 55, 0)
        assert image.pread(10, (1 << 55) - 4) == bytes(4)


def test_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    path.write_bytes(build([], size=0, l1=[]))
    with fastqcow.open(path) as image:
        assert image.size == 0
        assert image.read() == b""
        assert list(image.map()) == []


def test_closed(path: Path) -> None:
    image = fastqcow.open(path)
    image.close()
    image.close()
    for call in (lambda: image.pread(1, 0), image.read, image.tell, image.readable, image.map, image.info, image.stats):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert "closed" in repr(image)


def test_close_lets_running_reads_finish(path: Path) -> None:
    for _ in range(20):
        image = fastqcow.open(path)
        with ThreadPoolExecutor(4) as pool:
            reads = [pool.submit(image.pread, len(CONTENTS), 0) for _ in range(4)]
            image.close()
            for read in reads:
                try:
                    assert read.result() == CONTENTS
                except ValueError as e:
                    assert "closed" in str(e)  # noqa: PT017 - either is right


def test_many_threads_and_a_small_cache(path: Path) -> None:
    """Mixed sizes on one image; the cache has room for a few clusters only."""
    with fastqcow.open(path, cache_size=4 * CLUSTER) as image:

        def work(seed: int) -> bool:
            rng = random.Random(seed)
            for _ in range(150):
                offset, nbytes = rng.randrange(len(CONTENTS)), rng.choice((1, 512, 4096, 70_000, 1 << 20))
                if image.pread(nbytes, offset) != CONTENTS[offset : offset + nbytes]:
                    return False
            return True

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(16)))


def test_shared_position_gives_each_byte_once(path: Path) -> None:
    with fastqcow.open(path) as image:
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda _: image.read(1000), range(len(CONTENTS) // 1000 + 1)))
        assert sum(map(len, parts)) == len(CONTENTS)
        assert sorted(parts) == sorted(CONTENTS[i : i + 1000] for i in range(0, len(CONTENTS), 1000))


def test_a_cluster_is_inflated_once_for_many_small_reads(path: Path) -> None:
    with fastqcow.open(path, threads=1) as image:
        for offset in range(0, CLUSTER, 4096):
            image.pread(4096, offset)
        stats = image.stats()
        assert (stats["clusters_inflated"], stats["cache_hits"], stats["bytes_returned"]) == (1, 15, CLUSTER)
        image.pread(CLUSTER, 0)
        assert image.stats()["clusters_inflated"] == 1


def test_simultaneous_readers_inflate_a_cluster_once(path: Path) -> None:
    with fastqcow.open(path, threads=1) as image:
        gate = threading.Barrier(8)

        def read(i: int) -> bytes:
            gate.wait()
            return image.pread(1000, i * 1000)

        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(read, range(8))) == CONTENTS[:8000]
        assert image.stats()["clusters_inflated"] == 1


def test_cache_is_bounded_and_a_scan_does_not_wash_it_out(path: Path) -> None:
    with fastqcow.open(path, cache_size=4 * CLUSTER, threads=1) as image:
        image.pread(10, 0)
        image.pread(10, 5000)  # a second use: kept
        for offset in range(2 * CLUSTER, len(CONTENTS), 4096):
            image.pread(4096, offset)
        before = image.stats()["clusters_inflated"]
        image.pread(10, 9000)
        assert image.stats()["clusters_inflated"] == before
    with fastqcow.open(path, cache_size=0) as image:
        for offset in (0, 1000, 2000):
            image.pread(10, offset)
        assert image.stats()["clusters_inflated"] == 3


def test_cache_suits_the_largest_clusters_of_the_chain(tmp_path: Path) -> None:
    """Not those of the layer at the bottom, which may be a raw file."""
    stream = deflate(bytes(2 << 20))
    (tmp_path / "base.raw").write_bytes(bytes(10))
    at = PAYLOAD << 21
    top = build([compressed_entry(at, len(stream), 21)], stream.ljust(4096), cluster_bits=21, backing=("base.raw", "raw"))
    (tmp_path / "top.qcow2").write_bytes(top)
    with fastqcow.open(tmp_path / "top.qcow2", cache_size=16 << 20) as image:
        for i in range(50):
            image.pread(4096, i * 4096)
        assert image.stats()["clusters_inflated"] == 1


def test_neighbours_are_fetched_with_one_read(path: Path) -> None:
    class Counting(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            Counting.reads += 1
            return super().read(size)

    with fastqcow.open(Counting(IMAGE), threads=1) as image:
        image.pread(1, 0)  # brings in the tables
        Counting.reads = 0
        assert image.pread(4 * CLUSTER, 0) == CONTENTS[: 4 * CLUSTER]
        assert Counting.reads == 1


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": -1}, {"cache_size": -1}, {"cache_size": 1 << 70}, {"engine": "lz4"}]
)
def test_bad_options(path: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fastqcow.open(path, **options)


BAD = {
    "data beyond the end": data_entry(AT + 99 * CLUSTER),
    "a stream beyond the end": compressed_entry(AT + 99 * CLUSTER, 100, 16),
    "a bad stream": compressed_entry(AT, 5000, 16),
    "an unaligned place": data_entry(AT + 512),
}


@pytest.mark.parametrize("second", BAD)
@pytest.mark.parametrize("first", BAD)
def test_of_two_errors_the_first_is_told(tmp_path: Path, first: str, second: str) -> None:
    """Whatever is fetched and inflated in which order; also where the clusters are asked for in part."""
    stream = deflate(text(CLUSTER))
    good = compressed_entry(AT + 2 * CLUSTER, len(stream), 16)
    path = tmp_path / "disk.qcow2"
    entries = [good, data_entry(AT), BAD[first], good, BAD[second], data_entry(AT)]
    path.write_bytes(build(entries, b"\xff" * 2 * CLUSTER + stream + bytes(512)))
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 3}, {"threads": 1, "cache_size": 0}]
    for options in ways:
        for start in (0, 3 * CLUSTER - 700):
            with fastqcow.open(path, **options) as image, pytest.raises(fastqcow.FormatError) as caught:
                image.pread(6 * CLUSTER, start)
            assert caught.value.guest_off == max(2 * CLUSTER, start)
        with fastqcow.open(path, **options) as image, pytest.raises(fastqcow.FormatError) as caught:
            fastqcow.convert(image, tmp_path / "out.raw")
        assert caught.value.guest_off == 2 * CLUSTER


def test_engine_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option, and by environment where there is no option. What they make of a stream does not tell: it is the same."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([0]))

    def engine(**options: Any) -> str:
        with fastqcow.open(path, **options) as image:
            return image._options.engine

    assert (engine(), engine(engine="libz")) == ("libdeflate", "libz")
    monkeypatch.setenv("FASTQCOW_ENGINE", "libz")
    assert (engine(), engine(engine="libdeflate")) == ("libz", "libdeflate")
    monkeypatch.setenv("FASTQCOW_ENGINE", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        fastqcow.open(path)


def test_map_of_ranges(path: Path) -> None:
    with fastqcow.open(path) as image:
        whole = list(image.map())
        assert whole[0] == fastqcow.Extent(0, 4 * CLUSTER, 0, True, False, True, True, None)
        assert whole[1] == fastqcow.Extent(4 * CLUSTER, CLUSTER, 0, True, True, False, False, None)
        assert list(image.map(4 * CLUSTER, CLUSTER)) == [whole[1]]
        assert list(image.map(image.size)) == list(image.map(1 << 60)) == list(image.map(5, 0)) == []
        for bad in ((-1,), (10, -5)):
            with pytest.raises(ValueError, match="before 0"):
                image.map(*bad)


def test_map_longer_than_one_batch(tmp_path: Path) -> None:
    path = tmp_path / "many.qcow2"
    path.write_bytes(build([ZERO if i % 2 else 0 for i in range(5000)]))
    with fastqcow.open(path) as image:
        extents = list(image.map())
    assert [(e.start, e.length, e.present) for e in extents] == [(i * CLUSTER, CLUSTER, i % 2 == 1) for i in range(5000)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(UNDER_ASAN, reason="its allocator is locked for ever in a child of threads that allocate")
def test_reads_in_a_forked_child(path: Path) -> None:
    """The child has neither the pool's threads nor their locks, and reads all the same."""
    with fastqcow.open(path, threads=4) as image:
        assert image.read() == CONTENTS
        pid = os.fork()
        if pid == 0:
            os._exit(0 if image.pread(len(CONTENTS), 0) == CONTENTS else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert image.pread(len(CONTENTS), 0) == CONTENTS


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(UNDER_ASAN, reason="its allocator is locked for ever in a child of threads that allocate")
def test_fork_while_others_read(path: Path) -> None:
    with fastqcow.open(path, cache_size=2 * CLUSTER) as image:
        stop = threading.Event()

        def read_on() -> None:
            while not stop.is_set():
                image.pread(3000, CLUSTER - 1500)
                image.pread(len(CONTENTS), 0)

        readers = [threading.Thread(target=read_on) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(20)
                    same = image.pread(3000, CLUSTER - 1500) + image.pread(len(CONTENTS), 0)
                    os._exit(0 if same == CONTENTS[CLUSTER - 1500 : CLUSTER + 1500] + CONTENTS else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            for reader in readers:
                reader.join()


def test_ctrl_c_interrupts_a_long_read(tmp_path: Path) -> None:
    """A source that takes its time, and a signal in the middle."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= AT:
                time.sleep(0.02)
            return super().read(size)

    stream = deflate(bytes(CLUSTER))
    entries = [compressed_entry(AT + 3000 * i, len(stream), 16) for i in range(4000)]
    image = Slow(build(entries, b"".join([stream.ljust(3000)] * 4000)))
    with fastqcow.open(image) as disk:
        threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            disk.read()
        assert time.monotonic() - started < 3
        assert disk.pread(10, 0) == bytes(10)


def test_ctrl_c_while_another_thread_waits_for_a_slow_source(tmp_path: Path) -> None:
    """Reads take turns; whoever has his, the others stop at once."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= AT:
                time.sleep(0.4)
            return super().read(size)

    stream = deflate(bytes(CLUSTER))
    entries = [compressed_entry(AT + 70_000 * (i % 2), len(stream), 16) for i in range(400)]
    with fastqcow.open(Slow(build(entries, stream.ljust(70_000) + stream.ljust(3000))), threads=4) as disk:
        threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            disk.read()
        assert time.monotonic() - started < 4  # a read that runs is waited for


def test_no_reference_is_lost_or_kept(path: Path) -> None:
    damaged = path.with_name("damaged")
    damaged.write_bytes(build([data_entry(AT + 512)]))

    def once() -> None:
        with fastqcow.open(path) as image:
            image.pread(100, 0)
            image.preadv([bytearray(10)], 0)
            list(image.map())
        with fastqcow.open(damaged) as image, pytest.raises(fastqcow.FormatError):
            image.read()

    for _ in range(3):
        once()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        once()
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def test_errors_pickle() -> None:
    error = fastqcow.FormatError("why", path="a", guest_off=1, host_off=2, value=3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.value) == (fastqcow.FormatError, 3)
    assert str(again) == "a: why (guest offset 0x1, host offset 0x2, value 0x3)"


def test_random_images_of_mixed_contents() -> None:
    """Random cuts of random contents, plain and compressed, at every cluster size that the table allows."""
    for bits in (9, 12, 16):
        data = mixed(40 << bits, seed=bits)
        clusters = [data[i << bits : (i + 1) << bits] for i in range(40)]
        payload, entries = b"", []
        for i, cluster in enumerate(clusters):
            stream = deflate(cluster)
            if i % 3 == 0 or len(stream) >= 1 << bits:
                payload = payload.ljust(-(-len(payload) >> bits) << bits, b"\0")
                entries.append(data_entry((PAYLOAD << bits) + len(payload)))
                payload += cluster
            else:
                entries.append(compressed_entry((PAYLOAD << bits) + len(payload), len(stream), bits))
                payload += stream
        with fastqcow.open(io.BytesIO(build(entries, payload, cluster_bits=bits))) as image:
            assert image.read() == data
            for offset in range(0, len(data), max(len(data) // 50, 1)):
                assert image.pread(1 << bits, offset) == data[offset : offset + (1 << bits)]


def test_reopened_has_caches_of_its_own(demo_image: Path) -> None:
    with fastqcow.open(demo_image) as image:
        expected = image.pread(CLUSTER, 0)
        inflated = image.stats()["clusters_inflated"]
        with image.reopened() as again:
            assert again.pread(CLUSTER, 0) == expected
            assert again.stats()["clusters_inflated"] == inflated > 0
        image.close()
        with pytest.raises(ValueError, match="closed"):
            image.reopened()
