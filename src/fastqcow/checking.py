"""Is an image sound? Its refcounts, compared with what its tables refer to, and what else `qemu-img check` looks at.

The counting is done in the core (check.c); here is what the header, the snapshot table and the bitmaps speak of. No contents are
read: backing and external data files are not even opened, and no password is needed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from fastqcow import _check
from fastqcow.bitmaps import read_directory
from fastqcow.errors import FormatError, UnsupportedError, place_text
from fastqcow.header import L1_NBYTES_MAX, Header
from fastqcow.policy import check_data_file
from fastqcow.snapshots import SnapshotEntry, read_table
from fastqcow.source import open_source

if TYPE_CHECKING:
    from fastqcow._reader import Source
    from fastqcow._types import BinaryFile, Path

__all__ = ["CheckResult", "Finding", "check", "check_source"]

FILE_NBYTES_MAX = 0x7FFF_FFFF_C000_0000  # beyond which QEMU reads nothing
_SEVERITIES = {
    _check.CORRUPTION: "corruption",
    _check.LEAK: "leak",
    _check.CHECK_ERROR: "error",
    _check.OVERLAP: "overlap",
}


class Finding(NamedTuple):
    """Something that a check has found.

    Attributes:
        severity: "corruption"; "leak": space that is lost; "error": something could not be checked; "overlap": a cluster in use for
            different things at once, which its refcount may even allow, and which QEMU does not count.
        reason: a sentence.
        times: how often it counts; of neighbouring clusters, how many there are.
        guest_off: offset on the disk, in bytes, or None; as for the others where they mean nothing.
        host_off: of the table entry, or of the (first) cluster.
        value: the table entry.
        refcount, references: what is stored, and what was counted.
    """

    severity: str
    reason: str
    times: int = 1
    guest_off: int | None = None
    host_off: int | None = None
    value: int | None = None
    refcount: int | None = None
    references: int | None = None

    def __str__(self) -> str:
        counts = ((name, getattr(self, name)) for name in ("refcount", "references"))
        said = "".join(f", {name} {number}" for name, number in counts if number is not None)
        often = f", {self.times} times" if self.times > 1 else ""
        return self.reason + said + often + place_text(self.guest_off, self.host_off, self.value)


class CheckResult(NamedTuple):
    """What a check has counted, as `qemu-img check` does, but for overlaps, which that does not know.

    The total, allocated, compressed and fragmented clusters are those of the disk. image_end_off: behind the last cluster in use.
    not_reported: findings that were counted like the others, but of which a thousand of their kind had been reported.
    """

    corruptions: int
    leaks: int
    check_errors: int
    overlaps: int
    total_clusters: int
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    image_end_off: int
    not_reported: int


def check(source: Path | BinaryFile, *, report: Callable[[Finding], object] | None = None) -> CheckResult:
    """Check an image's tables and refcounts, without changing anything. Dirty images, and such as are marked as corrupt, too.

    Args:
        report: called with each finding, but no more than a thousand of each kind.

    Raises:
        FormatError: the header, or a table of snapshots or bitmaps, is so damaged that nothing can be checked.
        UnsupportedError: a version or a feature that is not known.
        OSError: the file cannot be opened or read.
    """
    return check_source(open_source(source), report)


def check_source(opened: Source, report: Callable[[Finding], object] | None = None) -> CheckResult:
    """As `check`, of a file that is open."""
    header = Header.read(opened.pread, opened.path)
    if header.unsupported:
        raise UnsupportedError(header.unsupported, path=opened.path)
    check_data_file(opened, header)
    checking = _Check(opened, header, report or (lambda _: None))
    try:
        return checking.run()
    finally:
        del checking.checker  # which knows it, and would keep its memory and the file until a garbage collection


class _Check:
    def __init__(self, source: Source, header: Header, report: Callable[[Finding], object]) -> None:
        self.source = source
        self.header = header
        self.report = report
        self.corruptions = self.not_reported = 0
        self.reports: Counter[str] = Counter()
        self.checker = _check.Checker(
            source,
            self.found,
            version=header.version,
            cluster_bits=header.cluster_bits,
            extended_l2=header.extended_l2,
            external_data=header.has_data_file,
            refcount_order=header.refcount_order,
            refcount_table_off=header.refcount_table_off,
            refcount_table_entries=header.refcount_table_clusters * header.cluster_size // 8,
        )

    def found(
        self,
        severity: int,
        reason: str,
        guest_off: int | None,
        host_off: int | None,
        value: int | None,
        refcount: int | None,
        references: int | None,
        times: int,
    ) -> None:
        self.report(Finding(_SEVERITIES[severity], reason, times, guest_off, host_off, value, refcount, references))

    def corruption(self, sentence: str, entry: SnapshotEntry, host_off: int, value: int | None = None) -> None:
        """The sentence may have a place for the snapshot. So many are reported as of each kind in the core."""
        self.corruptions += 1
        self.reports[sentence] += 1
        if self.reports[sentence] > _check.REPORTS_MAX:
            self.not_reported += 1
            return
        reason = sentence.format(f"snapshot {entry.id} ({entry.name})")
        self.report(Finding("corruption", reason, host_off=host_off, value=value))

    def use(self, role: int, tables: list[tuple[int, int]]) -> None:
        """Count the references to tables, given as (offset, entries). Where they lie over each other, each cluster is met once."""
        size, behind = self.header.cluster_size, self.source.size + self.header.cluster_size
        clusters = []
        for off, entries in tables:
            if off + entries * 8 >= behind:
                self.checker.use(role, off, entries * 8, 1)  # which says so
            elif entries:
                start, end = off // size * size, -(-(off + entries * 8) // size) * size
                clusters.append((start, (end - start) // 8))
        for start, end, _, times in _disjoint((0, 0), clusters):
            self.checker.use(role, start, min(end, behind) - 1 - start, times)  # the end of the file may cut the last cluster

    def run(self) -> CheckResult:
        header, checker = self.header, self.checker
        snapshots = read_table(self.source.pread, header, self.source.path)
        bitmaps = read_directory(self.source.pread, header, self.source.path)
        self.check_place("L1", header.l1_off, header.l1_entries * 8)
        self.check_place("refcount", header.refcount_table_off, header.refcount_table_clusters * header.cluster_size)
        checker.use(_check.HEADER, 0, header.cluster_size, 1)
        checker.use(_check.REFCOUNT_TABLE, header.refcount_table_off, header.refcount_table_clusters * header.cluster_size, 1)
        if header.crypto:
            checker.use(_check.OTHER, header.crypto.host_off, header.crypto.nbytes, 1)
        tables = self.check_snapshots(snapshots)
        bitmap_tables = [(bitmap.table_off, bitmap.table_entries) for bitmap in bitmaps]
        self.use(_check.OTHER, bitmap_tables)
        for start, end, _, times in _disjoint((0, 0), bitmap_tables):
            checker.bitmap(start, (end - start) // 8, times)
        if header.bitmaps and bitmaps:
            checker.use(_check.OTHER, header.bitmaps.directory_off, header.bitmaps.directory_nbytes, 1)
        checker.use(_check.L1, header.l1_off, header.l1_entries * 8, 1)
        self.use(_check.SNAPSHOT_L1, tables)
        for start, end, active, inactive in _disjoint((header.l1_off, header.l1_entries), tables):
            checker.l1(start, (end - start) // 8, (start - header.l1_off) // 8 if active else 0, active, inactive)
        counts = checker.finish()
        return CheckResult(
            corruptions=counts["corruptions"] + self.corruptions,
            leaks=counts["leaks"],
            check_errors=counts["check_errors"],
            overlaps=counts["overlaps"],
            total_clusters=-(-header.disk_size // header.cluster_size),
            allocated_clusters=counts["allocated_clusters"],
            compressed_clusters=counts["compressed_clusters"],
            fragmented_clusters=counts["fragmented_clusters"],
            image_end_off=counts["image_end_off"],
            not_reported=counts["not_reported"] + self.not_reported,
        )

    def check_snapshots(self, snapshots: tuple[SnapshotEntry, ...]) -> list[tuple[int, int]]:
        """The L1 tables of those that can have one: offset and entries."""
        header, at, tables = self.header, self.header.snapshots_off, []
        if snapshots and header.has_data_file:
            self.corruption("there are snapshots in an image with an external data file", snapshots[0], at)
        for i, entry in enumerate(snapshots):
            if header.version >= 3 and not entry.has_disk_size:
                self.corruption("the entry of {} lacks what version 3 asks for", entry, at)
            if entry.l1_off % header.cluster_size:
                self.corruption("the L1 table of {} is not aligned to a cluster", entry, at, entry.l1_off)
            elif entry.l1_entries * 8 > L1_NBYTES_MAX:
                self.corruption("the L1 table of {} is too large", entry, at, entry.l1_entries)
            else:
                self.check_place(f"snapshot {entry.id} ({entry.name})'s L1", entry.l1_off, entry.l1_entries * 8)
                tables.append((entry.l1_off, entry.l1_entries))
            at += entry.nbytes if i == len(snapshots) - 1 else entry.nbytes + 7 & ~7
        self.checker.use(_check.OTHER, header.snapshots_off, at - header.snapshots_off, 1)
        return tables

    def check_place(self, name: str, off: int, nbytes: int) -> None:
        if off + nbytes > FILE_NBYTES_MAX:
            raise FormatError(f"the {name} table lies beyond any file's end", path=self.source.path, value=off)


def _disjoint(active: tuple[int, int], inactive: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """The stretches of the file in tables, given as (offset, entries): start, end, and how many of each sort lie there.

    Tables do not share their space. Where they lie over each other all the same, as somebody might make them to keep us busy, each
    entry is still read once.
    """
    changes: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for sort, (off, entries) in [(0, active), *((1, table) for table in inactive)]:
        changes[off][sort] += 1
        changes[off + entries * 8][sort] -= 1
    counts = [0, 0]
    for start, end in pairwise(sorted(changes)):
        counts = [count + change for count, change in zip(counts, changes[start], strict=True)]
        if any(counts):
            yield start, end, counts[0], counts[1]
