"""Images that cost their maker little and might cost a reader much."""

from __future__ import annotations

import struct
from pathlib import Path

from images import (
    COPIED,
    L1,
    L2,
    PAYLOAD,
    ZERO,
    build,
    compressed_entry,
    data_entry,
    deflate,
    extension,
    patched,
    snapshot_entry,
    text,
)


class _Bits:
    """Written from the lowest bit up, as deflate and zstd have them."""

    def __init__(self) -> None:
        self.value = self.count = 0

    def put(self, *fields: tuple[int, int]) -> _Bits:
        for value, count in fields:
            self.value |= value << self.count
            self.count += count
        return self

    def bytes(self) -> bytes:
        return self.value.to_bytes(-(-self.count // 8), "little")


def _empty_dynamic_block() -> _Bits:
    """The shortest one: codes for the end of the block and one distance, and the code lengths' own code of two symbols."""
    lengths = {18: 1, 1: 1}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    return _Bits().put(
        (0b100, 3),
        (0, 5),
        (0, 5),
        (len(order) - 4, 4),
        *((lengths.get(symbol, 0), 3) for symbol in order),
        *((1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7)),  # no codes for the 256 literals
        *((0, 1), (0, 1), (0, 1)),  # a code for the end, one for a distance; and the end
    )


def slow_deflate(nbytes: int, out_nbytes: int, *, ends: bool = True) -> bytes:
    """Blocks with nothing in them, and one code after the other to be built: dynamic and fixed ones in turn. Then out_nbytes of
    zeroes where it `ends`."""
    pair = _empty_dynamic_block().put((0b010, 3), (0, 7))
    last = deflate(bytes(out_nbytes), window_bits=15) if ends else b""
    eight = _Bits().put(*[(pair.value, pair.count)] * 8).bytes()
    return eight * ((nbytes - len(last)) // len(eight)) + last


def _fse(log: int, probabilities: list[int]) -> bytes:
    """RFC 8878, 4.1.1."""
    bits, left = _Bits().put((log - 5, 4)), 1 << log
    for probability in probabilities:
        value, count = probability + 1, (left + 1).bit_length()
        low = (1 << count) - 1 - (left + 1)
        if value < low:
            bits.put((value, count - 1))
        else:
            bits.put((value if value < 1 << count - 1 else value + low, count))
        left -= probability
    return bits.bytes()


def slow_zstd(nbytes: int, out_nbytes: int) -> bytes:
    """A frame of blocks with one sequence each, and three tables of their own for it, of the largest size; then zeroes."""

    def block(kind: int, size: int, body: bytes = b"", last: int = 0) -> bytes:
        return struct.pack("<I", last | kind << 1 | size << 3)[:3] + body

    literal = b"\x08\0"
    tables = _fse(9, [1, 511]) + _fse(8, [255, 1]) + _fse(9, [511, 1])
    states = (((1 << 9 | 1) << 8 | 5) << 9 | 7).to_bytes(4, "little")
    body = literal + b"\x01\xa8" + tables + states
    one = block(2, len(body), body)
    each = 4  # bytes that a block makes: the literal, and a match of three
    head = struct.pack("<IBB", 0xFD2FB528, 0, 0x58) + block(0, 8, bytes(8))
    count = min((nbytes - 64 - out_nbytes // 8192) // len(one), (out_nbytes - 8) // each)
    left = out_nbytes - 8 - each * count
    zeroes = b"".join(block(1, min(left - at, 1 << 17), b"\0") for at in range(0, left, 1 << 17))
    return head + one * count + zeroes + block(0, 0, b"", 1)


# Images, as bytes. What lies where it should not is laid there by a header or a table.

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
ENTRIES = CLUSTER // 8
FEATURE_NAMES, BITMAPS, UNKNOWN = 0x6803F857, 0x23852875, 0x12345678
SNAPSHOTS_MAX, BITMAPS_MAX, TABLE_NBYTES_MAX = 65_536, 65_535, 64 << 20


def claims(size: int, *, cluster_bits: int = 12) -> bytes:
    """64 KiB that say they are a disk of this size."""
    return build([0], size=size, l1=[0], cluster_bits=cluster_bits)[:CLUSTER].ljust(CLUSTER, b"\0")


def all_in_the_header() -> bytes:
    """64 KiB: the L1 table, the refcount table and the snapshots start where the header does; the clusters are the largest."""
    head = claims(ENTRIES << 39, cluster_bits=21)
    return patched(head, 36, struct.pack(">IQQIIQ", ENTRIES, 0, 1 << 21, 1, 0, 0))


def largest() -> bytes:
    """The largest disk that is accepted, 2^61 bytes, with nothing on it: 32 MiB of L1 table, all hole."""
    image = build([0], size=1 << 61, l1=[0], cluster_bits=21)
    return patched(image, 36, struct.pack(">I", 1 << 22)).ljust((4 << 20) + (32 << 20), b"\0")


STREAM = deflate(text(CLUSTER))
ONE_FOR_ALL = {
    "compressed": [compressed_entry(AT, len(STREAM), 16)],
    "compressed and nothing in turn": [compressed_entry(AT, len(STREAM), 16), 0],
    "plain": [data_entry(AT)],
    "the L2 table": [data_entry(L2 * CLUSTER)],
    "the header": [data_entry(0) | ZERO],
}


def one_for_all(kind: str) -> bytes:
    """A disk of 4 TiB in 280 KB: one L2 table for all L1 entries, and in it one cluster for all."""
    entries = ONE_FOR_ALL[kind] * (ENTRIES // len(ONE_FOR_ALL[kind]))
    return build(entries, STREAM.ljust(CLUSTER, b"\0"), l1=[COPIED | L2 * CLUSTER] * ENTRIES, size=ENTRIES * ENTRIES * CLUSTER)


def l1_is_l2() -> bytes:
    """The L1 table's entries point to itself."""
    return build([0], l1=[COPIED | L1 * CLUSTER] * ENTRIES, size=ENTRIES * ENTRIES * CLUSTER)


def small_clusters() -> bytes:
    """Clusters of 512 bytes on the largest disk that they can make, 128 GiB, with one L2 table for all."""
    entries = [data_entry(PAYLOAD * 512) if i % 2 else 0 for i in range(64)]
    image = build(entries, bytes(512), size=1 << 37, l1=[COPIED | L2 * 512], cluster_bits=9)
    image = patched(image, 36, struct.pack(">IQ", 1 << 22, 1 << 20)).ljust(1 << 20, b"\0")
    return image + struct.pack(">Q", COPIED | L2 * 512) * (1 << 22)


def snapshots(entry: bytes | None, *, cluster_bits: int = 16, table_off: int = AT) -> bytes:
    """As many as there may be, or as fit into the largest table; None: entries of 40 zeroes, which are valid."""
    size = 1 << cluster_bits
    count = SNAPSHOTS_MAX if entry is None else min(SNAPSHOTS_MAX, TABLE_NBYTES_MAX // len(entry))
    image = patched(build([0], size=size, cluster_bits=cluster_bits), 60, struct.pack(">IQ", count, table_off))
    return image.ljust(table_off, b"\0") + (entry or bytes(40)) * count


def long_names() -> bytes:
    """64 MiB of bytes that are no text."""
    return snapshots(snapshot_entry(b"1", b"\xff" * 950, l1_off=L1 * CLUSTER, extra=struct.pack(">QQ", 0, CLUSTER)))


def costly_snapshots(nbytes: int) -> bytes:
    """Each number in an entry is a large one; each of its two names is this long and has four bytes of memory for each of its own,
    as one of its characters needs them."""
    name = "\N{COW}".encode().ljust(nbytes, b"a")
    extra = struct.pack(">QQQ", 1 << 63, 1 << 62, 1 << 61) + b"extra"
    head = struct.pack(">QIHHIIQII", 1 << 62, 1 << 31, nbytes, nbytes, 1 << 31, 1 << 31, 1 << 62, 0, len(extra))
    entry = head + extra + name + name
    return snapshots(entry.ljust(len(entry) + 7 & ~7, b"\0"))


def long_snapshot_tables() -> bytes:
    """65,536 L1 tables of 32 MiB, one over the other."""
    entry = snapshot_entry(b"1", b"a", l1_off=1 << 20, l1_entries=1 << 22, extra=struct.pack(">QQ", 0, 512))
    return snapshots(entry, cluster_bits=9, table_off=33 << 20)


def bitmap_directory(ending: bytes = b"") -> bytes:
    """65,535 bitmaps, with one table; the ending of their names is a multiple of eight bytes."""
    head = struct.pack(">QIIBBHI", AT, 1, 0, 1, 16, 8 + len(ending), 0)
    names = b"".join(head + b"%08d" % i + ending for i in range(BITMAPS_MAX))
    found = extension(BITMAPS, struct.pack(">IIQQ", BITMAPS_MAX, 0, len(names), AT + CLUSTER))
    return patched(build([0], size=CLUSTER, extensions=found), 88, struct.pack(">Q", 1)) + bytes(CLUSTER) + names


def bits_that_take_turns() -> bytes:
    """A bitmap of the largest disk with clusters of 512 bytes. Its table's entries are all one cluster, of every other bit."""
    disk, directory_off, table_off, l1_off = 1 << 37, 5 * 512, 1 << 20, 8 << 20
    entries = disk // 512 // 8 // 512
    found = extension(BITMAPS, struct.pack(">IIQQ", 1, 0, 32, directory_off))
    image = patched(build([0], size=disk, l1=[0], cluster_bits=9, extensions=found), 88, struct.pack(">Q", 1))
    image = patched(image, 36, struct.pack(">IQ", 1 << 22, l1_off)).ljust(4 * 512, b"\0") + b"\x55" * 512
    image += struct.pack(">QIIBBHI", table_off, entries, 0, 1, 9, 1, 0) + b"b".ljust(8, b"\0")
    return (image.ljust(table_off, b"\0") + struct.pack(">Q", 4 * 512) * entries).ljust(l1_off + (32 << 20), b"\0")


def extensions() -> bytes:
    """1,023 that nobody knows, in the largest header cluster."""
    return build([0], size=CLUSTER, cluster_bits=21, extensions=extension(UNKNOWN, b"\xff" * 2000) * 1023)


def feature_names() -> bytes:
    """43,690 rows, for 192 features."""
    return build([0], size=CLUSTER, cluster_bits=21, extensions=extension(FEATURE_NAMES, b"\xff" * 48 * 43_600))


def slow_clusters(codec: str, cluster_bits: int) -> bytes:
    """Sixteen clusters, all with one stream that takes as long as one can. (Deflate that is longer than a cluster takes less.)"""
    size = 1 << cluster_bits
    stream = slow_zstd(2 * size - 2048, size) if codec == "zstd" else slow_deflate(size - 2048, size)
    entry = compressed_entry(PAYLOAD * size, len(stream), cluster_bits)
    return build([entry] * 16, stream, cluster_bits=cluster_bits, zstd=codec == "zstd")


def pages_of_counters() -> bytes:
    """The start of an image of 512 GiB, whose clusters of data are 1,024 from each other: each needs a page for itself."""
    return build([data_entry(AT + i * 1024 * CLUSTER) for i in range(ENTRIES)])


def write_sparse(path: Path, image: bytes, nbytes: int = 0) -> Path:
    """Holes where there are zeroes: a file can be long and take no space."""
    with path.open("wb") as f:
        f.truncate(max(len(image), nbytes))
        for at in range(0, len(image), 4096):
            page = image[at : at + 4096]
            if page.count(0) != len(page):
                f.seek(at)
                f.write(page)
    return path


def write_chain(folder: Path, depth: int, *, snapshots_in_each: bool = False, extended_header: bool = False) -> Path:
    """The top of a chain, in all files of which an L2 table is there, with nothing in it but in the last one's."""
    for i in range(depth):
        backing = (f"{i + 1}.qcow2", "qcow2") if i < depth - 1 else None
        bits = 21 if extended_header else 16
        entries = [0] * ENTRIES if backing else [data_entry(PAYLOAD << bits)] * ENTRIES
        found = extension(FEATURE_NAMES, b"\xff" * 48 * 20_000) + extension(UNKNOWN, bytes(1 << 20)) if extended_header else b""
        image = build(entries, b"" if backing else text(CLUSTER), cluster_bits=bits, backing=backing, extensions=found)
        if snapshots_in_each:
            at = AT if backing else AT + CLUSTER  # behind the data
            image = patched(image.ljust(at, b"\0"), 60, struct.pack(">IQ", SNAPSHOTS_MAX, at)).ljust(at + 40 * SNAPSHOTS_MAX, b"\0")
        write_sparse(folder / f"{i}.qcow2", image)
    return folder / "0.qcow2"
