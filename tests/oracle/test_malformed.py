"""Malformed and odd images, part by part: fastqcow reads what QEMU reads, and refuses what QEMU refuses.

Where fastqcow differs on purpose, the case says why. Headers that both refuse stand in test_header.py, streams in test_verdicts.py,
images with external data files in test_data_file.py.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest

import fastqcow
from cases import TRUNCATED, Case, Place, check, check_check, check_commands, check_info, check_map, check_verdict, raises
from conftest import Qemu
from images import (
    COPIED,
    L1,
    L2,
    PAYLOAD,
    REFCOUNT_TABLE,
    ZERO,
    build,
    compressed_entry,
    data_entry,
    deflate,
    extension,
    noise,
    patched,
    snapshot_entry,
    text,
)

CLUSTER = 1 << 16
AT = PAYLOAD * CLUSTER
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
ZEROES = bytes(CLUSTER)
STREAM = deflate(TEXT)
ALLOC = 0xFFFF_FFFF
ONE = data_entry(AT)
GOOD = build([ONE], PLAIN)
# All but the offset and the flags.
L1_RESERVED = 0x7F << 56 | 0x1FF
L2_RESERVED = 0x3F << 56 | 0x1FE


def u32(at: int, value: int, image: bytes = GOOD) -> bytes:
    return patched(image, at, struct.pack(">I", value))


def u64(at: int, value: int, image: bytes = GOOD) -> bytes:
    return patched(image, at, struct.pack(">Q", value))


def table(*entries: int, nbytes: int = CLUSTER) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries).ljust(nbytes, b"\0")


def bad_entry(entry: int, image: bytes | None = None) -> Case:
    return Case(build([entry], PLAIN) if image is None else image, None, place=Place(0, L2 * CLUSTER, entry))


def bad_bitmap(entry: int, bitmap: int) -> Case:
    return Case(build([(entry, bitmap)], PLAIN, extended=True), None, place=Place(0, L2 * CLUSTER, bitmap))


def lost(image: bytes, host_off: int) -> Case:
    return Case(image, None, TRUNCATED, Place(0, host_off, len(image)))


def compressed_far(host_off: int) -> Case:
    """Beyond the end of the file. The offset's field has 61 bits with clusters of 512 bytes."""
    image = build([compressed_entry(host_off, 512, 9)], PLAIN, cluster_bits=9)
    return Case(image, None, place=Place(0, host_off, len(image)))


UNALIGNED = data_entry(AT + 512)
SELF = COPIED | L1 * CLUSTER
TO_HEADER = compressed_entry(0, 3000, 16)
PACKED = compressed_entry(AT, len(STREAM), 16)
TABLES = {
    "data": Case(GOOD, PLAIN),
    "data, unaligned": bad_entry(UNALIGNED),
    "data, cut by the end of the file": Case(build([ONE], PLAIN[:1000]), PLAIN[:1000] + bytes(CLUSTER - 1000)),
    "data, beyond the end of the file": lost(build([data_entry(AT + CLUSTER)], PLAIN), AT + CLUSTER),
    "data, right at the end of the file": lost(build([ONE]), AT),
    "data, at 2^56 less a cluster": lost(build([data_entry((1 << 56) - CLUSTER)]), (1 << 56) - CLUSTER),
    "data, at 2^56": Case(build([data_entry(1 << 56)], PLAIN), ZEROES),
    "data, at 2^56 and more": Case(build([data_entry(1 << 56 | AT)], PLAIN), PLAIN),
    "data, at the header": Case(build([data_entry(0)], PLAIN), ZEROES),
    "data, at the L2 table itself": Case(build([data_entry(L2 * CLUSTER)]), table(data_entry(L2 * CLUSTER))),
    "data, at the L1 table": Case(build([data_entry(L1 * CLUSTER)]), table(COPIED | L2 * CLUSTER)),
    "data, twice": Case(build([ONE, ONE], PLAIN), PLAIN * 2),
    "zero": Case(build([ZERO], PLAIN), ZEROES),
    "zero with a place": Case(build([ONE | ZERO], PLAIN), ZEROES),
    "zero with an unaligned place": bad_entry(UNALIGNED | ZERO),
    "zero with a place beyond the end of the file": Case(build([data_entry(AT + CLUSTER) | ZERO], PLAIN), ZEROES),
    "zero in version 2": bad_entry(ONE | ZERO, build([ONE | ZERO], PLAIN, version=2)),
    "plain zero in version 2": bad_entry(ZERO, build([ZERO], version=2)),
    "unallocated": Case(build([0, ONE], PLAIN), ZEROES + PLAIN),
    "unallocated, COPIED": Case(build([COPIED, ONE], PLAIN), ZEROES + PLAIN),
    "reserved bits of an entry": Case(build([ONE | L2_RESERVED], PLAIN), PLAIN),
    "reserved bits of an entry, and no more": Case(build([L2_RESERVED], PLAIN), ZEROES),
    "reserved bits of a zero entry": Case(build([ZERO | L2_RESERVED], PLAIN), ZEROES),
    "compressed, COPIED": Case(build([PACKED | COPIED], STREAM + bytes(999)), TEXT),
    "compressed, in version 2": Case(build([PACKED], STREAM + bytes(999), version=2), TEXT),
    "compressed, at the header": Case(build([TO_HEADER]), None, place=Place(0, 0, TO_HEADER)),
    "compressed, at 2^56": compressed_far(1 << 56),
    "compressed, at 2^56 and more": compressed_far(1 << 56 | PAYLOAD * 512),
    "compressed, at 2^61 less a sector": compressed_far((1 << 61) - 512),
    "L2 table unaligned": Case(
        build([ONE], PLAIN, l1=[COPIED | L2 * CLUSTER + 512]), None, place=Place(0, None, COPIED | L2 * CLUSTER + 512)
    ),
    "L2 table beyond the end of the file": lost(build([ONE], PLAIN, l1=[COPIED | 99 * CLUSTER]), 99 * CLUSTER),
    "L2 table cut by the end of the file": lost(build([ZERO])[:-100], L2 * CLUSTER),
    "L2 table at 2^56 less a cluster": lost(build([ONE], PLAIN, l1=[(1 << 56) - CLUSTER]), (1 << 56) - CLUSTER),
    "L2 table at 2^56": Case(build([ONE], PLAIN, l1=[COPIED | 1 << 56]), ZEROES),
    "L2 table at 2^56 and more": Case(build([ONE], PLAIN, l1=[1 << 56 | L2 * CLUSTER]), PLAIN),
    "reserved bits of the L1 entry": Case(build([ONE], PLAIN, l1=[COPIED | L2 * CLUSTER | L1_RESERVED]), PLAIN),
    "reserved bits of the L1 entry, and no more": Case(build([ONE], PLAIN, l1=[L1_RESERVED]), ZEROES),
    "L2 table: the header": Case(build([ONE], PLAIN, l1=[COPIED]), ZEROES),
    "L2 table: the L1 table itself": Case(build([], l1=[SELF], size=CLUSTER), table(SELF)),
    "L2 table: the refcount table": Case(
        u64(REFCOUNT_TABLE * CLUSTER, AT, build([], PLAIN, l1=[COPIED | REFCOUNT_TABLE * CLUSTER], size=CLUSTER)), PLAIN
    ),
    "L2 table: a refcount block full of ones": Case(build([], b"\0\1" * (CLUSTER // 2), l1=[COPIED | AT], size=CLUSTER), ZEROES),
    "L2 table: a refcount block full of twos": lost(
        build([], b"\0\2" * (CLUSTER // 2), l1=[COPIED | AT], size=CLUSTER), 0x0002_0002_0002_0000
    ),
    "L2 table: a cluster of the disk": Case(build([ONE], table(ONE), l1=[COPIED | AT]), table(ONE)),
    "L2 table: the one of another L1 entry": Case(
        build([data_entry(PAYLOAD * 512)] * 64, PLAIN[:512], cluster_bits=9, l1=[COPIED | L2 * 512] * 2, size=128 * 512),
        PLAIN[:512] * 128,
    ),
    "refcount table: reserved bits": Case(u64(REFCOUNT_TABLE * CLUSTER, 0xFF << 56 | 0x1FF), PLAIN),
    "refcount table: an unaligned block": Case(u64(REFCOUNT_TABLE * CLUSTER, AT + 512), PLAIN),
    "refcount table: itself": Case(u64(REFCOUNT_TABLE * CLUSTER, REFCOUNT_TABLE * CLUSTER), PLAIN),
    "refcount table: a block beyond the end of the file": Case(u64(REFCOUNT_TABLE * CLUSTER, 99 * CLUSTER), PLAIN),
}
FIRST_16 = 0x0000_FFFF
SUBCLUSTERS = {
    "allocated and zero": Case(
        build([(ONE, 0x0000_FFFE_0001_0001)], PLAIN, extended=True),
        PLAIN[:2048] + bytes(15 * 2048) + PLAIN[16 * 2048 : 17 * 2048] + bytes(15 * 2048),
    ),
    "zero, without a cluster": Case(build([(0, ALLOC << 32)], extended=True), ZEROES),
    "unallocated, with a cluster": Case(build([(ONE, 0)], PLAIN, extended=True), ZEROES),
    "both allocated and zero": bad_bitmap(ONE, ALLOC | 1 << 35),
    "both allocated and zero, the last one": bad_bitmap(ONE, 1 << 31 | 1 << 63),
    "both allocated and zero, without a cluster": bad_bitmap(0, 1 << 3 | 1 << 35),
    "allocated, without a cluster": bad_bitmap(0, 1 << 9),
    "allocated, with the COPIED flag and no cluster": bad_bitmap(COPIED, 1 << 9),
    "unallocated, with an unaligned cluster": bad_entry(UNALIGNED, build([(UNALIGNED, 0)], PLAIN, extended=True)),
    "zero, with an unaligned cluster": bad_entry(UNALIGNED, build([(UNALIGNED, ALLOC << 32)], PLAIN, extended=True)),
    "zero flag of the entry": Case(build([(ONE | ZERO, ALLOC)], PLAIN, extended=True), PLAIN),
    "zero flag of an entry without a cluster": Case(build([(ZERO, 0)], PLAIN, extended=True), ZEROES),
    "reserved bits of the entry": Case(build([(ONE | L2_RESERVED, ALLOC)], PLAIN, extended=True), PLAIN),
    "of a compressed cluster, none": Case(build([(PACKED, 0)], STREAM + bytes(999), extended=True), TEXT),
    "of a compressed cluster, allocated": Case(build([(PACKED, ALLOC)], STREAM + bytes(999), extended=True), TEXT),
    "of a compressed cluster, zero": Case(build([(PACKED, ALLOC << 32)], STREAM + bytes(999), extended=True), TEXT),
    "of a compressed cluster, both": Case(build([(PACKED, (1 << 64) - 1)], STREAM + bytes(999), extended=True), TEXT),
    "cut by the end of the file": Case(build([(ONE, FIRST_16)], PLAIN[:5000], extended=True), PLAIN[:5000] + bytes(CLUSTER - 5000)),
}


def header_of(nbytes: int, extensions: bytes = bytes(8)) -> bytes:
    """A header of another length, its end and what follows full of bytes that mean nothing."""
    header = u32(100, nbytes)[:104] + b"\0" + b"\xee" * (CLUSTER - 105)
    return (header[:nbytes] + extensions)[:CLUSTER].ljust(CLUSTER, b"\xee") + GOOD[CLUSTER:]


def features(*rows: tuple[int, int, bytes]) -> bytes:
    return extension(0x6803F857, b"".join(bytes([kind, bit]) + name.ljust(46, b"\0") for kind, bit, name in rows))


def unknown_features(extensions: bytes, says: str, incompatible: int = 5 << 40) -> Case:
    return Case(u64(72, incompatible, build([ONE], PLAIN, extensions=extensions)), None, place=Place(None, None, None), says=says)


LENGTHS = (104, 105, 108, 111, 112, 113, 119, 120, 200, 1001)
UNKNOWN = extension(0x1234, b"some bytes") + extension(0x5678, b"")
NO_BITMAPS = build([ONE], PLAIN, extensions=extension(0x23852875, struct.pack(">IIQQ", 0, 5, 32, 1)))
BITMAPS = "damage to bitmaps does no harm to the disk, which they are no part of"
HEADERS = {
    **{f"header_length {n}": Case(header_of(n), PLAIN) for n in (*LENGTHS, CLUSTER - 8, CLUSTER)},
    **{f"header_length {n}, extensions": Case(header_of(n, UNKNOWN + bytes(8)), PLAIN) for n in LENGTHS},
    "header_length 104, what follows is no compression type": Case(header_of(104, b"\1" + bytes(15)), PLAIN),
    "bytes after the compression type": Case(patched(GOOD, 105, b"\xff" * 7), PLAIN),
    "an empty space for extensions": Case(u64(8, 112), PLAIN),
    "an extension as long as the space for it": Case(build([ONE], PLAIN, extensions=extension(1, bytes(CLUSTER - 128))), PLAIN),
    "an end of extensions that has a length": Case(build([ONE], PLAIN, extensions=extension(0, b"", 999)), PLAIN),
    "a format of the backing file, but no such file": Case(build([ONE], PLAIN, extensions=extension(0xE2792ACA, b"x" * 15)), PLAIN),
    "a backing file's name in the header": Case(u64(8, 4), PLAIN),
    "a length of the backing file's name, but no name": Case(u32(16, 5000), PLAIN),
    "an empty name at the end of the first cluster": Case(u64(8, CLUSTER), PLAIN),
    "a data file's name, but no such file": Case(build([ONE], PLAIN, extensions=extension(0x44415441, b"/x")), PLAIN),
    "version 2": Case(build([ONE], PLAIN, version=2), PLAIN),
    "version 2, extensions": Case(build([ONE], PLAIN, version=2, extensions=UNKNOWN), PLAIN),
    "version 2, features and refcounts": Case(build([ONE], PLAIN, version=2, extensions=extension(1, b"\xff" * 99)), PLAIN),
    "version 2, bitmaps": Case(build([ONE], PLAIN, version=2, extensions=extension(0x23852875, bytes(24))), PLAIN),
    "dirty": Case(u64(72, 1), PLAIN),
    "corrupt": Case(u64(72, 2), PLAIN),
    "dirty and corrupt": Case(u64(72, 3), PLAIN),
    "compatible features": Case(u64(80, (1 << 64) - 1), PLAIN),
    "autoclear features, unknown ones": Case(u64(88, ((1 << 64) - 1) & ~3), PLAIN),
    "autoclear feature of bitmaps, but none": Case(u64(88, 1), PLAIN),
    "incompatible features": unknown_features(b"", "bit 40, bit 42"),
    "incompatible features, with names": unknown_features(features((0, 42, b"first"), (0, 40, b"x" * 46)), "x" * 46 + ", first"),
    "incompatible features, a name": unknown_features(features((1, 42, b"no"), (2, 42, b"no"), (0, 40, b"yes")), "yes, bit 42"),
    "incompatible features, an empty name": unknown_features(features((0, 40, b"")), "bit 40, bit 42"),
    "incompatible features, half a row": unknown_features(extension(0x6803F857, bytes([0, 40]) + b"x" * 45), "bit 40, bit 42"),
    "incompatible features, all of them": unknown_features(b"", "bit 5, bit 6", (1 << 64) - 32),
    "feature names, half a row": Case(build([ONE], PLAIN, extensions=extension(0x6803F857, bytes(50))), PLAIN),
    **{f"refcounts of {1 << n} bits": Case(u32(96, n), PLAIN) for n in range(7)},
    "refcount table beyond the end of the file": Case(u64(48, 99 * CLUSTER), PLAIN),
    "refcount table of 8 MiB": Case(u32(56, 128), PLAIN),
    "L1 table of 32 MiB, cut by the end of the file": Case(u32(36, 4 << 20), None, TRUNCATED, Place(None, L1 * CLUSTER, len(GOOD))),
    "L1 table beyond the end of the file": Case(u64(40, 99 * CLUSTER), None, TRUNCATED, Place(None, 99 * CLUSTER, len(GOOD))),
    "L1 table: the header": lost(u64(40, 0), 0x0046_49FB_0000_0000),
    "L1 table: more entries than the disk needs": Case(u32(36, 8192), PLAIN),
    "no L1 table, and no disk": Case(u32(36, 0, u64(24, 0)), b""),
    "snapshot table, empty, beyond the end of the file": Case(u64(64, 99 * CLUSTER), PLAIN),
    "snapshot table beyond the end of the file": Case(
        u64(64, 99 * CLUSTER, u32(60, 1)), None, TRUNCATED, Place(None, 99 * CLUSTER, None)
    ),
    "bitmaps, damaged": Case(u64(88, 1, NO_BITMAPS), PLAIN, BITMAPS),
    "bitmaps, damaged and out of date": Case(NO_BITMAPS, PLAIN),
    **{
        f"virtual size {size}": Case(build([ONE] * 3, PLAIN, size=size), (PLAIN * 3)[: size & ~511])
        for size in (0, 1, 511, 512, 513, CLUSTER - 1, CLUSTER + 1, 2 * CLUSTER - 512, 3 * CLUSTER - 1)
    },
}


@pytest.mark.filterwarnings("ignore::fastqcow.CorruptWarning")
@pytest.mark.parametrize("name", HEADERS)
def test_header(qemu: Qemu, tmp_path: Path, name: str) -> None:
    check(qemu, tmp_path, HEADERS[name])


@pytest.mark.parametrize("name", TABLES)
def test_tables(qemu: Qemu, tmp_path: Path, name: str) -> None:
    check(qemu, tmp_path, TABLES[name])


@pytest.mark.parametrize("name", SUBCLUSTERS)
def test_subclusters(qemu: Qemu, tmp_path: Path, name: str) -> None:
    check(qemu, tmp_path, SUBCLUSTERS[name])


SNAPSHOT_L1 = AT + CLUSTER
OLD_L2, OLD_DATA, SNAPSHOTS_AT = (SNAPSHOT_L1 + i * CLUSTER for i in (1, 2, 3))
OLD = noise(CLUSTER, 1)


def snapshots(*entries: bytes, count: int | None = None) -> bytes:
    """The disk's one cluster holds other bytes than that of the snapshots, which share an L1 table."""
    tables = (table(COPIED | OLD_L2), table(data_entry(OLD_DATA)), OLD, b"".join(entries))
    image = build([ONE], PLAIN + b"".join(tables) + bytes(512))
    return u32(60, len(entries) if count is None else count, u64(64, SNAPSHOTS_AT, image))


def named(snapshot_id: bytes, name: bytes, l1_off: int = SNAPSHOT_L1) -> bytes:
    return snapshot_entry(snapshot_id, name, l1_off=l1_off, extra=b"")


def snapshot(*, l1_off: int = SNAPSHOT_L1, l1_entries: int = 1, extra: bytes | None = None) -> bytes:
    extra = sizes(CLUSTER) if extra is None else extra
    return snapshots(snapshot_entry(b"1", b"old", l1_off=l1_off, l1_entries=l1_entries, extra=extra))


def sizes(disk: int, vm_state: int = 0) -> bytes:
    return struct.pack(">QQ", vm_state, disk)


def bad_snapshot(image: bytes, host_off: int | None, value: int, differs: str = "") -> Case:
    return Case(image, None, differs, Place(None, host_off, value))


OWN_SIZE = "a snapshot has the size that its disk had; `qemu-img convert -l` gives it that of today"
L1_TOO_SMALL = "its L1 table lacks what its disk had; QEMU takes that for unallocated"
NBYTES = len(snapshot())
# Of the snapshot, by `qemu-img convert -l` and by `Image.snapshot`. The disk beside it is always read.
SNAPSHOTS = {
    "as QEMU writes them": Case(snapshot(), OLD),
    "L1 table unaligned": bad_snapshot(snapshot(l1_off=SNAPSHOT_L1 + 8), None, SNAPSHOT_L1 + 8),
    "L1 table unaligned by a sector": bad_snapshot(snapshot(l1_off=SNAPSHOT_L1 + 512), None, SNAPSHOT_L1 + 512),
    "L1 table at 2^63": bad_snapshot(snapshot(l1_off=1 << 63), None, 1 << 63),
    "L1 table at 2^63 less a cluster": bad_snapshot(snapshot(l1_off=(1 << 63) - CLUSTER), (1 << 63) - CLUSTER, NBYTES),
    "L1 table beyond the end of the file": bad_snapshot(snapshot(l1_off=999 * CLUSTER), 999 * CLUSTER, NBYTES, TRUNCATED),
    "L1 table of 32 MiB, cut by the end of the file": bad_snapshot(snapshot(l1_entries=4 << 20), SNAPSHOT_L1, NBYTES, TRUNCATED),
    "L1 table over 32 MiB": bad_snapshot(snapshot(l1_entries=(4 << 20) + 1), None, (4 << 20) + 1),
    "L1 table of 4294967295 entries": bad_snapshot(snapshot(l1_entries=0xFFFF_FFFF), None, 0xFFFF_FFFF),
    "no L1 table": bad_snapshot(snapshot(l1_entries=0), None, 0, L1_TOO_SMALL),
    "L1 table too small": bad_snapshot(snapshot(extra=sizes((512 << 20) + 1)), None, 1, L1_TOO_SMALL),
    "L1 table too small by far": bad_snapshot(snapshot(extra=sizes(1 << 63)), None, 1, L1_TOO_SMALL),
    "L1 table: the disk's": Case(snapshot(l1_off=L1 * CLUSTER), PLAIN),
    "L1 entry: the L1 table itself": Case(u64(SNAPSHOT_L1, COPIED | SNAPSHOT_L1, snapshot()), table(COPIED | SNAPSHOT_L1)),
    "more L1 entries than its disk needs": Case(snapshot(l1_entries=8192), OLD),
    "no extra data": Case(snapshot(extra=b""), OLD),
    "extra data without a size": Case(snapshot(extra=bytes(8)), OLD),
    "extra data that ends within the size": Case(snapshot(extra=bytes(12)), OLD),
    "extra data of 1,024 bytes": Case(snapshot(extra=sizes(CLUSTER) + bytes(1008)), OLD),
    "smaller disk": Case(snapshot(extra=sizes(512)), OLD[:512], OWN_SIZE),
    "larger disk": Case(snapshot(extra=sizes(2 * CLUSTER)), OLD + ZEROES, OWN_SIZE),
    "no disk": Case(snapshot(extra=sizes(0), l1_entries=0), b"", OWN_SIZE),
    "machine state that claims to be endless": Case(snapshot(extra=sizes(CLUSTER, (1 << 64) - 1)), OLD),
    "name that goes on behind a zero byte": Case(snapshots(named(b"1", b"old\0er")), OLD),
    "the first of two with one name": Case(
        snapshots(
            snapshot_entry(b"1", b"old", l1_off=SNAPSHOT_L1, extra=b""),
            snapshot_entry(b"2", b"old", l1_off=L1 * CLUSTER, extra=b""),
        ),
        OLD,
    ),
    "the one with this id, not this name": Case(
        snapshots(
            snapshot_entry(b"1", b"old", l1_off=L1 * CLUSTER, extra=b""),
            snapshot_entry(b"old", b"2", l1_off=SNAPSHOT_L1, extra=b""),
        ),
        OLD,
    ),
}
# None of these can be opened.
SNAPSHOT_TABLES = {
    "extra data of 1,025 bytes": bad_snapshot(snapshot(extra=sizes(CLUSTER) + bytes(1009)), SNAPSHOTS_AT, 1025),
    "extra data of 4294967295 bytes": bad_snapshot(u32(SNAPSHOTS_AT + 36, 0xFFFF_FFFF, snapshot()), SNAPSHOTS_AT, 0xFFFF_FFFF),
    "cut within an entry": Case(snapshot()[: SNAPSHOTS_AT + 20], None, TRUNCATED, Place(None, SNAPSHOTS_AT, None)),
    "cut within a name": Case(snapshot()[: SNAPSHOTS_AT + 58], None, TRUNCATED, Place(None, SNAPSHOTS_AT, None)),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshot(qemu: Qemu, tmp_path: Path, name: str) -> None:
    case, path = SNAPSHOTS[name], tmp_path / "disk.qcow2"
    path.write_bytes(case.image)
    check_verdict(case, qemu.read(path, snapshot="old"))
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path) == PLAIN
        if case.expected is None:
            with raises(case, path):
                image.snapshot("old")
            return
        with image.snapshot("old") as old:
            assert old.read() == case.expected


@pytest.mark.parametrize("name", SNAPSHOT_TABLES)
def test_snapshot_table(qemu: Qemu, tmp_path: Path, name: str) -> None:
    check(qemu, tmp_path, SNAPSHOT_TABLES[name])


@pytest.mark.parametrize(("count", "is_good"), [(511, True), (512, False)])
def test_snapshot_table_of_64_mib(qemu: Qemu, tmp_path: Path, count: int, is_good: bool) -> None:
    """As large as it may be, and larger. Names are long, and full of zeroes that take no room on the disk."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(snapshots(count=count))
    entry_nbytes = 40 + 65_535 + 65_535 + 2
    with path.open("r+b") as f:
        for i in range(count):
            f.seek(SNAPSHOTS_AT + i * entry_nbytes)
            f.write(struct.pack(">QIHHIIQII", SNAPSHOT_L1, 1, 65_535, 65_535, 0, 0, 0, 0, 0))
        f.truncate(SNAPSHOTS_AT + count * entry_nbytes)
    case = Case(b"", PLAIN if is_good else None, place=Place(None, SNAPSHOTS_AT + count * entry_nbytes, None))
    check_verdict(case, qemu.read(path))
    if is_good:
        with fastqcow.open(path) as image, image.snapshot("") as last:
            assert len(image.snapshots) == count
            assert last.read() == OLD
        return
    with raises(case, path):
        fastqcow.open(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts(qemu: Qemu, tmp_path: Path, bits: int) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(TEXT * 3)
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"refcount_bits={bits}", raw, path)
    qemu.io(path, "write -P 1 100k 20k")
    with fastqcow.open(path) as image:
        assert image.header.refcount_order == bits.bit_length() - 1
        assert image.read() == qemu.read(path)
    check_commands(qemu, path)


def largest(cluster_bits: int, extended: bool) -> int:
    """The disk that an L1 table of 32 MiB covers."""
    return (32 << 20) // 8 << 2 * cluster_bits - (4 if extended else 3)


@pytest.mark.parametrize(
    ("cluster_bits", "extended", "size"),
    [
        (16, False, 64 << 40),
        (9, False, largest(9, False)),
        (12, False, largest(12, False)),
        (16, False, largest(16, False)),
        (21, False, largest(21, False)),
        (14, True, largest(14, True)),
        (21, True, largest(21, True)),
    ],
)
def test_large_disks(qemu: Qemu, tmp_path: Path, cluster_bits: int, extended: bool, size: int) -> None:
    """Up to the largest that there can be."""
    path = tmp_path / "disk.qcow2"
    options = f"cluster_size={1 << cluster_bits},extended_l2={'on' if extended else 'off'}"
    qemu.img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    places = (0, size // 3 & ~511, size // 2, size - 512)
    qemu.io(path, *(f"write -P {i + 1} {at} 512" for i, at in enumerate(places)))
    qemu.io(path, *(f"read -P {i + 1} {at} 512" for i, at in enumerate(places)), "read -P 0 1M 512", options=("-r",))
    with fastqcow.open(path) as image:
        assert image.size == size
        for i, at in enumerate(places):
            assert image.pread(512, at) == bytes([i + 1]) * 512
        assert image.pread(512, 1 << 20) == bytes(512)
        assert image.pread(1024, size - 512) == bytes([len(places)]) * 512
        assert image.pread(1, size) == b""
    for at in places:
        check_map(qemu, path, f"--start-offset={max(0, at - (8 << 20))}", f"--max-length={16 << 20}")
    check_info(qemu, path)
    check_check(qemu, path)


SIZES = (512, 9_728, 20_480, 30_208)
CHAINS = [
    *itertools.permutations(SIZES),
    (0, 30_208, 9_728),
    (30_208, 0, 9_728),
    (30_208, 9_728, 0),
    (30_208, 1, 30_208),
    (30_000, 9_999, 20_001, 777, 30_001),
]


@pytest.mark.parametrize("base", ["qcow2", "raw"])
@pytest.mark.parametrize("sizes", CHAINS, ids=str)
def test_backing_files_of_other_sizes(qemu: Qemu, tmp_path: Path, sizes: tuple[int, ...], base: str) -> None:
    """From the base up. Each layer has some clusters of its own, and zeroes some."""
    below: Path | None = None
    for layer, size in enumerate(sizes):
        path = tmp_path / f"{layer}.{base if layer == 0 else 'qcow2'}"
        if path.suffix == ".raw":
            path.write_bytes(noise(size, layer))
        else:
            cluster_bits = (9, 10, 12)[layer % 3]
            clusters = range(-(-size >> cluster_bits))
            kinds = [(data_entry(PAYLOAD + i << cluster_bits), ZERO, 0, 0, 0) for i in clusters]
            entries = [kinds[i][(i + 2 * layer) % 5] for i in clusters]
            backing = (below.name, below.suffix[1:]) if below else None
            payload = noise(len(entries) << cluster_bits, layer)
            path.write_bytes(build(entries, payload, cluster_bits=cluster_bits, size=size, backing=backing))
        below = path
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path)
    check_commands(qemu, path)
