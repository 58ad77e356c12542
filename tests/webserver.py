"""An HTTP server on the loopback interface that counts what it is asked for, and can be told to misbehave."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import fastqcow
from images import PAYLOAD, plain_and_compressed

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
IMAGE, CONTENTS = plain_and_compressed()  # what the fixture `url` serves


class WebServer(ThreadingHTTPServer):
    """Serves `files` by ranges.

    Attributes:
        files: bytes by path.
        requests: (method, path, first byte, bytes) of each, in order; first byte None without a range.
        sent: bytes of all bodies.
        most_at_once: requests that were being answered at the same time.
        latency: seconds before each answer.
        answer: called in place of the own answer, with the handler, the file's bytes and the range (first byte, number of bytes).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int | None, int]] = []
        self.sent = 0
        self.latency = 0.0
        self.most_at_once = self.at_once = 0
        self.answer: Callable[[Any, bytes, Any], None] | None = None
        self.lock = threading.Lock()
        self.released = threading.Event()  # of answers that wait for ever
        self.connections: list[socket.socket] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        data = server.files.get(self.path.lstrip("/"))
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(found[1]), int(found[2]) + 1 - int(found[1])) if found else None
        with server.lock:
            server.requests.append((self.command, self.path, *(span or (None, 0))))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.latency)
            if data is None:
                self.reply(404)
            elif server.answer:
                server.answer(self, data, span)
            else:
                self.usual(data, span)
        finally:
            with server.lock:
                server.at_once -= 1

    def usual(self, data: bytes, span: tuple[int, int] | None) -> None:
        if span is None:
            self.reply(200, data)
        elif span[0] >= len(data):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            part = data[span[0] : span[0] + span[1]]
            self.reply(206, part, {"Content-Range": f"bytes {span[0]}-{span[0] + len(part) - 1}/{len(data)}"})

    def hang_up(self) -> None:
        self.close_connection = True

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": str(len(body))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            with self.server.lock:
                self.server.sent += len(body)


@contextmanager
def web_server() -> Iterator[WebServer]:
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
        for connection in server.connections:
            with suppress(OSError):  # its thread has closed it
                connection.shutdown(socket.SHUT_RDWR)


def refused(url: str, kind: type[Exception] = OSError) -> OSError:
    """Opening the URL fails; the error."""
    with pytest.raises(kind) as caught:
        fastqcow.open(url)
    assert isinstance(caught.value, OSError)
    assert caught.value.filename == url
    return caught.value
