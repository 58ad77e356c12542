"""Whether two disks hold the same bytes, and what the digest of a disk's bytes is: both without converting anything.

A comparison does not read what both tables call zero. A digest needs all bytes; they are read into two buffers in turn, so that the
next piece is inflated, by all threads, while the last one is hashed. For a digest of blocks' digests, blocks that the tables call
zero are not read, and the others are hashed by several threads while the next pieces are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from fastqcow.cpus import available_cpus

if TYPE_CHECKING:
    from concurrent.futures import Future

    from fastqcow.diskfile import DiskFile, Extent

__all__ = ["Difference", "checksum", "compare"]

PIECE = 4 << 20
SECTOR = 512
BLOCK = 64 << 10  # of blkhash: with another size, all digests are others
BLOCKS_PIECE = 1 << 20
HASHING_THREADS_MAX = 16  # more are not fed by one reader; and each has two pieces in memory
ZERO_DIGESTS = 32 << 10
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


def checksum(
    disk: DiskFile, algorithm: str = "sha256", *, blkhash: bool = False, progress: Callable[[int, int], object] | None = None
) -> str:
    """The digest of a disk's bytes, in hexadecimal: that of the raw file which it would convert to.

    With `blkhash`, the digest that blksum of the project blkhash prints: that of the digests of all blocks of 64 KiB, one after the
    other, and the disk's size. Only data is read for it. But there is a digest for each block of zeroes, too, and the digests are
    digested in order, by one thread: 512 MiB of them for an empty TiB, with SHA-256, and 32 GiB for 64 TiB.

    Args:
        algorithm: one that `hashlib` knows, and whose digest has a fixed length.
        blkhash: the scheme of blkhash in place of a digest of the bytes.
        progress: called with (bytes done, bytes in all).

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
    if blkhash:
        return _blkhash(disk, algorithm, progress)
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


def _blkhash(disk: DiskFile, algorithm: str, progress: Callable[[int, int], object] | None) -> str:
    """Reading is left to the calling thread: the pieces come in order from a source that is a stream, and Ctrl-C stops it."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    zero_block = bytes(BLOCK)
    zero_digest = hashlib.new(algorithm, zero_block).digest()
    zero_digests = memoryview(zero_digest * ZERO_DIGESTS)
    outer = hashlib.new(algorithm)
    pending: deque[tuple[Future[bytes] | int, int]] = deque()  # digests, or a count of zero blocks; and where they end

    def hashed(buffer: bytearray, nbytes: int) -> bytes:
        """The digests of a piece. startswith() is a memcmp: it costs nothing for data, and a fraction of a digest for zeroes."""
        view = memoryview(buffer)[:nbytes]
        return b"".join(
            zero_digest if buffer.startswith(zero_block, at, nbytes) else hashlib.new(algorithm, view[at : at + BLOCK]).digest()
            for at in range(0, nbytes, BLOCK)
        )

    def settle_first() -> None:
        found, end = pending.popleft()
        if isinstance(found, int):
            for left in range(found, 0, -ZERO_DIGESTS):
                outer.update(zero_digests[: left * len(zero_digest)])
                if progress:
                    progress(end - max(left - ZERO_DIGESTS, 0) * BLOCK, disk.size)
        else:
            outer.update(found.result())
            if progress:
                progress(end, disk.size)

    threads = min(available_cpus(), HASHING_THREADS_MAX)
    buffers = [bytearray(BLOCKS_PIECE) for _ in range(2 * threads)]
    turn = 0
    with ThreadPoolExecutor(threads) as pool:
        for start, end, to_read in _block_ranges(disk):
            if not to_read:
                pending.append(((end - start) // BLOCK, end))
                continue
            for at in range(start, end, BLOCKS_PIECE):
                while len(pending) >= len(buffers):
                    settle_first()
                buffer = buffers[turn % len(buffers)]
                nbytes = disk.preadv([memoryview(buffer)[: end - at]], at)
                pending.append((pool.submit(hashed, buffer, nbytes), at + nbytes))
                turn += 1
        while pending:
            settle_first()
    outer.update(disk.size.to_bytes(8, "little"))
    return outer.hexdigest()


def _block_ranges(disk: DiskFile) -> Iterator[tuple[int, int, bool]]:
    """The disk in ranges of blocks: start, end, and whether to read them, which are all but those that the map knows to be zeroes.

    A last block that is shorter is read, too: its digest is not that of the others. Some ranges are empty.
    """
    start = end = 0
    for extent in disk.map():
        if not extent.data:
            continue
        first = extent.start - extent.start % BLOCK
        if first > end:
            yield start, end, True
            yield end, first, False
            start = first
        end = min(-(-(extent.start + extent.length) // BLOCK) * BLOCK, disk.size)
    yield start, end, True
    if end < disk.size:
        whole = disk.size - disk.size % BLOCK
        yield end, whole, False
        yield whole, disk.size, True
