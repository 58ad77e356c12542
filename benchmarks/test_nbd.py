"""Workload: a compressed disk over NBD, to clients of libnbd: the whole of it by nbdcopy; the reads of a machine that boots
(boot.trace), one after the other, from a server just started; the same once more, and reads of 4 KiB in order.

Peers serve the same disk: qemu-nbd, nbdkit's filter qcow2dec where there is one, and uncompressed, nbdkit's file plugin.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alternating import Alternating
from nbd_peers import missing, qemu_nbd_command, served

from fastqcow.libnbd import Client
from fastqcow.replay import read_trace
from serving import has_nbdkit, need

Command = Callable[[Path], list[str]]  # of the path of the socket
CACHE_SIZE = "64M"  # as for test_boot.py


def nbdkit(*arguments: str | Path) -> Command:
    return lambda socket: ["nbdkit", "--foreground", f"--unix={socket}", *map(str, arguments)]


def fastqcow(image: Path) -> Command:
    command = [sys.executable, "-m", "fastqcow", "serve", f"--cache-size={CACHE_SIZE}", str(image)]
    return lambda socket: [*command, f"--socket={socket}"]


@pytest.fixture(scope="module")
def servers(zlib_image: Path, raw: Path) -> dict[str, Command]:
    if absent := missing():
        pytest.skip(absent)
    need("nbdcopy", "qemu-nbd")
    found = {"fastqcow": fastqcow(zlib_image), "qemu-nbd": qemu_nbd_command(zlib_image)}
    if has_nbdkit("filter", "qcow2dec"):
        found["nbdkit qcow2dec"] = nbdkit("--filter=qcow2dec", "file", zlib_image)
    return {**found, "nbdkit, raw file": nbdkit("file", raw)}


@pytest.fixture(scope="module")
def sockets(servers: dict[str, Command]) -> Iterator[dict[str, Path]]:
    """Of servers that run all the time."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(served(command)) for name, command in servers.items()}


@pytest.fixture(scope="module")
def trace(zlib_image: Path) -> list[tuple[int, int]]:
    """(bytes, guest offset)"""
    path = zlib_image.with_name("boot.trace")
    if not path.exists():
        pytest.skip(f"no {path.name} beside the image")
    found = read_trace(path, 1 << 62)
    return list(zip(found.lengths, found.offsets, strict=True))


def replay(socket: Path, requests: list[tuple[int, int]]) -> None:
    client = Client.of_socket(str(socket))
    for nbytes, guest_off in requests:
        client.pread(nbytes, guest_off)
    client.close()


def test_nbd_copy(alternating: Alternating, sockets: dict[str, Path]) -> None:
    def copy(socket: Path) -> Callable[[], object]:
        return lambda: subprocess.run(["nbdcopy", f"nbd+unix:///?socket={socket}", "null:"], check=True)

    alternating({name: copy(socket) for name, socket in sockets.items()})


def test_nbd_boot(alternating: Alternating, servers: dict[str, Command], trace: list[tuple[int, int]]) -> None:
    """Each server is started before, which takes the longer for Python and is not what is measured; and ended before the next one
    starts: memory that a virtual machine has never used before would cost it several times what all else does.
    """
    with contextlib.ExitStack() as running:
        socket = Path()

        def start(name: str) -> None:
            nonlocal socket
            running.close()
            socket = running.enter_context(served(servers[name]))
            time.sleep(0.1)  # until it sleeps, too

        alternating({name: lambda: replay(socket, trace) for name in servers}, before=start)


def test_nbd_second_boot(alternating: Alternating, sockets: dict[str, Path], trace: list[tuple[int, int]]) -> None:
    def boot(socket: Path) -> Callable[[], object]:
        return lambda: replay(socket, trace)

    alternating({name: boot(socket) for name, socket in sockets.items()})


def test_nbd_sequential(alternating: Alternating, sockets: dict[str, Path], raw: Path) -> None:
    requests = [(4096, guest_off) for guest_off in range(0, min(32 << 20, raw.stat().st_size), 4096)]

    def read(socket: Path) -> Callable[[], object]:
        return lambda: replay(socket, requests)

    alternating({name: read(socket) for name, socket in sockets.items()})
