"""What an image is made of: how much of it is compressed, plain and empty, where, and how well it was compressed.

The tables are walked in pieces of a page, so that what is held at once does not depend on the image. Of an image with more table
than TABLE_NBYTES_MAX every so many pieces are read, spread evenly over the tables that there are, and stand for those between them.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fastqcow import _l2
from fastqcow.clusters import L2Table, parse_l2
from fastqcow.image import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastqcow.header import Header
    from fastqcow.image import Image

__all__ = ["CELLS", "KINDS", "REQUEST_SIZES", "MakeUp", "make_up"]

TABLE_NBYTES_MAX = 8 << 20
PIECE_NBYTES = 4096
L1_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
CELLS = 1024
BINS = 32
REQUEST_SIZES = (4 << 10, 64 << 10, 1 << 20)
KINDS = ("compressed", "plain", "zero", "unallocated", "invalid")
_OF_KIND = {
    _l2.UNALLOCATED: "unallocated",
    _l2.UNALLOCATED_ALLOC: "unallocated",
    _l2.ZERO: "zero",
    _l2.ZERO_ALLOC: "zero",
    _l2.DATA: "plain",
    _l2.COMPRESSED: "compressed",
}


@dataclass(frozen=True, slots=True)
class MakeUp:
    """What the tables of one file say; its backing files are not looked at. Sizes are bytes.

    Attributes:
        unit_size: what `units` counts: clusters, or with extended L2 entries subclusters.
        units: how many of them are of each of KINDS: compressed, plain, zero (said to be), unallocated (of which the backing file
            may hold bytes), invalid (with an entry that makes no sense, or a table that is not there).
        compressed_clusters, compressed_nbytes: clusters, and the bytes in the file that they take: each up to where the next one
            starts, or where its last sector ends.
        compressed_sizes: how many of them take up to 1/32, 2/32, ... of a cluster; the last number is of those that take more.
        amplification: what a reader that keeps nothing, as QEMU's, inflates for each byte that an aligned request of so many bytes
            asks for where clusters are compressed.
        cells: the disk from its start to its end in up to CELLS parts of one size, and of each the share of its units that is
            compressed, plain, zero and invalid, from 0 to 1; the rest is unallocated.
        looked_at: the share of the tables that was read: below 1, the numbers are an estimate.
    """

    virtual_size: int
    file_size: int
    cluster_size: int
    unit_size: int
    compression_type: str
    has_backing: bool
    units: dict[str, int]
    compressed_clusters: int
    compressed_nbytes: int
    compressed_sizes: tuple[int, ...]
    amplification: dict[int, float]
    cells: tuple[tuple[float, float, float, float], ...]
    looked_at: float

    @property
    def ratio(self) -> float | None:
        """Bytes of the compressed clusters when inflated, over those that they take; None if there are none."""
        return self.compressed_clusters * self.cluster_size / self.compressed_nbytes if self.compressed_nbytes else None


def make_up(image: Image) -> MakeUp:
    """Look through an image's tables, or those of a snapshot. Damage is counted, and raises nothing.

    Raises:
        OSError: the file cannot be read.
        ValueError: the image is closed.
    """
    return _Walk(image).run()


class _Walk:
    def __init__(self, image: Image) -> None:
        self.header: Header = image.header
        self.source = image._open_reader().source
        self.size = image.size
        self.entry_nbytes = 16 if self.header.extended_l2 else 8
        self.units_a_cluster = 32 if self.header.extended_l2 else 1
        self.unit_size = self.header.cluster_size // self.units_a_cluster
        self.clusters = -(-self.size // self.header.cluster_size)
        self.units = -(-self.size // self.unit_size)
        table = self.header if not isinstance(image, Snapshot) else image.entry
        self.l1_off, self.l1_entries = table.l1_off, table.l1_entries
        self.counts = dict.fromkeys(KINDS, 0)
        self.compressed = self.compressed_nbytes = 0
        self.sizes = [0] * (BINS + 1)
        self.cell_count = min(CELLS, self.units)
        self.cells = [[0] * (self.cell_count + 1) for _ in KINDS]

    def run(self) -> MakeUp:
        looked_at, total = 0, 0
        pieces, step = self.pieces()
        for first_cluster, clusters, host_off in pieces:
            self.piece(first_cluster, clusters, host_off, step)
            looked_at, total = looked_at + 1, total + step
        found = sum(self.counts[kind] for kind in KINDS if kind != "unallocated")
        self.counts["unallocated"] = max(self.units - found, 0)
        return MakeUp(
            virtual_size=self.size,
            file_size=self.source.size,
            cluster_size=self.header.cluster_size,
            unit_size=self.unit_size,
            compression_type=self.header.compression_type,
            has_backing=self.header.backing_name is not None,
            units=self.counts,
            compressed_clusters=self.compressed,
            compressed_nbytes=self.compressed_nbytes,
            compressed_sizes=tuple(self.sizes),
            amplification={n: max(1.0, self.header.cluster_size / n) for n in REQUEST_SIZES} if self.compressed else {},
            cells=tuple(self.cell(i) for i in range(self.cell_count)),
            looked_at=looked_at / total if total else 1.0,
        )

    def pieces(self) -> tuple[Iterator[tuple[int, int, int | None]], int]:
        """What to read, as (first cluster, clusters, host offset or None); and for how many pieces each of them stands."""
        covers = self.header.l1_covers_bits - self.header.cluster_bits
        count = min(self.l1_entries, -(-self.clusters >> covers))
        l1 = array("Q", self.source.pread(count * 8, self.l1_off).ljust(count * 8, b"\0"))
        if sys.byteorder == "little":
            l1.byteswap()
        used = array("L", (i for i, entry in enumerate(l1) if entry & L1_OFFSET_MASK))
        piece = min(PIECE_NBYTES // self.entry_nbytes, 1 << covers)
        a_table = (1 << covers) // piece
        step = -(-len(used) * a_table * piece * self.entry_nbytes // TABLE_NBYTES_MAX) or 1

        def each() -> Iterator[tuple[int, int, int | None]]:
            for number in range(0, len(used) * a_table, step):
                table, within = divmod(number, a_table)
                first = (used[table] << covers) + within * piece
                clusters = min(piece, self.clusters - first)
                if clusters > 0:
                    table_off = l1[used[table]] & L1_OFFSET_MASK
                    aligned = table_off % self.header.cluster_size == 0
                    yield first, clusters, table_off + within * piece * self.entry_nbytes if aligned else None

        return each(), step

    def piece(self, first_cluster: int, clusters: int, host_off: int | None, weight: int) -> None:
        """Count a piece of a table, which stands for `weight` of them; host_off is None where the table cannot be."""
        header, first = self.header, first_cluster * self.units_a_cluster
        data = self.source.pread(clusters * self.entry_nbytes, host_off) if host_off is not None else b""
        table = parse_l2(
            data[: len(data) // self.entry_nbytes * self.entry_nbytes],
            cluster_bits=header.cluster_bits,
            extended=header.extended_l2,
            version=header.version,
        )
        kinds = bytes(table.kind).ljust(clusters * self.units_a_cluster, bytes((_l2.INVALID,)))[: self.units - first]
        last = first + len(kinds)
        borders = [first]
        cell = first * self.cell_count // self.units
        while borders[-1] < last:
            cell += 1
            borders.append(min(-(-cell * self.units // self.cell_count), last))
        for start, end in pairwise(borders):
            of_cell = kinds[start - first : end - first]
            left = len(of_cell)
            for kind, name in _OF_KIND.items():
                count = of_cell.count(kind)
                left -= count
                self.count(name, start, count * weight)
            self.count("invalid", start, left * weight)
        self.count_sizes(table, weight)

    def count(self, name: str, unit: int, count: int) -> None:
        self.counts[name] += count
        self.cells[KINDS.index(name)][unit * self.cell_count // self.units] += count

    def cell(self, number: int) -> tuple[float, float, float, float]:
        """A part's shares. With pieces that stand for others these may come to more than there is."""
        start, end = (-(-at * self.units // self.cell_count) for at in (number, number + 1))
        compressed, plain, zero, unallocated, invalid = (kind[number] for kind in self.cells)
        total = max(end - start, compressed + plain + zero + unallocated + invalid)
        return compressed / total, plain / total, zero / total, invalid / total

    def count_sizes(self, table: L2Table, weight: int) -> None:
        """Streams lie side by side, and each entry tells only in which sector its own ends: the next one tells more."""
        every = self.units_a_cluster
        found = sorted((off, n) for off, n in zip(table.host_off[::every], table.in_nbytes[::every], strict=True) if n)
        self.compressed += len(found) * weight
        ends = [*(off for off, _ in found[1:]), 1 << 64][: len(found)]
        cluster_size = self.header.cluster_size
        for (off, in_nbytes), end in zip(found, ends, strict=True):
            nbytes = min(in_nbytes, end - off) if end > off else in_nbytes
            self.compressed_nbytes += nbytes * weight
            self.sizes[min((nbytes * BINS - 1) // cluster_size, BINS)] += weight
