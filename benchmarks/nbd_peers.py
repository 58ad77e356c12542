"""Disks served over NBD as peers: a server on a Unix socket, and what reads from it, by the library libnbd.

with qemu_nbd(image) as opened:
    pread = opened()  # a new connection
    pread(4096, 0)
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from peers import Pread

from fastqcow import libnbd

START_SECONDS = 10


def missing(*tools: str) -> str | None:
    """What is not installed, of these commands and libnbd; None if all is there."""
    absent = [tool for tool in tools if not shutil.which(tool)] + ([] if libnbd.is_installed() else ["libnbd"])
    return f"not installed: {', '.join(absent)}" if absent else None


@contextlib.contextmanager
def served(command: Callable[[Path], list[str]]) -> Iterator[Path]:
    """The socket of a server, ready to be connected to, until the end of the block. command: is given the socket's path.

    Raises:
        OSError: it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "nbd"
        process = subprocess.Popen(command(socket), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            _wait(process, socket)
            yield socket
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], socket: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            libnbd.Client.of_socket(str(socket)).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise
        time.sleep(0.005)


def qemu_nbd_command(image: Path, fmt: str = "qcow2") -> Callable[[Path], list[str]]:
    """For `served`: qemu-nbd with its own defaults, for any number of clients one after the other or at once."""
    options = ["--read-only", "--persistent", "--shared=0", f"--format={fmt}"]
    return lambda socket: ["qemu-nbd", *options, f"--socket={socket}", str(image.absolute())]


@contextlib.contextmanager
def qemu_nbd(image: Path, fmt: str = "qcow2") -> Iterator[Callable[[], Pread]]:
    """How to connect anew to a qemu-nbd that serves the image until the end of the block; reads are bytes, one at a time.

    Nothing that a client reads makes the next one's reads cheaper: qemu-nbd keeps L2 tables, but no inflated cluster.
    """
    with served(qemu_nbd_command(image, fmt)) as socket:
        yield lambda: libnbd.Client.of_socket(str(socket)).pread
