"""Persistent dirty bitmaps (specification, "Bitmaps"): their directory, and the ranges of the disk that they mark.

A bitmap has a table of its own, each entry of which is a cluster of bits, or says that such a cluster would be all zeroes or all
ones. Limits are those of QEMU's qcow2-bitmap.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastqcow.errors import FormatError
from fastqcow.header import Header, c_string

__all__ = ["BitmapEntry", "Range", "dirty_ranges", "read_directory"]

BITMAPS_MAX = 65535
DIRECTORY_NBYTES_MAX = 1024 * BITMAPS_MAX
NAME_NBYTES_MAX = 1023
GRANULARITY_BITS = range(9, 32)
BITS_NBYTES_MAX = 512 << 20  # of one bitmap

IN_USE = 1 << 0
AUTO = 1 << 1
_ENTRY = struct.Struct(">QIIBBHI")
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_ONES = (1 << 64) - 1


class BitmapEntry(NamedTuple):
    """An entry of the bitmap directory.

    Attributes:
        name: as `qemu-img info` lists it.
        granularity: bytes of disk that a bit stands for.
        in_use: it was not saved when the image was last closed, so what it marks is not known.
        auto: QEMU keeps it up to date whenever it writes to the disk.
        table_off, table_entries: of its table of clusters in the file.
    """

    name: str
    granularity: int
    in_use: bool
    auto: bool
    table_off: int
    table_entries: int


class Range(NamedTuple):
    """A range of the disk, in bytes."""

    start: int
    length: int


def read_directory(pread: Callable[[int, int], bytes], header: Header, path: str) -> tuple[BitmapEntry, ...]:
    """All entries of the directory; none where its extension is marked as out of date.

    Raises:
        FormatError: the directory is damaged, or larger than a limit.
    """
    where = header.bitmaps
    if where is None or not header.autoclear & 1:
        return ()
    if not 1 <= where.bitmap_count <= BITMAPS_MAX:
        raise FormatError(f"the number of bitmaps is not within 1 to {BITMAPS_MAX}", path=path, value=where.bitmap_count)
    if where.reserved:
        raise FormatError("the reserved bits of the bitmaps extension are not zero", path=path, value=where.reserved)
    if where.directory_nbytes > DIRECTORY_NBYTES_MAX or where.directory_off % header.cluster_size or where.directory_off >= 1 << 62:
        raise FormatError("the bitmap directory is too large, or in no place for it", path=path, host_off=where.directory_off)
    directory = pread(where.directory_nbytes, where.directory_off)
    if len(directory) < where.directory_nbytes:
        raise FormatError("the bitmap directory runs past the end of the file", path=path, host_off=where.directory_off)
    found: dict[str, BitmapEntry] = {}
    at = 0
    for _ in range(where.bitmap_count):
        entry, nbytes = _read_entry(directory, at, header, path, where.directory_off + at)
        if entry.name in found:
            raise FormatError(f"there are two bitmaps with the name {entry.name!r}", path=path, host_off=where.directory_off + at)
        found[entry.name] = entry
        at += nbytes
    if at != len(directory):
        raise FormatError("the bitmap directory does not end with its last entry", path=path, host_off=where.directory_off + at)
    return tuple(found.values())


def _read_entry(directory: bytes, at: int, header: Header, path: str, host_off: int) -> tuple[BitmapEntry, int]:
    if at + _ENTRY.size > len(directory):
        raise FormatError("the bitmap directory ends within an entry", path=path, host_off=host_off)
    table_off, table_entries, flags, kind, granularity_bits, name_nbytes, extra_nbytes = _ENTRY.unpack_from(directory, at)
    nbytes = _ENTRY.size + extra_nbytes + name_nbytes
    if at + nbytes > len(directory):
        raise FormatError("the bitmap directory ends within an entry", path=path, host_off=host_off)
    name = c_string(directory[at + nbytes - name_nbytes : at + nbytes])
    if extra_nbytes:
        raise FormatError(f"the bitmap {name!r} has extra data, which is not known", path=path, host_off=host_off)
    if kind != 1 or flags & ~(IN_USE | AUTO) or granularity_bits not in GRANULARITY_BITS or name_nbytes > NAME_NBYTES_MAX:
        raise FormatError(f"the entry of the bitmap {name!r} makes no sense", path=path, host_off=host_off)
    bits_nbytes = table_entries << header.cluster_bits
    in_no_place = table_off == 0 or table_off % header.cluster_size or table_off >= 1 << 62
    if in_no_place or table_entries == 0 or bits_nbytes > BITS_NBYTES_MAX:
        raise FormatError(
            f"the table of the bitmap {name!r} is empty, too large, or in no place for it", path=path, host_off=host_off
        )
    words = -(-header.disk_size >> granularity_bits + 6)
    if not flags & IN_USE and table_entries != -(-8 * words >> header.cluster_bits):
        raise FormatError(f"the table of the bitmap {name!r} is not as large as the disk needs it", path=path, host_off=host_off)
    entry = BitmapEntry(name, 1 << granularity_bits, bool(flags & IN_USE), bool(flags & AUTO), table_off, table_entries)
    return entry, nbytes + 7 & ~7


def dirty_ranges(pread: Callable[[int, int], bytes], entry: BitmapEntry, header: Header, path: str) -> Iterator[Range]:
    """The ranges that a bitmap marks, in order, neighbours merged; read as they are asked for.

    Raises:
        FormatError: the bitmap was not saved, or its table or bits are damaged.
    """
    if entry.in_use:
        raise FormatError(f"the bitmap {entry.name!r} was not saved when the image was last closed", path=path)
    return _merged(_marked_words(pread, entry, header, path), entry.granularity, header.disk_size)


def _marked_words(
    pread: Callable[[int, int], bytes], entry: BitmapEntry, header: Header, path: str
) -> Iterator[tuple[int, int, int]]:
    """(number of the first bit, the word's 64 bits, how many such words follow each other), those that are not zero."""
    words = header.cluster_size // 8
    table = pread(8 * entry.table_entries, entry.table_off)
    if len(table) < 8 * entry.table_entries:
        raise FormatError(
            f"the table of the bitmap {entry.name!r} runs past the end of the file", path=path, host_off=entry.table_off
        )
    for i, (cluster,) in enumerate(struct.iter_unpack(">Q", table)):
        first, host_off = i * words * 64, cluster & _OFFSET_MASK
        if host_off == 0:
            if cluster & 1:
                yield first, _ONES, words
            continue
        bits = pread(header.cluster_size, host_off)
        if cluster & 1 or host_off % header.cluster_size or len(bits) < header.cluster_size:
            raise FormatError(f"the table of the bitmap {entry.name!r} is damaged", path=path, host_off=host_off, value=cluster)
        if bits.count(0) == len(bits):
            continue
        for j, (word,) in enumerate(struct.iter_unpack("<Q", bits)):
            if word:
                yield first + 64 * j, word, 1


def _merged(words: Iterator[tuple[int, int, int]], granularity: int, size: int) -> Iterator[Range]:
    start = end = 0  # of the range so far, in bits
    for at, word, count in words:
        for low, high in [(0, 64 * count)] if word == _ONES else _runs(word):
            if at + low == end and end > start:
                end = at + high
                continue
            if end > start and start * granularity < size:
                yield Range(start * granularity, min(end * granularity, size) - start * granularity)
            start, end = at + low, at + high
    if end > start and start * granularity < size:
        yield Range(start * granularity, min(end * granularity, size) - start * granularity)


def _runs(word: int) -> Iterator[tuple[int, int]]:
    """The runs of ones in a word, from the lowest bit up."""
    at = 0
    while word:
        zeroes = (word & -word).bit_length() - 1
        word >>= zeroes
        ones = (~word & word + 1).bit_length() - 1
        yield at + zeroes, at + zeroes + ones
        word >>= ones
        at += zeroes + ones
