"""Whether two disks hold the same bytes, and what the digest of a disk's bytes is: both without converting anything.

A comparison does not read what both tables call zero. A digest needs all bytes; they are read into two buffers in turn, so that the
next piece is inflated, by all threads, while the last one is hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastqcow.diskfile import DiskFile, Extent

__all__ = ["Difference", "checksum", "compare"]

PIECE = 4 << 20
SECTOR = 512
_ZEROES = bytes(PIECE)


class Difference(NamedTuple):
    """Where two disks differ first.

    Attributes:
        kind: "content", or with strict=True "size" or "status" (stored plain, compressed, as zeroes, or not at all).
        guest_off: the start of the sector or of the range, in bytes; 0 for "size".
    """

    kind: str
    guest_off: int


def compare(
    first: DiskFile, second: DiskFile, *, strict: bool = False, progress: Callable[[int, int], object] | None = None
) -> Difference | None:
    """The first difference between two disks, or None. A shorter disk counts as followed by zeroes, unless `strict`.

    Raises:
        FormatError, OSError: one of them cannot be read.
    """
    if strict and first.size != second.size:
        return Difference("size", 0)
    end = max(first.size, second.size)
    buffers = bytearray(PIECE), bytearray(PIECE)
    for start, length, one, other in _common_ranges(first, second):
        if strict and one and other and _status(one) != _status(other):
            return Difference("status", start)
        if not (one and one.data) and not (other and other.data):
            continue
        for at in range(start, start + length, PIECE):
            nbytes = min(PIECE, start + length - at)
            found = _read(first, one, buffers[0], at, nbytes), _read(second, other, buffers[1], at, nbytes)
            if found[0] != found[1]:
                sectors = range(0, nbytes, SECTOR)
                return Difference("content", at + next(s for s in sectors if found[0][s : s + SECTOR] != found[1][s : s + SECTOR]))
            if progress:
                progress(at, end)
    if progress:
        progress(end, end)
    return None


def _status(extent: Extent) -> tuple[bool, ...]:
    """What QEMU compares of two blocks: an offset is what compressed clusters do not have."""
    return extent.present, extent.zero, extent.data, extent.offset is not None


def _read(disk: DiskFile, extent: Extent | None, buffer: bytearray, at: int, nbytes: int) -> memoryview:
    if extent is None or not extent.data:
        return memoryview(_ZEROES)[:nbytes]
    view = memoryview(buffer)[:nbytes]
    disk.preadv([view], at)
    return view


def _common_ranges(first: DiskFile, second: DiskFile) -> Iterator[tuple[int, int, Extent | None, Extent | None]]:
    """The ranges on which both maps stay the same: start, length, and the extent of each, None behind the end of its disk."""
    maps = first.map(), second.map()
    one, other = next(maps[0], None), next(maps[1], None)
    at = 0
    while one or other:
        end = min(e.start + e.length for e in (one, other) if e)
        yield at, end - at, one, other
        at = end
        if one and one.start + one.length == end:
            one = next(maps[0], None)
        if other and other.start + other.length == end:
            other = next(maps[1], None)


def checksum(disk: DiskFile, algorithm: str = "sha256", *, progress: Callable[[int, int], object] | None = None) -> str:
    """The digest of a disk's bytes, in hexadecimal: that of the raw file which it would convert to.

    Args:
        algorithm: one that `hashlib` knows, and whose digest has a fixed length.

    Raises:
        FormatError, OSError: the disk cannot be read.
        ValueError: there is no such algorithm.
    """
    # Imported here: they would be a fifth of the time that `import fastqcow` takes.
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    digest = hashlib.new(algorithm)
    if digest.digest_size == 0:
        raise ValueError(f"the digest {algorithm} has no length of its own")
    buffers = bytearray(PIECE), bytearray(PIECE)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(digest.update, b"")
        for turn, at in enumerate(range(0, disk.size, PIECE)):
            nbytes = disk.preadv([buffers[turn % 2]], at)
            pending.result()
            pending = pool.submit(digest.update, memoryview(buffers[turn % 2])[:nbytes])
            if progress:
                progress(at + nbytes, disk.size)
        pending.result()
    return digest.hexdigest()
