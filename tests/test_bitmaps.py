"""Persistent dirty bitmaps: their directory, and what they mark, as QEMU sees it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, build, patched

CLUSTER = 65536
DIRECTORY = PAYLOAD * CLUSTER
TABLE, BITS = DIRECTORY + CLUSTER, DIRECTORY + 2 * CLUSTER


def entry(
    name: bytes = b"bits",
    *,
    table_off: int = TABLE,
    table_entries: int = 1,
    flags: int = 2,
    kind: int = 1,
    granularity_bits: int = 16,
    name_nbytes: int | None = None,
    extra: bytes = b"",
) -> bytes:
    nbytes = len(name) if name_nbytes is None else name_nbytes
    made = struct.pack(">QIIBBHI", table_off, table_entries, flags, kind, granularity_bits, nbytes, len(extra)) + extra + name
    return made.ljust(len(made) + 7 & ~7, b"\0")


def image_with(
    directory: bytes, bits: bytes = b"", *, table: int = BITS, count: int = 1, autoclear: int = 1, clusters: int = 100
) -> bytes:
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, count, 0, len(directory), DIRECTORY)
    payload = [directory, struct.pack(">Q", table), bits]
    image = build([0] * clusters, b"".join(part.ljust(CLUSTER, b"\0") for part in payload), extensions=extension)
    return patched(image, 88, struct.pack(">Q", autoclear))


def opened(tmp_path: Path, image: bytes) -> fastqcow.Image:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    return fastqcow.open(path)


def test_directory(tmp_path: Path) -> None:
    directory = entry() + entry(b"other", flags=1, granularity_bits=9)
    with opened(tmp_path, image_with(directory, count=2)) as image:
        assert image.bitmaps == (
            fastqcow.BitmapEntry("bits", 65536, False, True, TABLE, 1),
            fastqcow.BitmapEntry("other", 512, True, False, TABLE, 1),
        )
        with pytest.raises(fastqcow.FormatError, match="not saved"):
            image.bitmap("other")
        with pytest.raises(KeyError, match="'none'"):
            image.bitmap("none")


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (b"", []),
        (b"\1", [(0, 1)]),
        (b"\x80", [(7, 1)]),
        (b"\x5a", [(1, 1), (3, 2), (6, 1)]),
        (b"\xff" * 8 + b"\1", [(0, 65)]),
        (b"\0" * 7 + b"\x80\1", [(63, 2)]),
        (b"\0" * 12 + b"\x08\0", [(99, 1)]),
        (b"\xff" * 99, [(0, 100)]),
        (b"\0" * 13 + b"\xff", []),
    ],
)
def test_ranges(tmp_path: Path, bits: bytes, expected: list[tuple[int, int]]) -> None:
    """Of a disk of 100 clusters, each with a bit; bits behind the end mark nothing."""
    with opened(tmp_path, image_with(entry(), bits)) as image:
        assert list(image.bitmap("bits")) == [(start * CLUSTER, length * CLUSTER) for start, length in expected]


@pytest.mark.parametrize(("table", "expected"), [(0, []), (1, [(0, 100 * CLUSTER)])])
def test_clusters_that_are_not_stored(tmp_path: Path, table: int, expected: list[tuple[int, int]]) -> None:
    with opened(tmp_path, image_with(entry(), table=table)) as image:
        assert list(image.bitmap("bits")) == expected


def test_extension_that_is_out_of_date(tmp_path: Path) -> None:
    with opened(tmp_path, image_with(entry(), autoclear=0)) as image:
        assert image.bitmaps == ()


GOOD_DIRECTORIES = [
    (image_with(entry(b"")), [""]),
    (image_with(entry(b"bits\0more")), ["bits"]),
    (image_with(entry(b"x" * 1023)), ["x" * 1023]),
    (image_with(entry() + entry(b"other", flags=1, table_entries=77), count=2), ["bits", "other"]),
    (image_with(entry(granularity_bits=9), clusters=4096), ["bits"]),
    (image_with(entry(granularity_bits=31)), ["bits"]),
    (image_with(entry(), table=999 * CLUSTER), ["bits"]),
]


@pytest.mark.parametrize(("image", "names"), GOOD_DIRECTORIES)
def test_odd_directory(tmp_path: Path, image: bytes, names: list[str]) -> None:
    with opened(tmp_path, image) as disk:
        assert [found.name for found in disk.bitmaps] == names


BAD_DIRECTORIES = [
    (image_with(entry(), count=0), "not within 1 to 65535"),
    (image_with(entry(), count=65536), "not within 1 to 65535"),
    (patched(image_with(entry()), 124, struct.pack(">I", 5)), "reserved bits"),
    (patched(image_with(entry()), 136, struct.pack(">Q", DIRECTORY + 512)), "in no place for it"),
    (patched(image_with(entry()), 136, struct.pack(">Q", 1 << 62)), "in no place for it"),
    (image_with(entry(), count=2), "ends within an entry"),
    (image_with(entry(name_nbytes=1000)), "ends within an entry"),
    (image_with(entry(kind=2)), "makes no sense"),
    (image_with(entry(granularity_bits=8)), "makes no sense"),
    (image_with(entry(granularity_bits=32)), "makes no sense"),
    (image_with(entry(flags=8)), "makes no sense"),
    (image_with(entry(flags=4)), "makes no sense"),
    (image_with(entry(b"x" * 1024)), "makes no sense"),
    (image_with(entry(extra=b"more")), "extra data"),
    (image_with(entry() * 2, count=2), "two bitmaps with the name 'bits'"),
    (image_with(entry() + entry(b"other"), count=1), "does not end with"),
    (image_with(entry() + bytes(8)), "does not end with"),
    (image_with(entry(table_off=0)), "in no place for it"),
    (image_with(entry(table_off=TABLE + 8)), "in no place for it"),
    (image_with(entry(table_entries=0xFFFFFFFF)), "too large"),
    (image_with(entry(table_entries=0)), "empty"),
    (image_with(entry(table_entries=0, flags=1)), "empty"),
    (image_with(entry(table_entries=2)), "not as large as the disk needs it"),
    (image_with(entry(granularity_bits=9), clusters=8192), "not as large as the disk needs it"),
    (image_with(entry())[: DIRECTORY + 10], "past the end of the file"),
]


@pytest.mark.parametrize(("image", "reason"), BAD_DIRECTORIES)
def test_bad_directory_does_no_harm_to_the_disk(tmp_path: Path, image: bytes, reason: str) -> None:
    with opened(tmp_path, image) as disk:
        assert not any(disk.pread(1000, 0))
        with pytest.raises(fastqcow.FormatError, match=reason):
            disk.bitmaps  # noqa: B018 - a property that raises


@pytest.mark.parametrize("table", [BITS + 512, BITS | 1, 999 * CLUSTER])
def test_bad_table(tmp_path: Path, table: int) -> None:
    with opened(tmp_path, image_with(entry(), table=table)) as image, pytest.raises(fastqcow.FormatError, match="damaged"):
        list(image.bitmap("bits"))


@pytest.mark.parametrize("granularity", ["512", "64k", "1M"])
def test_as_qemu_marks(qemu: Qemu, tmp_path: Path, granularity: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, socket, pid = tmp_path / "disk.qcow2", tmp_path / "socket", tmp_path / "pid"
    qemu.img("create", "-q", "-f", "qcow2", path, "64M")
    qemu.img("bitmap", "--add", "-g", granularity, path, "since backup")
    qemu.io(path, "write 1M 300k", "write 40M 5", "write -z 50M 3M", "discard 60M 1M", f"write {(64 << 20) - 512} 512")
    subprocess.run(
        ["qemu-nbd", "-r", "-f", "qcow2", "-B", "since backup", "-k", socket, "--fork", "--pid-file", pid, path],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:since backup"
        marked = [e for e in json.loads(qemu.img("map", "--output=json", "--image-opts", options).stdout) if not e["data"]]
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
    expected = [(e["start"], e["length"]) for e in marked]
    with fastqcow.open(path) as image:
        assert [b.name for b in image.bitmaps] == ["since backup"]
        assert list(image.bitmap("since backup")) == expected
    check_commands(qemu, path)
    assert main(["bitmap", "--output=json", str(path), "since backup"]) == 0
    assert [tuple(found.values()) for found in json.loads(capsys.readouterr().out)] == expected
    assert main(["bitmap", str(path)]) == 0
    assert capsys.readouterr().out.startswith("since backup: granularity ")
    assert main(["bitmap", "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["auto"]
    assert main(["bitmap", str(path), "none"]) == 1
