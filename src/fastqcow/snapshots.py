"""The table of internal snapshots (specification, "Snapshots"), as named tuples.

The table has no index: each entry says how long it is. What bounds the walk is the count in the header (checked there), the limit
on an entry's extra data, and one on the whole table; all as in QEMU's qcow2-snapshot.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from fastqcow.errors import FormatError
from fastqcow.header import L1_NBYTES_MAX, Header, c_string

__all__ = ["SnapshotEntry", "check", "find", "read_entry", "read_table"]

EXTRA_NBYTES_MAX = 1024
TABLE_NBYTES_MAX = 64 << 20
_ENTRY = struct.Struct(">QIHHIIQII")


class SnapshotEntry(NamedTuple):
    """An entry of the snapshot table.

    Attributes:
        id, name: as `qemu-img snapshot -l` lists them.
        l1_off, l1_entries: of the snapshot's own L1 table.
        disk_size: bytes that the disk had; where that was not stored, as of QEMU before 1.1, those that it has now.
        has_disk_size: whether it was stored.
        vm_state_size: bytes of the saved state of the machine, 0 if it was not saved.
        date_sec, date_nsec: when it was taken, since 1970 in UTC.
        vm_clock_nsec: how long the machine had run.
        icount: instructions that it had executed, where they were counted.
        extra: extra data that is not known.
        nbytes: of the entry in its table, which goes on behind it at the next multiple of 8.
    """

    id: str
    name: str
    l1_off: int
    l1_entries: int
    disk_size: int
    has_disk_size: bool
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    icount: int | None
    extra: bytes
    nbytes: int


def read_table(pread: Callable[[int, int], bytes], header: Header, path: str) -> tuple[SnapshotEntry, ...]:
    """All entries of the snapshot table.

    Raises:
        FormatError: the table is damaged, or larger than a limit.
    """
    found = []
    at = header.snapshots_off
    for _ in range(header.snapshot_count):
        entry = read_entry(pread, at, header, path)
        found.append(entry)
        at += entry.nbytes + 7 & ~7
        if at - header.snapshots_off > TABLE_NBYTES_MAX:
            raise FormatError(f"the snapshot table is larger than {TABLE_NBYTES_MAX >> 20} MiB", path=path, host_off=at)
    return tuple(found)


def read_entry(pread: Callable[[int, int], bytes], at: int, header: Header, path: str) -> SnapshotEntry:
    """The entry of the snapshot table at a host offset.

    Raises:
        FormatError: the file ends within it, or it has too much extra data.
    """
    head = pread(_ENTRY.size, at)
    if len(head) < _ENTRY.size:
        raise FormatError("the snapshot table runs past the end of the file", path=path, host_off=at)
    l1_off, l1_entries, id_nbytes, name_nbytes, date_sec, date_nsec, vm_clock, vm_state_size, extra_nbytes = _ENTRY.unpack(head)
    if extra_nbytes > EXTRA_NBYTES_MAX:
        raise FormatError(
            f"a snapshot has more than {EXTRA_NBYTES_MAX} bytes of extra data", path=path, host_off=at, value=extra_nbytes
        )
    nbytes = extra_nbytes + id_nbytes + name_nbytes
    rest = pread(nbytes, at + _ENTRY.size)
    if len(rest) < nbytes:
        raise FormatError("the snapshot table runs past the end of the file", path=path, host_off=at)
    extra, disk_size, icount = rest[:extra_nbytes], header.disk_size, None
    if extra_nbytes >= 8:
        vm_state_size = int.from_bytes(extra[:8], "big")
    if extra_nbytes >= 16:
        disk_size = int.from_bytes(extra[8:16], "big")
    if extra_nbytes >= 24:
        icount = int.from_bytes(extra[16:24], "big")
    return SnapshotEntry(
        id=c_string(rest[extra_nbytes : extra_nbytes + id_nbytes]),
        name=c_string(rest[extra_nbytes + id_nbytes :]),
        l1_off=l1_off,
        l1_entries=l1_entries,
        disk_size=disk_size,
        has_disk_size=extra_nbytes >= 16,
        vm_state_size=vm_state_size,
        date_sec=date_sec,
        date_nsec=date_nsec,
        vm_clock_nsec=vm_clock,
        icount=None if icount == (1 << 64) - 1 else icount,
        extra=extra[24:],
        nbytes=_ENTRY.size + nbytes,
    )


def find(entries: tuple[SnapshotEntry, ...], name_or_id: str) -> SnapshotEntry | None:
    """The snapshot of this id, else of this name: QEMU's order."""
    for entry in entries:
        if entry.id == name_or_id:
            return entry
    for entry in entries:
        if entry.name == name_or_id:
            return entry
    return None


def check(entry: SnapshotEntry, header: Header, path: str) -> None:
    """What has to hold before the snapshot's L1 table is used.

    Raises:
        FormatError: its L1 table is too large, too small for its disk, or in a place where none can be.
    """
    if entry.l1_entries * 8 > L1_NBYTES_MAX:
        raise FormatError(f"the snapshot's L1 table is larger than {L1_NBYTES_MAX >> 20} MiB", path=path, value=entry.l1_entries)
    if entry.l1_off % header.cluster_size or entry.l1_off >= 1 << 63:
        raise FormatError("the snapshot's L1 table is not aligned to a cluster, or beyond any file", path=path, value=entry.l1_off)
    if entry.has_disk_size and entry.l1_entries << header.l1_covers_bits < entry.disk_size:
        raise FormatError("the snapshot's L1 table is too small for its disk", path=path, value=entry.l1_entries)
