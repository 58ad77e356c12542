"""Disks served over NBD as peers: a server on a Unix socket, and what reads from it, by the library libnbd.

libnbd is called by ctypes, since its Python binding is there for the system's own interpreter only. A call by ctypes takes about a
microsecond, a request to any of the servers ten times that or more.

    with qemu_nbd(image) as opened:
        pread = opened()  # a new connection
        pread(4096, 0)
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from peers import Pread

START_SECONDS = 10

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object


def missing(*tools: str) -> str | None:
    """What is not installed, of these commands and libnbd; None if all is there."""
    absent = [tool for tool in tools if not shutil.which(tool)] + ([] if _library() else ["libnbd"])
    return f"not installed: {', '.join(absent)}" if absent else None


@cache
def _library() -> ctypes.CDLL | None:
    found = ctypes.util.find_library("nbd")
    if found is None:
        return None
    library = ctypes.CDLL(found)
    library.nbd_create.restype = ctypes.c_void_p
    library.nbd_get_error.restype = ctypes.c_char_p
    library.nbd_close.argtypes = [ctypes.c_void_p]
    library.nbd_connect_unix.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nbd_pread.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32]
    return library


class Client:
    """A connection to the server at a Unix socket; it ends with the object.

    Raises:
        OSError: of libnbd, with its sentence.
    """

    def __init__(self, socket: Path) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self._handle = library.nbd_create()
        if not self._handle:
            raise self._error()
        self._end = weakref.finalize(self, library.nbd_close, self._handle)
        if library.nbd_connect_unix(self._handle, bytes(socket)):
            raise self._error()

    def pread(self, nbytes: int, guest_off: int) -> bytes:
        data: bytes = _new_bytes(None, nbytes)  # filled before anybody else sees it, as the Python binding does
        if self._library.nbd_pread(self._handle, data, nbytes, guest_off, 0):
            raise self._error()
        return data

    def close(self) -> None:
        self._end()

    def _error(self) -> OSError:
        return OSError(self._library.nbd_get_error().decode())


@contextlib.contextmanager
def served(command: Callable[[Path], list[str]]) -> Iterator[Path]:
    """The socket of a server, ready to be connected to, until the end of the block. command: is given the socket's path.

    Raises:
        OSError: it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "nbd"
        process = subprocess.Popen(command(socket), stdin=subprocess.DEVNULL)
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
            Client(socket).close()
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
        yield lambda: Client(socket).pread
