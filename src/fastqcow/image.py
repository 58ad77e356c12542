"""The image that users hold: a virtual disk that is read by position, or as a file."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from fastqcow import _reader
from fastqcow.chain import Layer, Options, open_chain
from fastqcow.describe import layer_info
from fastqcow.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastqcow._types import BinaryFile, Path, Readable, Writable
    from fastqcow.header import Header

__all__ = ["Extent", "Image", "open"]

CACHE_SIZE = 32 << 20
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


class Image(io.RawIOBase):
    """A virtual disk, open for reading. Made by `fastqcow.open`.

    `pread` and `preadv` may be called from many threads at once and never move the file position. `read`, `readinto`, `seek` and
    `tell` share one position, as those of any file. Closing the image lets reads that are under way in other threads finish.
    """

    def __init__(self, chain: Layer) -> None:
        super().__init__()
        assert chain.header is not None
        self._chain: Layer | None = chain
        self._header: Header = chain.header
        self._reader: _reader.Reader | None = chain.reader
        self._position = 0
        self._position_lock = ForkSafeLock()

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
        return self._header.disk_size

    @property
    def header(self) -> Header:
        return self._header

    def __repr__(self) -> str:
        return f"<fastqcow.Image {self.name!r} size={self.size}>" if not self.closed else "<fastqcow.Image closed>"

    def _open_reader(self) -> _reader.Reader:
        reader = self._reader
        if reader is None:
            raise ValueError("I/O operation on closed image")
        return reader

    def close(self) -> None:
        # Readers and sources are freed, and descriptors closed, with the last reference: this one, or a running read's.
        self._reader = self._chain = None
        super().close()

    # By position

    def pread(self, nbytes: int, guest_off: int) -> bytes:
        """Read `nbytes` bytes at guest offset `guest_off`, as `os.pread`; short only at the end of the disk.

        Raises:
            FormatError: the image is damaged at this place.
            OSError: the file cannot be read.
            ValueError: a negative number, or a closed image.
        """
        return self._open_reader().pread(nbytes, guest_off)

    def preadv(self, buffers: Sequence[Writable], guest_off: int) -> int:
        """Fill writable buffers in turn from guest offset `guest_off`, as `os.preadv`; returns the bytes read.

        Less than the buffers hold is read only at the end of the disk. Errors as of `pread`; the buffers' contents are then
        undefined.
        """
        return self._open_reader().preadv(buffers, guest_off)

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
        reader = self._open_reader()
        with self._position_lock.lock:
            left = max(self.size - self._position, 0)
            data = reader.pread(left if size is None or size < 0 else min(size, left), self._position)
            self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Writable, /) -> int:
        reader = self._open_reader()
        with self._position_lock.lock:
            count = reader.preadv((buffer,), self._position)
            self._position += count
        return count

    def write(self, buffer: Readable, /) -> NoReturn:
        raise io.UnsupportedOperation("images are read-only")

    # About the image

    def map(self, guest_off: int = 0, nbytes: int | None = None) -> Iterator[Extent]:
        """The extents of the disk in order, neighbours that continue each other merged; as `qemu-img map` lists them.

        Args:
            guest_off: where to start, in bytes.
            nbytes: how far to go; to the end by default.
        """
        reader = self._open_reader()
        end = self.size if nbytes is None else min(guest_off + nbytes, self.size)
        if guest_off < 0 or end < 0:
            raise ValueError("the range cannot start or end before 0")
        return _extents(reader, min(guest_off, end), end)

    def info(self) -> dict[str, Any]:
        """What `qemu-img info --output=json` says, field for field."""
        return layer_info(self._open_reader().source, self._header)

    def stats(self) -> _reader.Stats:
        """Counts since the image was opened, over all layers.

        clusters_inflated, cache_hits (reads of a compressed cluster that found it inflated), bytes_fetched (from the files) and
        bytes_returned (to callers).
        """
        return self._open_reader().stats()


def _extents(reader: _reader.Reader, at: int, end: int) -> Iterator[Extent]:
    unallocated = (_reader.UNALLOCATED, _reader.UNALLOCATED_ALLOC)
    with_data = (_reader.DATA, _reader.COMPRESSED)
    while at < end:
        for start, length, offset, depth, kind in reader.extents(at, end, _EXTENTS_AT_ONCE):
            data = kind in with_data
            yield Extent(start, length, depth, kind not in unallocated, not data, data, kind == _reader.COMPRESSED, offset)
            at = start + length


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def make_options(
    backing: Literal[False] | Path | BinaryFile | None = None,
    threads: int | None = None,
    cache_size: int | None = None,
    engine: str | None = None,
) -> Options:
    """Check and fill in the options of `open`."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least one is needed")
    if cache_size is not None and not 0 <= cache_size <= sys.maxsize:
        raise ValueError(f"cache_size is {cache_size}; it is a number of bytes")
    engine = engine or os.environ.get("FASTQCOW_ENGINE") or "libdeflate"
    if engine not in ("libdeflate", "libz"):
        raise ValueError(f"engine is {engine!r}; it can be 'libdeflate' or 'libz'")
    return Options(
        backing=backing,
        threads=min(threads or available_cpus(), 256),
        cache_size=CACHE_SIZE if cache_size is None else cache_size,
        engine="libz" if engine == "libz" else "libdeflate",
    )


def open(  # noqa: A001 - called as fastqcow.open
    source: Path | BinaryFile,
    *,
    backing: Literal[False] | Path | BinaryFile | None = None,
    threads: int | None = None,
    cache_size: int | None = None,
    engine: Literal["libdeflate", "libz"] | None = None,
) -> Image:
    """Open a qcow2 image for reading.

    Args:
        source: a path, or an open, seekable binary file, which stays the caller's.
        backing: what to do about a backing file that the image names. None: open it if it lies in the image's own directory or
            below. "follow": open it wherever it is. False: do without, unallocated clusters read as zeroes. A path or an open file:
            that one instead (a path named "follow" is written "./follow").
        threads: at most so many threads work on one read, the calling one included; by default one for each CPU that the process
            may use.
        cache_size: bound on inflated clusters kept, in bytes; 32 MiB by default.
        engine: what inflates deflate clusters: "libdeflate" (where it is built in, see `build_info`) or "libz", the reference. By
            default the environment variable FASTQCOW_ENGINE, or libdeflate.

    Raises:
        FormatError: not a qcow2 image, or a damaged one.
        UnsupportedError: an image that needs a feature which fastqcow does not have.
        PolicyError: the image names a backing file that `backing` does not allow.
        OSError: a file cannot be opened or read.
    """
    return Image(open_chain(source, make_options(backing, threads, cache_size, engine)))
