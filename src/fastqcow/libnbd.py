"""A client of an NBD server: the C library libnbd, called by ctypes.

Its own Python binding is built for the system's interpreter alone, and cannot be had in a virtual environment. A call by ctypes
takes about a microsecond, a request to a server ten times that or more.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastqcow._types import Writable

__all__ = ["Client", "is_installed"]

NAME = "libnbd.so.0"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(NAME)
    library.nbd_create.restype = ctypes.c_void_p
    library.nbd_get_error.restype = ctypes.c_char_p
    library.nbd_close.argtypes = [ctypes.c_void_p]
    library.nbd_shutdown.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.nbd_connect_unix.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nbd_connect_systemd_socket_activation.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p)]
    library.nbd_pread.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32]
    return library


def is_installed() -> bool:
    try:
        _library()
    except OSError:
        return False
    return True


class Client:
    """A connection, until it is closed.

    Raises:
        OSError: libnbd is not installed, or what it says of what went wrong.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._handle = self._library.nbd_create()
        if not self._handle:
            raise self._error()
        self._end = weakref.finalize(self, self._library.nbd_close, self._handle)

    @classmethod
    def of_socket(cls, path: str) -> Client:
        """Connected to a server that listens on a Unix socket."""
        client = cls()
        client._check(client._library.nbd_connect_unix(client._handle, path.encode()))
        return client

    @classmethod
    def of_command(cls, command: Sequence[str]) -> Client:
        """Connected to a server that is started for it alone, and takes its socket as systemd hands it over."""
        client = cls()
        words = (ctypes.c_char_p * (len(command) + 1))(*(word.encode("utf-8", "surrogateescape") for word in command), None)
        client._check(client._library.nbd_connect_systemd_socket_activation(client._handle, words))
        return client

    def pread(self, nbytes: int, guest_off: int) -> bytes:
        """Bytes of the disk. Errors as of the class, also where they lie beyond its end."""
        data = bytearray(nbytes)
        self.preadv([data], guest_off)
        return bytes(data)

    def preadv(self, buffers: Sequence[Writable], guest_off: int) -> int:
        """Fill the buffers in turn, by a request for each; returns their bytes."""
        start = guest_off
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            to = (ctypes.c_char * len(view)).from_buffer(view)
            self._check(self._library.nbd_pread(self._handle, to, len(view), guest_off, 0))
            guest_off += len(view)
        return guest_off - start

    def close(self) -> None:
        """End the connection, and with it a server that has no other."""
        if self._end.alive:
            self._library.nbd_shutdown(self._handle, 0)
            self._end()

    def _check(self, result: int) -> None:
        if result:
            raise self._error()

    def _error(self) -> OSError:
        return OSError(self._library.nbd_get_error().decode())
