"""Images at URLs: over a real HTTP server that counts and misbehaves, and by other file systems of fsspec."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, mixed, noise, patched, text
from webserver import WebServer, web_server

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from fsspec.asyn import AsyncFileSystem  # noqa: E402

from fastqcow.integrations.fsspec import BLOCK, CACHE_BLOCKS, PIECE, REQUESTS, RemoteFile, open_file, open_url  # noqa: E402

CLUSTER = 65536
AT = PAYLOAD * CLUSTER


def made(clusters: int = 100, *, scattered: bool = False) -> tuple[bytes, bytes]:
    """An image of compressed and plain clusters, in the order of the disk or not, and its contents."""
    order = list(range(clusters))
    if scattered:
        random.Random(3).shuffle(order)
    contents = b"".join((text, noise)[i % 3 == 0](CLUSTER, i) for i in range(clusters))
    entries, payload = [0] * clusters, bytearray()
    for i in order:
        cluster = contents[i * CLUSTER : (i + 1) * CLUSTER]
        if i % 3 == 0:
            payload += bytes(-len(payload) % CLUSTER)
            entries[i] = data_entry(AT + len(payload))
            payload += cluster
        else:
            stream = deflate(cluster)
            entries[i] = compressed_entry(AT + len(payload), len(stream), 16)
            payload += stream
    return build(entries, bytes(payload)), contents


IMAGE, CONTENTS = made()


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as server:
        server.files["disk.qcow2"] = IMAGE
        yield server


@pytest.fixture
def url(server: WebServer) -> str:
    return server.url("disk.qcow2")


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
    server.files["disk.qcow2"], contents = made(60, scattered=True)
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
    server.files["disk.qcow2"], contents = made(300, scattered=True)
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


def test_blocks_kept_are_bounded(server: WebServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CACHE_BLOCKS * BLOCK == 16 << 20
    monkeypatch.setattr("fastqcow.integrations.fsspec.CACHE_BLOCKS", 5)
    file = open_url(url)
    assert isinstance(file, RemoteFile)
    with fastqcow.open(file) as image:
        for at in random.Random(1).sample(range(0, image.size - 100, 777), 200):
            assert image.pread(100, at) == CONTENTS[at : at + 100]
            assert len(file._blocks) <= 5


# The same bytes as locally


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])
def test_random_reads(server: WebServer, url: str, scattered: bool, threads: int) -> None:
    server.files["disk.qcow2"], contents = made(scattered=scattered)
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


# Servers that fail


def refused(url: str, kind: type[Exception] = OSError) -> OSError:
    """Opening the URL fails; the error."""
    with pytest.raises(kind) as caught:
        fastqcow.open(url)
    assert isinstance(caught.value, OSError)
    assert caught.value.filename == url
    return caught.value


@pytest.mark.parametrize(
    ("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError), (500, OSError)]
)
def test_status(server: WebServer, url: str, status: int, kind: type[Exception]) -> None:
    server.answer = lambda handler, data, span: handler.reply(status)
    error = refused(url, kind)
    assert status == 404 or str(status) in str(error)


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/disk.qcow2"
        assert refused(url).errno == errno.ECONNREFUSED


def test_server_without_ranges(server: WebServer, url: str) -> None:
    server.files["disk.qcow2"] = bytes(64 << 20)
    server.answer = lambda handler, data, span: handler.reply(200, data)
    error = refused(url)
    assert "does not send ranges" in str(error)
    assert "simplecache::" in str(error)
    assert server.sent == 0  # it never came to the end of the file


def test_server_that_stops_to_send_ranges(server: WebServer, url: str) -> None:
    with fastqcow.open(url) as image:
        server.answer = lambda handler, data, span: handler.reply(200, data)
        with pytest.raises(OSError, match="does not send ranges") as caught:
            image.read()
        assert caught.value.filename == url
        server.answer = None
        assert image.read() == CONTENTS


def cut(handler: Any, data: bytes, span: tuple[int, int]) -> None:
    part = data[span[0] : sum(span)]
    said = {"Content-Range": f"bytes {span[0]}-{span[0] + len(part) - 1}/{len(data)}", "Content-Length": str(len(part))}
    handler.reply(206, part[: len(part) // 2], said)
    handler.close_connection = True


def say(total: Callable[[int], int | str], more: int = 0, shift: int = 0) -> Callable[[Any, bytes, tuple[int, int]], None]:
    """A server that says something else of the length or the range, or sends more or less."""

    def answer(handler: Any, data: bytes, span: tuple[int, int]) -> None:
        part = data[span[0] : sum(span)]
        last = span[0] + len(part) - 1
        part = part[:more] if more < 0 else part + bytes(more)
        handler.reply(206, part, {"Content-Range": f"bytes {span[0] + shift}-{last + shift}/{total(len(data))}"})

    return answer


def same(n: int) -> int:
    return n


FAILURES = {
    "cut": (cut, "ClientPayloadError"),
    "server error": (lambda handler, data, span: handler.reply(503), "the server answers 503"),
    "gone": (lambda handler, data, span: handler.reply(404), "No such file"),
    "longer than asked": (say(same, more=100), "more than the"),
    "shorter than asked": (say(same, more=-1), "of the"),
    "another place": (say(same, shift=512), "Content-Range"),
    "no Content-Range": (lambda handler, data, span: handler.reply(206, data[span[0] : sum(span)]), "Content-Range ''"),
    "nonsense": (
        lambda handler, data, span: handler.reply(206, b"", {"Content-Range": "bytes a-b/c"}),
        "Content-Range 'bytes a-b/c'",
    ),
    "length not said": (say(lambda n: "*"), "Content-Range"),
    "now longer": (say(lambda n: n + 1), "the file has changed"),
    "now shorter": (say(lambda n: n - 1), "the file has changed"),
    "hangs up": (lambda handler, data, span: handler.hang_up(), "ServerDisconnected"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [100, len(CONTENTS)], ids=["part", "whole"])
def test_failure_while_reading(server: WebServer, url: str, name: str, threads: int, nbytes: int) -> None:
    """An error that names the URL, and where it is about bytes their place; nothing is kept of it, and the next read is fine."""
    answer, said = FAILURES[name]
    with fastqcow.open(url, threads=threads) as image:
        server.answer = answer
        with pytest.raises(OSError, match=said) as caught:
            image.pread(nbytes, 30 * CLUSTER if nbytes == 100 else 0)
        assert caught.value.filename == url
        assert "changed" in said or "Content-Range" in said or "host offset 0x" in str(caught.value)
        server.answer = None
        assert image.read() == CONTENTS


def test_length_that_is_too_large(server: WebServer, url: str) -> None:
    """From the start: what is missing is met where it is missing."""
    server.answer = say(lambda n: n + 10 * CLUSTER)
    server.files["disk.qcow2"] = IMAGE[: -20 * CLUSTER]
    with fastqcow.open(url) as image:
        assert image.pread(CLUSTER, 0) == CONTENTS[:CLUSTER]
        with pytest.raises(OSError, match=r"host offset 0x") as caught:
            image.read()
        assert caught.value.filename == url


def test_length_that_is_too_small(server: WebServer, url: str) -> None:
    """The file is taken for one that was cut there."""
    size = len(IMAGE) - 20 * CLUSTER

    def answer(handler: Any, data: bytes, span: tuple[int, int]) -> None:
        handler.usual(data[:size], span)

    server.answer = answer
    with fastqcow.open(url) as image:
        assert image.pread(CLUSTER, 0) == CONTENTS[:CLUSTER]
        with pytest.raises(fastqcow.FormatError, match="end of the file") as caught:
            image.read()
        assert caught.value.path == url
        assert caught.value.host_off


def test_redirection(server: WebServer, url: str) -> None:
    def answer(handler: Any, data: bytes, span: tuple[int, int]) -> None:
        if handler.path == "/old":
            handler.reply(302, b"", {"Location": "/disk.qcow2"})
        else:
            handler.usual(data, span)

    server.files["old"] = b""
    server.answer = answer
    with fastqcow.open(server.url("old")) as image:
        assert image.read() == CONTENTS


def test_options_of_the_file_system(server: WebServer, url: str) -> None:
    def answer(handler: Any, data: bytes, span: tuple[int, int]) -> None:
        if handler.headers.get("Authorization") == "Bearer x":
            handler.usual(data, span)
        else:
            handler.reply(401)

    server.answer = answer
    refused(url, PermissionError)
    with fastqcow.open(open_url(url, headers={"Authorization": "Bearer x"})) as image:
        assert image.read() == CONTENTS
        assert image.name == url
        with pickle.loads(pickle.dumps(image)) as other:
            assert other.read() == CONTENTS


# Ctrl-C


def hang(server: WebServer) -> Callable[[Any, bytes, Any], None]:
    def answer(handler: Any, data: bytes, span: Any) -> None:
        server.released.wait(30)

    return answer


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [100, len(CONTENTS)], ids=["part", "whole"])
def test_ctrl_c(server: WebServer, url: str, threads: int, nbytes: int) -> None:
    """Also where all threads wait for a server that never answers."""
    with fastqcow.open(url, threads=threads) as image:
        server.answer = hang(server)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            image.pread(nbytes, 30 * CLUSTER if nbytes == 100 else 0)
        assert time.monotonic() - started < 3
        timer.join()
        server.answer = None
        assert image.pread(1000, 60 * CLUSTER) == CONTENTS[60 * CLUSTER :][:1000]


def test_ctrl_c_while_one_thread_hangs(server: WebServer, url: str) -> None:
    """The calling thread has done its part, and waits for another one."""

    def answer(handler: Any, data: bytes, span: tuple[int, int]) -> None:
        if span[0] > AT + 4 * CLUSTER:
            server.released.wait(30)
        handler.usual(data, span)

    with fastqcow.open(url, threads=4) as image:
        image.pread(1, 0)
        server.answer = answer
        timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            image.read()
        assert time.monotonic() - started < 3
        timer.join()


def test_ctrl_c_while_opening(server: WebServer, url: str) -> None:
    server.answer = hang(server)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fastqcow.open(url)
    assert time.monotonic() - started < 3
    timer.join()


def test_one_who_stops_does_not_stop_others(server: WebServer, url: str) -> None:
    """Both wait for the same block."""
    file = open_url(url)
    assert isinstance(file, RemoteFile)
    server.answer = hang(server)
    stopped = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(file.read_ranges, [(40 * CLUSTER, 100)], stopped.is_set)
        while len(server.requests) < 2:
            time.sleep(0.01)
        other = pool.submit(file.read_ranges, [(40 * CLUSTER, 100)], lambda: False)
        time.sleep(0.1)
        server.answer = None
        stopped.set()
        with pytest.raises(OSError, match=os.strerror(errno.ECANCELED)):
            one.result(5)
        assert other.result(5) == [IMAGE[40 * CLUSTER : 40 * CLUSTER + 100]]
    assert len(server.requests) == 3


def test_nothing_is_said_at_the_end_of_a_process(server: WebServer, url: str) -> None:
    """Where blocks are still being fetched."""
    server.latency = 0.2
    code = "import fastqcow, sys; image = fastqcow.open(sys.argv[1]); [image.pread(65536, at << 16) for at in range(5)]"
    for end in ("", "; image.close()", "; sys.exit(3)"):
        done = subprocess.run([sys.executable, "-c", code + end, url], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (3 if "exit" in end else 0, "", "")


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


# Other file systems


def test_memory() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/disk.qcow2", IMAGE)
    with fastqcow.open("memory://bucket/disk.qcow2") as image, fastqcow.open("memory://bucket/disk.qcow2") as second:
        assert image.name == "memory://bucket/disk.qcow2"
        with ThreadPoolExecutor(4) as pool:  # both share one object of this file system, and its position
            offsets = range(0, len(CONTENTS) - 999, 99_999)
            found = list(pool.map(lambda at: (image if at % 2 else second).pread(999, at), offsets))
        assert found == [CONTENTS[at : at + 999] for at in offsets]
        assert image.read() == CONTENTS
        with pytest.raises(FileNotFoundError) as caught:
            fastqcow.open("memory://bucket/none")
        assert caught.value.filename == "memory://bucket/none"
    fs.rm("/bucket", recursive=True)


def test_file_of_another_file_system_pickles() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/disk.qcow2", IMAGE)
    with fastqcow.open(open_file(fs, "/bucket/disk.qcow2")) as image, pickle.loads(pickle.dumps(image)) as other:
        assert other.read() == CONTENTS
    fs.rm("/bucket", recursive=True)


def test_name_in_a_file_system_is_not_a_local_path(tmp_path: Path) -> None:
    """A file there may have the name of one that is here: what it names is not looked for beside that."""
    (tmp_path / "base.qcow2").write_bytes(IMAGE)
    (tmp_path / "overlay").touch()
    fs = fsspec.filesystem("memory")
    fs.pipe(f"{tmp_path}/overlay", build([0] * 100, backing=("base.qcow2", "qcow2")))
    with pytest.raises(fastqcow.PolicyError):
        fastqcow.open(open_file(fs, f"{tmp_path}/overlay"))
    fs.rm(str(tmp_path), recursive=True)


def test_local_file(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(IMAGE)
    before = len(os.listdir("/dev/fd"))
    with fastqcow.open(f"file://{tmp_path}/disk.qcow2") as image:
        assert image.read() == CONTENTS
    assert len(os.listdir("/dev/fd")) == before


def test_local_copy(server: WebServer, url: str) -> None:
    """For servers that send no ranges."""
    server.answer = lambda handler, data, span: handler.reply(200, data)
    with fastqcow.open(f"simplecache::{url}") as image:
        assert image.read() == CONTENTS
        assert image.name == f"simplecache::{url}"
        with pickle.loads(pickle.dumps(image)) as other:
            assert other.pread(10, 0) == CONTENTS[:10]


def test_archive(server: WebServer) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sub/disk.qcow2", IMAGE)
    server.files["a.zip"] = packed.getvalue()
    url = f"zip://sub/disk.qcow2::{server.url('a.zip')}"
    with fastqcow.open(url, threads=3) as image:
        assert image.read() == CONTENTS
        assert image.pread(10, CLUSTER) == CONTENTS[CLUSTER : CLUSTER + 10]


class Bucket(AsyncFileSystem):  # type: ignore[misc]
    """As stores of objects are: answers take a while, and many are given at the same time."""

    protocol = "bucket"
    cachable = False
    objects: dict[str, bytes] = {}  # noqa: RUF012
    answer: Callable[[bytes], Any] = staticmethod(lambda data: data)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at_once = self.most_at_once = self.calls = 0

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        size = None if path == "endless" else len(self.objects[path])
        return {"name": path, "size": size, "type": "directory" if path == "folder" else "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        import asyncio

        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0.03)
        self.at_once -= 1
        found: bytes = Bucket.answer(self.objects[path][start:end])
        return found


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "objects", {"disk.qcow2": IMAGE, "folder": b"", "endless": b""})
    return Bucket()


def test_objects_are_fetched_by_ranges(bucket: Bucket) -> None:
    with fastqcow.open(open_file(bucket, "disk.qcow2")) as image:
        assert image.name == "bucket://disk.qcow2"
        assert image.read() == CONTENTS
    assert 4 < bucket.most_at_once <= REQUESTS
    with fastqcow.open("bucket://disk.qcow2") as image, pickle.loads(pickle.dumps(image)) as other:
        assert other.pread(100, CLUSTER) == CONTENTS[CLUSTER : CLUSTER + 100]


def test_object_that_cannot_be_opened(bucket: Bucket) -> None:
    refused("bucket://none", FileNotFoundError)
    refused("bucket://folder", IsADirectoryError)
    assert "does not say how long" in str(refused("bucket://endless"))


def fail(data: bytes) -> bytes:
    raise RuntimeError("the store is on fire")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (fail, "RuntimeError the store is on fire"),
        (lambda data: data[1:], "the server sends"),
        (lambda data: data + b"x", "more than the"),
    ],
    ids=["raises", "short", "long"],
)
def test_object_that_fails(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, answer: Callable[[bytes], bytes], said: str) -> None:
    with fastqcow.open("bucket://disk.qcow2") as image:
        monkeypatch.setattr(Bucket, "answer", staticmethod(answer))
        with pytest.raises(OSError, match=f"{said}.*host offset 0x") as caught:
            image.read()
        assert caught.value.filename == "bucket://disk.qcow2"


def test_file_system_over_another_one(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "disk.qcow2").write_bytes(IMAGE)
    directory = pytest.importorskip("fsspec.implementations.dirfs").DirFileSystem
    bucket.objects["sub/disk.qcow2"] = IMAGE
    for fs in (directory(path=str(tmp_path), fs=fsspec.filesystem("file")), directory(path="sub", fs=bucket)):
        with open_file(fs, "disk.qcow2", "dir://disk.qcow2") as file, fastqcow.open(file) as image:
            assert image.read() == CONTENTS
