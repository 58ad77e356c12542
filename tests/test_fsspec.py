"""Images at URLs: what is fetched from a real HTTP server, and that it is what local images have."""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main
from images import build, data_entry, mixed, noise, patched, plain_and_compressed
from webserver import AT, CLUSTER, CONTENTS, IMAGE, WebServer

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from fastqcow.integrations.fsspec import BLOCK, CACHE_BLOCKS, PIECE, REQUESTS, RemoteFile, open_url

# What it costs


def test_partition_table_of_a_real_image(server: WebServer, url: str, real_data: Path) -> None:
    server.files["disk.qcow2"] = (real_data / "boot-zlib.qcow2").read_bytes()
    with fastqcow.open(url) as image, fastqcow.open(real_data / "boot-zlib.qcow2") as local:
        assert image.pread(34 * 512, 0) == local.pread(34 * 512, 0)
    assert len(server.requests) < 6
    assert server.sent < 700_000
    assert {method for method, *_ in server.requests} == {"GET"}


def test_digest_of_a_real_image(server: WebServer, url: str, real_data: Path) -> None:
    server.files["disk.qcow2"] = (real_data / "boot-zlib.qcow2").read_bytes()
    with fastqcow.open(url) as image, fastqcow.open(real_data / "boot-zlib.qcow2") as local:
        assert fastqcow.checksum(image, blkhash=True) == fastqcow.checksum(local, blkhash=True)
    assert server.sent < 1.1 * len(server.files["disk.qcow2"])


def test_digest_of_the_demo_image(server: WebServer, url: str, demo_image: Path) -> None:
    server.files["disk.qcow2"] = demo_image.read_bytes()
    with fastqcow.open(url) as image, fastqcow.open(demo_image) as local:
        assert fastqcow.checksum(image) == fastqcow.checksum(local)


@pytest.mark.parametrize("threads", [1, 4])
def test_ranges_are_fetched_at_the_same_time(server: WebServer, url: str, threads: int) -> None:
    server.files["disk.qcow2"], contents = plain_and_compressed(60, scattered=True)
    with fastqcow.open(url, threads=threads) as image:
        image.pread(1, 0)
        server.requests.clear()
        server.latency = 0.1
        assert image.read() == contents
    assert server.most_at_once > 4
    # One batch: all that it needs was asked for before anything had come.
    assert len(server.requests) > 4


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_requests_at_once_than_there_may_be(server: WebServer, url: str, threads: int) -> None:
    count = 60  # plain clusters, each far from the others
    server.files["disk.qcow2"] = build([data_entry(AT + 3 * i * CLUSTER) for i in range(count)], noise(3 * count * CLUSTER))
    with fastqcow.open(url, threads=threads) as image:
        server.latency = 0.02
        image.read()
    assert 8 <= server.most_at_once <= REQUESTS


def test_large_ranges_are_fetched_in_pieces(server: WebServer, url: str) -> None:
    server.files["disk.qcow2"] = build([data_entry(AT + i * CLUSTER) for i in range(64)], noise(64 * CLUSTER))
    with fastqcow.open(url) as image:
        assert image.read() == noise(64 * CLUSTER)
    sizes = [nbytes for *_, nbytes in server.requests]
    assert max(sizes) == PIECE
    assert sizes.count(PIECE) >= 64 * CLUSTER // PIECE - 2


def test_small_reads_fetch_blocks_once_and_ahead(server: WebServer, url: str) -> None:
    with fastqcow.open(url, cache_size=0) as image:
        for at in range(0, image.size, 5000):
            assert image.pread(5000, at) == CONTENTS[at : at + 5000]
    assert server.sent <= len(IMAGE) + BLOCK
    assert len(server.requests) < len(IMAGE) / BLOCK / 2


def test_what_comes_next_is_fetched_meanwhile(server: WebServer, url: str) -> None:
    with fastqcow.open(url) as image:
        for at in range(0, 20 * CLUSTER, CLUSTER):
            image.pread(CLUSTER, at)
        read = max(extent.offset for extent in image.map(0, 20 * CLUSTER) if extent.offset)
        deadline = time.monotonic() + 5
        while max(first + nbytes for *_, first, nbytes in server.requests if first is not None) < read + 4 * BLOCK:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("threads", [1, 3])
def test_scattered_clusters_are_fetched_as_they_are(server: WebServer, url: str, threads: int) -> None:
    """And not with the blocks around them."""
    server.files["disk.qcow2"], contents = plain_and_compressed(300, scattered=True)
    with fastqcow.open(url, threads=threads) as image:
        assert image.read() == contents
    assert server.sent < 1.3 * len(server.files["disk.qcow2"])


def test_two_streams_are_both_read_ahead(server: WebServer, url: str) -> None:
    server.files["disk.qcow2"] = build([data_entry(AT + i * CLUSTER) for i in range(160)], noise(160 * CLUSTER))
    with fastqcow.open(url) as image:
        for at in range(0, 80 * CLUSTER, 4096 * 4):
            image.pread(4096, at)
            image.pread(4096, at + 80 * CLUSTER)
    assert len(server.requests) < 40


def bytes_in_use() -> int:
    """Once they are the same for a while: the server's threads may not have let go yet of what they sent."""
    found = -1
    while True:
        gc.collect()
        now = tracemalloc.get_traced_memory()[0]
        if now == found:
            return now
        found = now
        time.sleep(0.1)


def bytes_held(file: RemoteFile) -> int:
    """Bytes of memory that are free when its blocks are dropped, whatever they refer to."""
    before = bytes_in_use()
    file._blocks.clear()
    return before - bytes_in_use()


@pytest.fixture
def eight_mib(server: WebServer) -> Iterator[RemoteFile]:
    """A file of 16 pieces, of which 20 blocks are kept, with the memory of all that is fetched counted."""
    server.files["disk"] = noise(16 * PIECE)
    with pytest.MonkeyPatch.context() as patch, open_url(server.url("disk")) as file:
        assert isinstance(file, RemoteFile)
        patch.setattr("fastqcow.integrations.fsspec.CACHE_BLOCKS", 20)
        tracemalloc.start()
        yield file
        tracemalloc.stop()


def test_blocks_kept_are_bounded(server: WebServer, eight_mib: RemoteFile) -> None:
    """In bytes of memory: one block of each piece was used last, and the rest of the piece is not kept with it."""
    assert CACHE_BLOCKS * BLOCK == 16 << 20
    data, pieces = server.files["disk"], range(15 * PIECE, -1, -PIECE)  # backwards, with gaps: nothing is fetched ahead
    for i, at in enumerate(pieces):
        eight_mib.read_ranges([(at, PIECE)], lambda: False)
        for used in (each + 2 * BLOCK for each in pieces[: i + 1]):
            assert eight_mib.read_ranges([(used, 9)], lambda: False) == [data[used : used + 9]]
    assert len(server.requests) == 1 + len(pieces)
    assert 20 * BLOCK <= bytes_held(eight_mib) < 21 * BLOCK


def test_nothing_is_kept_of_what_failed(server: WebServer, eight_mib: RemoteFile) -> None:
    """An exception refers to all that was there when it was raised."""
    eight_mib._blocks.clear()
    server.answer = lambda handler, data, span: handler.usual(data, (span[0], span[1] + 1))
    for at in range(14 * PIECE, -1, -PIECE):
        with pytest.raises(OSError, match="more than the"):
            eight_mib.read_ranges([(at, PIECE)], lambda: False)
    assert bytes_held(eight_mib) < BLOCK


# The same bytes as locally


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
def test_random_reads(server: WebServer, url: str, scattered: bool, threads: int) -> None:
    server.files["disk.qcow2"], contents = plain_and_compressed(scattered=scattered)
    rng = random.Random(5)
    with fastqcow.open(url, threads=threads, cache_size=1 << 20) as image:
        for _ in range(60):
            at, nbytes = rng.randrange(len(contents)), rng.choice((1, 5000, CLUSTER, 300_000, 2_000_000))
            assert image.pread(nbytes, at) == contents[at : at + nbytes]


def test_many_threads(url: str) -> None:
    offsets = random.Random(6).sample(range(len(CONTENTS) - 100_000), 60)
    with fastqcow.open(url, cache_size=1 << 20) as image, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda at: image.pread(100_000, at), offsets))
    assert found == [CONTENTS[at : at + 100_000] for at in offsets]


def test_small_clusters(server: WebServer, url: str, tmp_path: Path, qemu: Qemu) -> None:
    raw = mixed(3_000_320, 4)
    (tmp_path / "raw").write_bytes(raw)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", tmp_path / "raw", tmp_path / "small.qcow2")
    server.files["disk.qcow2"] = (tmp_path / "small.qcow2").read_bytes()
    with fastqcow.open(url) as image:
        assert image.read() == raw
    assert len(server.requests) < 40


def test_encrypted(server: WebServer, url: str) -> None:
    """Read in whole sectors, wherever a request begins and ends."""
    pytest.importorskip("cryptography")
    encrypted = patched(build([data_entry(AT + i * CLUSTER) for i in (2, 0, 1, 3)], noise(4 * CLUSTER)), 32, b"\0\0\0\1")
    server.files["disk.qcow2"] = encrypted
    with fastqcow.open(url, password="x") as image, fastqcow.open(io.BytesIO(encrypted), password="x") as local:
        for at, nbytes in (
            (0, 4 * CLUSTER),
            (1000, 100),
            (CLUSTER - 700, 3 * CLUSTER),
            (511, 2 * CLUSTER + 2),
            (3, 4 * CLUSTER - 5),
        ):
            buffers = [bytearray(700), bytearray(nbytes - 1), bytearray(1)]
            assert image.pread(nbytes, at) == local.pread(nbytes, at)
            assert image.preadv(buffers, at) == min(nbytes + 700, image.size - at)
            assert b"".join(buffers)[: image.size - at] == local.pread(nbytes + 700, at)


def test_overlay_and_base_at_urls(server: WebServer, url: str) -> None:
    entries = [0] * 100
    entries[5], entries[50] = data_entry(AT), data_entry(AT + CLUSTER)
    server.files["overlay"] = build(entries, noise(2 * CLUSTER, 77), backing=("base", "qcow2"))
    expected = bytearray(CONTENTS)
    expected[5 * CLUSTER : 6 * CLUSTER], expected[50 * CLUSTER : 51 * CLUSTER] = (
        noise(2 * CLUSTER, 77)[:CLUSTER],
        noise(2 * CLUSTER, 77)[CLUSTER:],
    )
    with fastqcow.open(server.url("overlay"), backing=url) as image:
        assert image.read() == expected


def test_remote_base_below_a_stream(server: WebServer, url: str) -> None:
    """A chain of both kinds is read in the way of the stricter one."""
    overlay = io.BytesIO(build([0] * 100, backing=("base", "qcow2")))
    with fastqcow.open(overlay, backing=url, threads=3) as image:
        assert image.read() == CONTENTS


def test_raw_image(server: WebServer) -> None:
    server.files["disk.raw"] = CONTENTS[:1_000_001]
    with fastqcow.open_raw(server.url("disk.raw"), whole_sectors=True) as disk:
        assert disk.read() == CONTENTS[:1_000_001].ljust(disk.size, b"\0")


def test_commands(server: WebServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", url]) == 0
    assert f"image: {url}\nfile format: qcow2" in capsys.readouterr().out
    assert main(["check", url]) in (0, 2, 3)  # the image has no refcounts
    assert main(["convert", url, str(tmp_path / "disk.raw")]) == 0
    assert (tmp_path / "disk.raw").read_bytes() == CONTENTS
    assert main(["map", url]) == 0
    capsys.readouterr()
    for arguments in (["info", server.url("none")], ["convert", server.url("none"), str(tmp_path / "other")]):
        assert main(arguments) == 1
        assert capsys.readouterr().err == f"fastqcow: {server.url('none')}: No such file or directory\n"


# The file


def test_it_is_a_file(url: str) -> None:
    with open_url(url) as file:
        assert isinstance(file, RemoteFile)
        assert file.name == file.url == url
        assert file.size == file.seek(0, os.SEEK_END) == len(IMAGE)
        assert file.read(10) == b""
        assert file.seek(-10, os.SEEK_CUR) == len(IMAGE) - 10
        assert file.read() == IMAGE[-10:]
        file.seek(3)
        assert file.read(200_000) == IMAGE[3:200_003]
        assert file.tell() == 200_003
        assert io.BufferedReader(file).read(7) == IMAGE[200_003:200_010]
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)


def test_ranges(url: str) -> None:
    file = open_url(url)
    assert isinstance(file, RemoteFile)
    rng = random.Random(8)
    for count in (1, 2, 30):
        ranges = [
            (rng.randrange(len(IMAGE) + 99), rng.choice((0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * PIECE + 7)))
            for _ in range(count)
        ]
        assert file.read_ranges(ranges, lambda: False) == [IMAGE[at : at + nbytes] for at, nbytes in ranges]


def test_empty_file(server: WebServer) -> None:
    server.files["empty"] = b""
    with pytest.raises(fastqcow.FormatError, match="the file is empty") as caught:
        fastqcow.open(server.url("empty"))
    assert caught.value.path == server.url("empty")


def test_what_a_remote_file_returns_is_checked() -> None:
    class Odd(io.BytesIO):
        def __init__(self, answer: Callable[[list[bytes]], Any]) -> None:
            super().__init__(IMAGE)
            self.answer = answer
            self.opened = False

        def read_ranges(self, ranges: list[tuple[int, int]], stopped: Callable[[], bool]) -> Any:
            found = [IMAGE[at : at + nbytes] for at, nbytes in ranges]
            return self.answer(found) if self.opened else found

    for answer, error, said in (
        (lambda found: found[:-1], ValueError, "0 answers where 1 were asked for|answers where"),
        (lambda found: [found[0] + b"x", *found[1:]], ValueError, "bytes where"),
        (lambda found: [bytearray(each) for each in found], TypeError, "not bytes"),
    ):
        file = Odd(answer)
        with fastqcow.open(file) as image:
            assert image.pread(5, 0) == CONTENTS[:5]
            file.opened = True
            with pytest.raises(error, match=f"Odd.read_ranges.*({said})"):
                image.read()
            file.opened = False
            assert image.read() == CONTENTS


# Other processes


def test_pickle(server: WebServer, url: str) -> None:
    with fastqcow.open(url, threads=3) as image:
        pickled = pickle.dumps(image)
    with pickle.loads(pickled) as other:
        assert other.name == url
        assert other.read() == CONTENTS


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork(url: str) -> None:
    with fastqcow.open(url) as image:
        image.pread(1, 0)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            os._exit(0 if image.pread(1000, 40 * CLUSTER) == CONTENTS[40 * CLUSTER :][:1000] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert image.read() == CONTENTS


# Other files that the image names


@pytest.mark.parametrize(
    "name", ["base.qcow2", "sub/base.qcow2", "/etc/passwd", "../base.qcow2", "http://host/base", "file:/etc/passwd"]
)
@pytest.mark.parametrize("rule", [None, "follow"])
def test_backing_files_are_not_opened_by_themselves(server: WebServer, name: str, rule: Any) -> None:
    server.files["overlay"] = build([0] * 100, backing=(name, "raw"))
    server.files["base.qcow2"] = server.files["sub/base.qcow2"] = IMAGE
    with pytest.raises(fastqcow.PolicyError, match=r"give the file.* with backing="):
        fastqcow.open(server.url("overlay"), backing=rule)
    assert {path for _, path, *_ in server.requests} == {"/overlay"}


def test_backing_file_that_is_given(server: WebServer, url: str, tmp_path: Path) -> None:
    server.files["overlay"] = build([0] * 100, backing=("disk.qcow2", "qcow2"))
    (tmp_path / "base").write_bytes(IMAGE)
    gate = lambda name, fmt, path: urljoin(path, name)  # noqa: E731
    for rule in (url, gate, tmp_path / "base"):
        with fastqcow.open(server.url("overlay"), backing=rule) as image:
            assert image.read() == CONTENTS
    with fastqcow.open(server.url("overlay"), backing=False) as image:
        assert image.read() == bytes(len(CONTENTS))
    (tmp_path / "overlay").write_bytes(server.files["overlay"])
    with fastqcow.open(tmp_path / "overlay", backing=url) as image, pickle.loads(pickle.dumps(image)) as other:
        assert other.read() == CONTENTS


def test_chain_that_comes_back(server: WebServer) -> None:
    server.files["overlay"] = build([0], backing=("overlay", "qcow2"))
    with pytest.raises(fastqcow.FormatError, match="comes back"):
        fastqcow.open(server.url("overlay"), backing=lambda name, fmt, path: urljoin(path, name))


# Paths and URLs


def test_path_that_looks_like_a_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WebServer) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(*url.split("/"))
    path.parent.mkdir(parents=True)
    path.write_bytes(build([0]))
    with fastqcow.open(url) as image:
        assert image.size == CLUSTER
        assert server.requests == []
        monkeypatch.chdir("/")
        with pickle.loads(pickle.dumps(image)) as other:
            assert other.size == CLUSTER


@pytest.mark.parametrize(
    "path", ["no/such", "a:b", "a/b://c", "://c", "1a://b", "json:{'x': 'a://b'}", b"http://127.0.0.1/x", Path("http://x/y")]
)
def test_what_is_no_url(path: Any) -> None:
    with pytest.raises(FileNotFoundError):
        fastqcow.open(path)


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.delitem(sys.modules, "fastqcow.integrations.fsspec")
    with pytest.raises(fastqcow.UnsupportedError, match=r"needs the package fsspec; install it, or fastqcow\[fsspec\]"):
        fastqcow.open(url)


def test_without_the_package_of_a_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(fastqcow.UnsupportedError, match="gcsfs"):
        fastqcow.open("gs://bucket/disk.qcow2")


def test_unknown_protocol() -> None:
    with pytest.raises(fastqcow.UnsupportedError, match="nonsense") as caught:
        fastqcow.open("nonsense://x")
    assert caught.value.path == "nonsense://x"


def test_local_images_need_no_fsspec(demo_image: Path) -> None:
    code = "import fastqcow, sys; fastqcow.open(sys.argv[1]).read(9); assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, demo_image], check=True)
