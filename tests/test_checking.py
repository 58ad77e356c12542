"""Checks: what they report, and that nothing in an image keeps them busy. What they count is compared with QEMU in oracle/."""

from __future__ import annotations

import gc
import io
import struct
import time
from pathlib import Path

import pytest

import fastqcow
from capabilities import descriptors
from fastqcow._check import Checker
from fastqcow.checking import CheckResult, Finding, check
from fastqcow.cli import main
from images import COPIED, L1, L2, PAYLOAD, REFCOUNT_TABLE, build, compressed_entry, data_entry, patched, snapshot_entry, text

CLUSTER = 1 << 16
AT = PAYLOAD * CLUSTER


def sound(*entries: int | tuple[int, int], payload: bytes = b"", clusters: int | None = None, **options: object) -> bytes:
    """An image whose refcounts are right: of `clusters` clusters in use, one each; the last of them is the refcount block."""
    image = build(entries, payload, **options)  # type: ignore[arg-type]
    block = len(image) // CLUSTER
    counts = b"".join(struct.pack(">H", 1) for _ in range(block + 1 if clusters is None else clusters))
    image = patched(image, REFCOUNT_TABLE * CLUSTER, struct.pack(">Q", block * CLUSTER))
    return image + counts.ljust(CLUSTER, b"\0")


def findings(image: bytes) -> tuple[CheckResult, list[Finding]]:
    found: list[Finding] = []
    return check(io.BytesIO(image), report=found.append), found


def test_sound() -> None:
    result, found = findings(sound(data_entry(AT), 0, payload=bytes(CLUSTER)))
    assert result == CheckResult(0, 0, 0, 0, 2, 1, 0, 0, 6 * CLUSTER, 0)
    assert not found


def test_without_a_report() -> None:
    assert check(io.BytesIO(build([0]))).corruptions > 0


@pytest.mark.parametrize(
    ("entry", "clusters"),
    [
        (COPIED | L1 * CLUSTER, [L1]),
        (COPIED | L2 * CLUSTER, [L2]),
        (COPIED | REFCOUNT_TABLE * CLUSTER, [REFCOUNT_TABLE]),
        (COPIED | 4 * CLUSTER, [4]),
        (compressed_entry(CLUSTER - 100, 5000, 16), [0, 1]),
    ],
)
def test_overlaps(entry: int, clusters: list[int]) -> None:
    result, found = findings(sound(entry))
    assert [f.host_off for f in found if f.severity == "overlap"] == [cluster * CLUSTER for cluster in clusters]
    assert result.overlaps == len(clusters)


def test_an_overlap_that_the_refcounts_allow() -> None:
    """QEMU's check has nothing to say against a data cluster on an L2 table, if its refcount is 2."""
    image = sound(L2 * CLUSTER, l1=[L2 * CLUSTER])
    image = patched(image, 4 * CLUSTER + 2 * L2, struct.pack(">H", 2))
    result, (overlap,) = findings(image)
    assert (result.corruptions, result.leaks, result.overlaps) == (0, 0, 1)
    assert (overlap.severity, overlap.host_off, overlap.times) == ("overlap", L2 * CLUSTER, 1)


def test_findings_say_where() -> None:
    image = sound(0, 0, COPIED | AT | 1 << 57, payload=bytes(CLUSTER))
    result, (found,) = findings(image)
    assert result.corruptions == 1
    assert found == Finding(
        "corruption", "the L2 entry has reserved bits set", 1, 2 * CLUSTER, L2 * CLUSTER + 16, COPIED | AT | 1 << 57
    )
    assert str(found) == (
        "the L2 entry has reserved bits set (guest offset 0x20000, host offset 0x30010, value 0x8200000000040000)"
    )


def test_neighbours_are_one_finding() -> None:
    image = sound(0, payload=bytes(5 * CLUSTER))
    result, (found,) = findings(image)
    assert (result.leaks, found.severity, found.times) == (5, "leak", 5)
    assert (found.host_off, found.refcount, found.references) == (AT, 1, 0)
    assert "refcount 1, references 0, 5 times" in str(found)


def test_exceptions_of_the_report_end_it(tmp_path: Path) -> None:
    """At once: what is left would be a terabyte of leaks that nobody hears of."""
    called = []

    def report(found: Finding) -> None:
        called.append(found)
        raise RuntimeError(found.severity)

    path = tmp_path / "disk.qcow2"
    path.write_bytes(full_of_leaks())
    with path.open("r+b") as f:
        f.truncate(1 << 39)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="corruption"):
        check(path, report=report)
    assert len(called) == 1
    assert time.monotonic() - started < 10


def full_of_leaks() -> bytes:
    """512-byte clusters and refcounts of 1 bit, every second one of which is set: no two leaks are neighbours."""
    image = patched(build([0], cluster_bits=9), 96, struct.pack(">I", 0))
    table = 4096 * 8
    image = patched(image, 48, struct.pack(">QI", len(image), table // 512))
    return image + struct.pack(">Q", len(image) + table) * 4096 + b"\xaa" * 512


def test_many_findings_are_counted_but_not_told() -> None:
    image = full_of_leaks()
    result, found = findings(image + bytes(4096 * 512))
    assert len([f for f in found if f.severity == "leak"]) == 1000
    assert result.leaks > 2000
    assert result.not_reported == result.leaks - 1000


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(sound(0))
    gc.disable()
    try:
        before = descriptors()
        for _ in range(10):
            check(path)
        assert descriptors() == before
    finally:
        gc.enable()


def test_objects_of_the_bridge_are_not_made_by_hand() -> None:
    with pytest.raises(ValueError, match="was not made"):
        Checker.__new__(Checker).finish()


def test_other_files_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(sound(0, backing=("nowhere", "qcow2")))
    with pytest.raises(FileNotFoundError):
        fastqcow.open(path)
    assert check(path).corruptions == 0


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (b"not an image", fastqcow.FormatError),
        (patched(build([0]), 72, struct.pack(">Q", 1 << 40)), fastqcow.UnsupportedError),
        (patched(build([0]), 60, struct.pack(">IQ", 1, 1 << 40)), fastqcow.FormatError),
        (patched(build([0]), 40, struct.pack(">Q", (1 << 63) - 2 * CLUSTER)), fastqcow.FormatError),
        (patched(build([0]), 48, struct.pack(">Q", (1 << 63) - 2 * CLUSTER)), fastqcow.FormatError),
        (patched(build([0]), 88, struct.pack(">Q", 2)), fastqcow.FormatError),
    ],
)
def test_what_cannot_be_checked(image: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        check(io.BytesIO(image))


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    unaligned_block = patched(sound(0), REFCOUNT_TABLE * CLUSTER, struct.pack(">Q", 4 * CLUSTER + 512))
    for image, code, said in (
        (sound(0), 0, ""),
        (build([0]), 2, "corruption: the COPIED flag"),
        (sound(0, payload=bytes(CLUSTER)), 3, "leak: "),
        (unaligned_block, 1, "could not be completed"),
        (b"", 1, "the file is empty"),
    ):
        path.write_bytes(image)
        assert main(["check", "-q", str(path)]) == code
        captured = capsys.readouterr()
        assert not captured.out
        assert said in captured.err


def test_an_overlap_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(patched(sound(L2 * CLUSTER, l1=[L2 * CLUSTER]), 4 * CLUSTER + 2 * L2, struct.pack(">H", 2)))
    assert main(["check", str(path)]) == 0
    assert "1 clusters are in use for different things at once." in capsys.readouterr().out
    assert main(["check", "--output=json", str(path)]) == 0
    assert '"overlaps": 1' in capsys.readouterr().out


@pytest.mark.parametrize("nbytes", [(1 << 64) - CLUSTER, (1 << 64) - 2 * CLUSTER, (1 << 63) - CLUSTER, 1 << 63, 1 << 62])
def test_an_encryption_header_without_end(nbytes: int) -> None:
    """Its end is beyond what 64 bits can say."""
    pointer = struct.pack(">IIQQ", 0x0537BE77, 16, CLUSTER, nbytes)
    image = patched(build([0], extensions=pointer), 32, b"\0\0\0\2")
    _, found = findings(image)
    assert any(f.host_off == CLUSTER and f.value == nbytes for f in found)


@pytest.mark.parametrize("l1_off", [(1 << 64) - CLUSTER, (1 << 63) - CLUSTER])
def test_snapshots_whose_l1_tables_are_beyond_any_file(l1_off: int) -> None:
    table = b"".join(snapshot_entry(b"1", b"x", l1_off=l1_off, l1_entries=n, extra=bytes(16)) for n in (16384, 32768))
    image = build([0], table)
    with pytest.raises(fastqcow.FormatError, match="beyond any file's end"):
        findings(patched(image, 60, struct.pack(">IQ", 2, AT)))


# What follows would take QEMU hours, or all memory.


def test_bitmaps_that_share_a_table(tmp_path: Path) -> None:
    """5,000 of them, with a table of 2^20 entries, most of which lie behind the end of the file."""
    count = 5000
    entries = [struct.pack(">QIIBBHI", AT, 8192, 1, 1, 16, 4, 0) + f"{i:04}".encode() + bytes(4) for i in range(count)]
    directory = b"".join(entries)
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, count, 0, len(directory), AT + CLUSTER)
    image = patched(
        build([0], struct.pack(">Q", 1).ljust(CLUSTER, b"\0") + directory, extensions=extension), 88, struct.pack(">Q", 1)
    )
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    found: list[Finding] = []
    check(path, report=found.append)
    assert any(f.references == count for f in found)


def test_an_l1_table_of_one_l2_table(tmp_path: Path) -> None:
    """4 Mi entries, all of which point to a table whose entries all point to one cluster."""
    entries = 4 << 20
    image = build([data_entry(AT)] * 8192, bytes(CLUSTER), size=entries << 29 >> 1)
    image = patched(image, 36, struct.pack(">IQ", entries, AT + CLUSTER))
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image + struct.pack(">Q", L2 * CLUSTER) * entries)
    result = check(path)
    assert result.allocated_clusters == entries * 8192


def test_snapshots_whose_l1_tables_lie_over_each_other(tmp_path: Path) -> None:
    """20,000 of them, each with an L1 table of 16 MiB, which is theirs together."""
    entries, count = 2 << 20, 20_000
    table = snapshot_entry(b"1", b"x", l1_off=AT, l1_entries=entries, extra=bytes(16)) * count
    image = build([0], b"".join((struct.pack(">Q", L2 * CLUSTER), bytes(entries * 8 - 8))))
    image = patched(image, 60, struct.pack(">IQ", count, len(image)))
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image + table)
    found: list[Finding] = []
    check(path, report=found.append)
    assert any(f.references == count + 1 for f in found)


def test_unaligned_l2_tables_are_not_read_without_end(tmp_path: Path) -> None:
    """Each of 40,000 L1 entries points to 64 KiB of its own, 512 bytes farther on."""
    entries = 40_000
    image = patched(build([0]), 36, struct.pack(">IQ", entries, AT))
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as f:
        f.write(image + b"".join(struct.pack(">Q", (1 << 30) + 512 * i) for i in range(entries)))
        f.truncate(2 << 30)
    with pytest.raises(fastqcow.FormatError, match="not aligned than are worth a look"):
        check(path)


def test_a_file_of_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([0], cluster_bits=9))
    with path.open("r+b") as f:
        f.truncate(512 << 30)
    assert check(path).leaks == 0
    with path.open("r+b") as f:
        f.truncate(1 << 40)
    with pytest.raises(fastqcow.FormatError, match="more clusters than can be counted"):
        check(path)


def test_counters_are_bounded(tmp_path: Path) -> None:
    """Each entry of eight bytes refers to another stretch of the file, and so asks for a page of counters."""
    path = tmp_path / "disk.qcow2"
    tables = 26
    entries = [struct.pack(">Q", COPIED | AT + (1 << 20) + i * (1 << 26)) for i in range(tables * 8192)]
    image = patched(build([0]), 36, struct.pack(">IQ", tables, AT))
    l1 = b"".join(struct.pack(">Q", COPIED | AT + (1 + i) * CLUSTER) for i in range(tables))
    with path.open("wb") as f:
        f.write(image + l1.ljust(CLUSTER, b"\0") + b"".join(entries))
        try:
            f.truncate(15 << 40)
        except OSError:
            pytest.skip("the file system has no files of 15 TiB")
    with pytest.raises(fastqcow.FormatError, match="more clusters than can be counted"):
        check(path)


def test_streams_are_not_read() -> None:
    """A check is about tables: that a stream is damaged is for a read to find."""
    data = text(5000)
    image = sound(compressed_entry(AT, len(data), 16), payload=data.ljust(CLUSTER, b"\1"))
    result, _ = findings(image)
    assert (result.corruptions, result.compressed_clusters) == (0, 1)
