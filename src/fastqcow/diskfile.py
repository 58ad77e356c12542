"""What a reader looks like from Python: a file of bytes, read by position or in order."""

from __future__ import annotations

import io
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastqcow import _reader
from fastqcow.locks import ForkSafeLock
from fastqcow.origin import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastqcow._reader import Reader
    from fastqcow._types import Readable, Writable

__all__ = ["DiskFile", "Extent"]

_EXTENTS_AT_ONCE = 1024


class Extent(NamedTuple):
    """A range of the disk whose bytes come from one place; the fields of `qemu-img map --output=json`.

    Attributes:
        start: guest offset, in bytes.
        length: in bytes.
        depth: the layer that decides: 0 is the image, 1 its backing file, ...
        present: some layer says what is here; if not, the bytes are zeroes because nobody wrote them.
        zero: the bytes read as zeroes.
        data: bytes are stored.
        compressed: they are stored compressed.
        offset: host offset in that layer's file, where the bytes have one.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None


class DiskFile(io.RawIOBase):
    """Guest bytes as an open, seekable, read-only binary file.

    `pread` and `preadv` may be called from many threads at once and never move the file position. `read`, `readinto`, `seek` and
    `tell` share one position, as those of any file. Closing the file lets reads that are under way in other threads finish.
    """

    def __init__(self, reader: Reader, origin: Origin, start: int = 0) -> None:
        """The reader's bytes from `start` on."""
        super().__init__()
        self._reader: Reader | None = reader
        self._origin = origin
        self._start = start
        self._size = reader.size - start
        self._position = 0
        # Reads go on from where they began, so a signal handler may read and seek meanwhile; that does not move them.
        self._position_lock = ForkSafeLock(threading.RLock)

    @property
    def name(self) -> str:
        """The path that the image was opened by, or what stands for it."""
        return self._open_reader().source.path

    @property
    def mode(self) -> str:
        return "rb"

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self._size

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.name!r} size={self.size}"
        return f"<fastqcow.{type(self).__name__} {state}>"

    def _open_reader(self) -> Reader:
        reader = self._reader
        if reader is None:
            raise ValueError("I/O operation on closed image")
        return reader

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as how it was opened; unpickling opens it again."""
        self._open_reader()
        return self._reopening()

    def _reopening(self) -> tuple[Any, ...]:
        return Origin.open, (self._origin.checked(),)

    def close(self) -> None:
        # Readers and sources are freed, and descriptors closed, with the last reference: this one, or a running read's.
        self._reader = None
        super().close()

    # By position

    def pread(self, nbytes: int, guest_off: int) -> bytes:
        """Read `nbytes` bytes at guest offset `guest_off`, as `os.pread`; short only at the end of the disk.

        Raises:
            FormatError: the image is damaged at this place.
            OSError: the file cannot be read.
            ValueError: a negative number, or a closed image.
        """
        return self._open_reader().pread(nbytes, guest_off + self._start if guest_off >= 0 else guest_off)

    def preadv(self, buffers: Sequence[Writable], guest_off: int) -> int:
        """Fill writable buffers in turn from guest offset `guest_off`, as `os.preadv`; returns the bytes read.

        Less than the buffers hold is read only at the end of the disk. Errors as of `pread`; the buffers' contents are then
        undefined.
        """
        return self._open_reader().preadv(buffers, guest_off + self._start if guest_off >= 0 else guest_off)

    # As a file

    def readable(self) -> bool:
        self._open_reader()
        return True

    def seekable(self) -> bool:
        self._open_reader()
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._open_reader()
        with self._position_lock.lock:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
            if base is None:
                raise ValueError(f"whence is {whence}; it can be 0, 1 or 2")
            if base + offset < 0:
                raise ValueError(f"the position would be {base + offset}; it cannot be negative")
            self._position = base + offset
            return self._position

    def tell(self) -> int:
        self._open_reader()
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes from the position on, all that are left if it is negative or None."""
        self._open_reader()
        with self._position_lock.lock:
            start = self._position
            left = max(self.size - start, 0)
            data = self.pread(left if size is None or size < 0 else min(size, left), start)
            self._position = start + len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Writable, /) -> int:
        self._open_reader()
        with self._position_lock.lock:
            start = self._position
            count = self.preadv((buffer,), start)
            self._position = start + count
        return count

    def write(self, buffer: Readable, /) -> NoReturn:
        raise io.UnsupportedOperation("images are read-only")

    def map(self, guest_off: int = 0, nbytes: int | None = None) -> Iterator[Extent]:
        """The extents of the disk in order, neighbours that continue each other merged; as `qemu-img map` lists them.

        Args:
            guest_off: where to start, in bytes.
            nbytes: how far to go; to the end by default.
        """
        reader = self._open_reader()
        end = self.size if nbytes is None else min(guest_off + nbytes, self.size)
        if guest_off < 0 or (nbytes or 0) < 0:
            raise ValueError("the range cannot start or end before 0")
        return _extents(reader, min(guest_off, end) + self._start, end + self._start, self._start)


def _extents(reader: Reader, at: int, end: int, base: int) -> Iterator[Extent]:
    unallocated = (_reader.UNALLOCATED, _reader.UNALLOCATED_ALLOC)
    with_data = (_reader.DATA, _reader.COMPRESSED)
    while at < end:
        for start, length, offset, depth, kind in reader.extents(at, end, _EXTENTS_AT_ONCE):
            data = kind in with_data
            yield Extent(start - base, length, depth, kind not in unallocated, not data, data, kind == _reader.COMPRESSED, offset)
            at = start + length
