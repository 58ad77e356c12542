"""Images at URLs of servers that fail, lie or do not answer."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fastqcow
from webserver import AT, CLUSTER, CONTENTS, IMAGE, WebServer, refused

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from fastqcow.integrations.fsspec import RemoteFile, open_url


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
