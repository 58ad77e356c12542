"""A disk as a lazy array of Dask, whose chunks are read where they are computed (extra `dask`).

What goes to a worker is not bytes but how the disk is opened. A process that computes chunks opens it once, and keeps the last few
disks open that it has read from.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeAlias

import dask.array
import numpy

from fastqcow.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastqcow.diskfile import DiskFile

    Bytes: TypeAlias = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]

__all__ = ["to_array"]

CHUNK = 16 << 20
KEPT = 4  # disks that a process keeps open; one that is dropped is closed when its last read is done


def to_array(image: DiskFile, chunks: Any = CHUNK, *, threads: int = 1) -> dask.array.Array:
    """The bytes of a disk as a one-dimensional array of uint8; a chunk is read when, and where, it is computed.

    Args:
        image: an image, a snapshot or a raw image; it may be closed afterwards. Each array has the disk opened anew.
        chunks: as for `dask.array.from_array`: bytes as a number or as text ("16MiB"), or a tuple of them. Where a border cuts a
            compressed cluster, that is inflated twice; 16 MiB is a multiple of all of their sizes.
        threads: at most so many threads of a process work on one chunk. Dask computes as many chunks at a time as its workers have
            threads, so that one is enough where those are as many as there are CPUs.

    Raises:
        TypeError: the image does not pickle: it has a password, or comes from a file object.
        ValueError: the image is closed, or there is to be no thread.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; at least one is needed")
    reopen, (origin, *rest) = image.__reduce__()
    disk = _Disk(uuid.uuid4().hex, reopen, (origin.with_options(threads=threads), *rest), image.size)
    make: Any = dask.array.from_array
    meta = numpy.empty(0, numpy.uint8)
    array: dask.array.Array = make(disk, chunks, name=f"fastqcow-{disk.key}", inline_array=True, meta=meta)
    return array


class _Disk:
    """What Dask takes chunks of: it has an array's attributes, and slices of it are read."""

    ndim = 1
    dtype = numpy.dtype(numpy.uint8)

    def __init__(self, key: str, reopen: Callable[..., DiskFile], arguments: tuple[Any, ...], size: int) -> None:
        self.key = key
        self.reopen = reopen
        self.arguments = arguments
        self.shape = (size,)

    def __dask_tokenize__(self) -> str:
        return self.key

    def __getitem__(self, index: Any) -> Any:
        """By a slice, a number, or a list or array of these, as arrays are. What lies between the first and the last is read."""
        (at,) = index if isinstance(index, tuple) else (index,)
        places = range(self.shape[0])
        if isinstance(at, slice):
            places = places[at]
            return (
                self._read(min(places[0], places[-1]), max(places[0], places[-1]))[:: places.step] if places else self._read(0, -1)
            )
        wanted = numpy.asarray(at)
        wanted = numpy.flatnonzero(wanted) if wanted.dtype == bool else numpy.where(wanted < 0, wanted + len(places), wanted)
        first, last = (int(wanted.min()), int(wanted.max())) if wanted.size else (0, -1)
        if first < 0 or last >= len(places):
            raise IndexError(f"there is no byte {at} of {len(places)}")
        return self._read(first, last)[wanted.astype(numpy.intp) - first]

    def _read(self, first: int, last: int) -> Bytes:
        found = numpy.empty(last + 1 - first, numpy.uint8)
        _opened(self).preadv([found.data], first)
        return found


_disks: OrderedDict[str, DiskFile] = OrderedDict()
_lock = ForkSafeLock()


def _opened(disk: _Disk) -> DiskFile:
    """The disk, opened by the first that asks for it in this process."""
    with _lock.lock:
        if disk.key not in _disks:
            _disks[disk.key] = disk.reopen(*disk.arguments)
        _disks.move_to_end(disk.key)
        while len(_disks) > KEPT:
            _disks.popitem(last=False)
        return _disks[disk.key]
