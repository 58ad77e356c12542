"""Internal snapshots: their table, their disks and their machines' states."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from fastqcow.cli import main
from fastqcow.snapshots import SnapshotEntry
from images import COPIED, PAYLOAD, build, compressed_entry, data_entry, deflate, noise, patched, snapshot_entry, text

CLUSTER = 65536


def entry(
    snapshot_id: bytes, name: bytes, *, l1_off: int, l1_entries: int = 1, extra: bytes | None = None, vm_state_size: int = 0
) -> bytes:
    extra = struct.pack(">QQ", vm_state_size, 2 * CLUSTER) if extra is None else extra
    return snapshot_entry(snapshot_id, name, l1_off=l1_off, l1_entries=l1_entries, extra=extra, vm_state_size=vm_state_size)


TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
STREAM = deflate(TEXT).ljust(CLUSTER, b"\0")
TABLE, L1, L2 = ((PAYLOAD + i) * CLUSTER for i in range(2, 5))


def image_with(*entries: bytes, count: int | None = None) -> bytes:
    """The disk holds a compressed cluster, then nothing; the snapshots' common L1 table the same cluster, then a plain one."""
    at = PAYLOAD * CLUSTER
    compressed = compressed_entry(at, len(deflate(TEXT)), 16)
    tables = b"".join(
        part.ljust(CLUSTER, b"\0")
        for part in (b"".join(entries), struct.pack(">Q", COPIED | L2), struct.pack(">QQ", compressed, data_entry(at + CLUSTER)))
    )
    image = build([compressed, 0, 0], STREAM + PLAIN + tables)
    return patched(image, 60, struct.pack(">IQ", len(entries) if count is None else count, TABLE))


def opened(tmp_path: Path, image: bytes) -> fastqcow.Image:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    return fastqcow.open(path)


def test_entries(tmp_path: Path) -> None:
    with opened(tmp_path, image_with(entry(b"1", b"before", l1_off=L1), entry(b"22", b"", l1_off=L1, vm_state_size=9))) as image:
        assert image.snapshots == (
            SnapshotEntry("1", "before", L1, 1, 2 * CLUSTER, True, 0, 1_700_000_000, 5, 7_000_000_009, None, b"", 63),
            SnapshotEntry("22", "", L1, 1, 2 * CLUSTER, True, 9, 1_700_000_000, 5, 7_000_000_009, None, b"", 58),
        )


@pytest.mark.parametrize(
    ("extra", "disk_size", "vm_state_size", "icount", "unknown"),
    [
        (b"", 3 * CLUSTER, 77, None, b""),
        (struct.pack(">Q", 1 << 40), 3 * CLUSTER, 1 << 40, None, b""),
        (struct.pack(">QQ", 3, 1024), 1024, 3, None, b""),
        (struct.pack(">QQQ", 3, 1024, 99), 1024, 3, 99, b""),
        (struct.pack(">QQQ", 3, 1024, (1 << 64) - 1) + b"more", 1024, 3, None, b"more"),
    ],
)
def test_extra_data(tmp_path: Path, extra: bytes, disk_size: int, vm_state_size: int, icount: int | None, unknown: bytes) -> None:
    with opened(tmp_path, image_with(entry(b"1", b"x", l1_off=L1, extra=extra, vm_state_size=77))) as image:
        (found,) = image.snapshots
    assert (found.disk_size, found.vm_state_size, found.icount, found.extra) == (disk_size, vm_state_size, icount, unknown)


def test_disk_of_a_snapshot(tmp_path: Path) -> None:
    with opened(tmp_path, image_with(entry(b"1", b"before", l1_off=L1))) as image:
        assert image.read() == TEXT + bytes(2 * CLUSTER)
        with image.snapshot("before") as snapshot:
            assert (snapshot.size, snapshot.entry.id) == (2 * CLUSTER, "1")
            assert snapshot.read() == TEXT + PLAIN
            assert [extent.compressed for extent in snapshot.map()] == [True, False]


def test_caches_are_shared(tmp_path: Path) -> None:
    with opened(tmp_path, image_with(entry(b"1", b"before", l1_off=L1))) as image, image.snapshot("1") as snapshot:
        image.pread(10, 0)
        snapshot.pread(10, 100)
        assert snapshot.stats()["clusters_inflated"] == 0
        assert snapshot.stats()["cache_hits"] == 1


def test_snapshot_outlives_its_image(tmp_path: Path) -> None:
    image = opened(tmp_path, image_with(entry(b"1", b"before", l1_off=L1)))
    snapshot = image.snapshot("before")
    image.close()
    assert snapshot.read() == TEXT + PLAIN
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        image.snapshot("before")


def test_id_comes_before_name(tmp_path: Path) -> None:
    with opened(tmp_path, image_with(entry(b"1", b"2", l1_off=L1), entry(b"2", b"1", l1_off=L1))) as image:
        assert image.snapshot("1").entry.name == "2"
        with pytest.raises(KeyError, match="'3'"):
            image.snapshot("3")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry(b"1", b"x", l1_off=L1 + 8), "not aligned"),
        (entry(b"1", b"x", l1_off=1 << 63), "beyond any file"),
        (entry(b"1", b"x", l1_off=999 * CLUSTER), "past the end of the file"),
        (entry(b"1", b"x", l1_off=L1, l1_entries=(4 << 20) + 1), "larger than 32 MiB"),
        (entry(b"1", b"x", l1_off=L1, l1_entries=0), "too small"),
        (entry(b"1", b"x", l1_off=L1, extra=struct.pack(">QQ", 0, 1 << 63)), "too small"),
    ],
)
def test_bad_snapshot_does_no_harm_to_the_disk(tmp_path: Path, bad: bytes, reason: str) -> None:
    with opened(tmp_path, image_with(bad)) as image:
        assert image.read() == TEXT + bytes(2 * CLUSTER)
        with pytest.raises(fastqcow.FormatError, match=reason):
            image.snapshot("x")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (image_with(entry(b"1", b"x", l1_off=L1, extra=bytes(1025))), "more than 1024 bytes"),
        (patched(image_with(), 60, struct.pack(">IQ", 1, 999 * CLUSTER)), "past the end"),
        (patched(image_with(), 60, struct.pack(">IQ", 65537, TABLE)), "more than 65536"),
        (image_with(entry(b"1", b"x", l1_off=L1), count=65536), "more than 1024 bytes"),  # what lies behind the table is none
    ],
)
def test_bad_table(tmp_path: Path, image: bytes, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fastqcow.FormatError, match=reason):
        opened(tmp_path, image)
    assert main(["snapshot", "-l", str(tmp_path / "disk.qcow2")]) == 1
    assert re.search(reason, capsys.readouterr().err)


@pytest.fixture(params=["raw", "compressed", "extended", "overlay", "512"])
def history(request: pytest.FixtureRequest, qemu: Qemu, tmp_path: Path) -> Path:
    """A disk that is written to, resized and snapshotted in turns."""
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    base.write_bytes(text(3 << 20))
    options = {"extended": "extended_l2=on", "512": "cluster_size=512"}.get(request.param, "cluster_size=64k")
    if request.param == "overlay":
        qemu.img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path, "4M")
    else:
        compress = ["-c"] if request.param == "compressed" else []
        qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", options, *compress, base, path)
    qemu.img("snapshot", "-c", "first", path)
    qemu.io(path, "write -P 1 100k 300k", "write -z 1M 64k")
    qemu.img("snapshot", "-c", "second", path)
    qemu.img("resize", "-q", path, "6M")
    qemu.io(path, "write -P 2 5M 100k", "discard 0 1M")
    qemu.img("snapshot", "-c", "third", path)
    qemu.img("resize", "-q", "--shrink", path, "1M")
    qemu.io(path, "write -P 3 0 64k")
    return path


def test_snapshots_are_what_qemu_goes_back_to(qemu: Qemu, history: Path, tmp_path: Path) -> None:
    check_commands(qemu, history)
    with fastqcow.open(history) as image:
        assert image.read() == qemu.read(history)
        assert [entry.name for entry in image.snapshots] == ["first", "second", "third"]
        for entry in image.snapshots:
            copy = tmp_path / "copy.qcow2"
            shutil.copy(history, copy)
            qemu.img("snapshot", "-a", entry.name, copy)
            expected = qemu.read(copy)
            with image.snapshot(entry.name) as snapshot:
                assert snapshot.read() == expected
                assert snapshot.pread(5000, (1 << 20) - 2500) == (expected or b"")[(1 << 20) - 2500 :][:5000]
            assert fastqcow.convert(image.snapshot(entry.id), tmp_path / "out").virtual_size == len(expected or b"")
            assert (tmp_path / "out").read_bytes() == expected


def test_snapshot_without_a_size_on_a_disk_that_grew(tmp_path: Path) -> None:
    """What its L1 table does not cover was not there."""
    image = image_with(entry(b"1", b"old", l1_off=L1, extra=b""))
    image = patched(patched(image, 24, struct.pack(">Q", 600 << 20)), 36, struct.pack(">I", 2))
    with opened(tmp_path, image) as disk, disk.snapshot("old") as snapshot:
        assert snapshot.size == disk.size == 600 << 20
        assert snapshot.pread(2 * CLUSTER, 0) == TEXT + PLAIN
        assert snapshot.pread(10, 590 << 20) == bytes(10)


@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 64) - 1])
def test_bad_vm_state_does_no_harm_to_the_disk(tmp_path: Path, nbytes: int) -> None:
    bad = entry(b"1", b"x", l1_off=L1, extra=struct.pack(">QQ", nbytes, 2 * CLUSTER))
    with opened(tmp_path, image_with(bad)) as disk, disk.snapshot("x") as snapshot:
        assert snapshot.read() == TEXT + PLAIN
        with pytest.raises(fastqcow.FormatError, match="larger than any") as caught:
            snapshot.vm_state  # noqa: B018 - a property that raises
    assert (caught.value.path, caught.value.value) == (str(tmp_path / "disk.qcow2"), nbytes)


def test_vm_state_that_claims_to_be_endless(tmp_path: Path) -> None:
    """There is nothing behind the L1 table, and that is quickly said."""
    endless = entry(b"1", b"x", l1_off=L1, extra=struct.pack(">QQ", 1 << 61, 2 * CLUSTER))
    with opened(tmp_path, image_with(endless)) as disk, disk.snapshot("x") as snapshot:
        extents = list(snapshot.vm_state.map())
    assert [(e.start, e.length, e.present) for e in extents] == [(0, 1 << 61, False)]


def test_vm_state(tmp_path: Path) -> None:
    """It starts at the first L2 table behind the disk, and never comes from a backing file."""
    state = noise(CLUSTER, 9)
    at = PAYLOAD * CLUSTER
    l1 = struct.pack(">QQ", COPIED | L2, COPIED | (L2 + CLUSTER)).ljust(CLUSTER, b"\0")
    tables = [entry(b"1", b"x", l1_off=L1, l1_entries=2, vm_state_size=CLUSTER + 999).ljust(CLUSTER, b"\0"), l1]
    tables += [
        struct.pack(">Q", data_entry(at)).ljust(CLUSTER, b"\0"),
        struct.pack(">Q", data_entry(at + CLUSTER)).ljust(CLUSTER, b"\0"),
    ]
    image = patched(build([0, 0, 0], PLAIN + state + b"".join(tables)), 60, struct.pack(">IQ", 1, TABLE))
    with opened(tmp_path, image) as disk, disk.snapshot("x") as snapshot:
        assert snapshot.read() == PLAIN + bytes(CLUSTER)
        with snapshot.vm_state as machine:
            assert machine.size == CLUSTER + 999
            assert machine.read() == state + bytes(999)
            assert machine.pread(100, 50) == state[50:150]
            machine.seek(-1000, 2)
            assert machine.read() == state[-1:] + bytes(999)
            with pytest.raises(ValueError, match="negative"):
                machine.pread(1, -5)
