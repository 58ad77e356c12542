"""Images written by `convert`: disks to write, and what is true of every image."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from images import mixed, noise, text

needs_isal = pytest.mark.skipif(fastqcow.build_info().isal is None, reason="built without ISA-L")
CONTENTS = mixed(5_000_000) + bytes(3_000_000) + noise(300_000) + text(700_000) + bytes(1024)
SMALL = text(40_000) + bytes(70_000) + noise(20_000) + text(69_616)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENTS[: len(CONTENTS) & ~511])
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.qcow2"


def write(raw: Path, out: Path, *, compress: bool = True, **options: Any) -> fastqcow.Conversion:
    with fastqcow.open_raw(raw, threads=options.pop("threads", 2)) as disk:
        return fastqcow.convert(disk, out, format="qcow2", compress=compress, **options)


def check(qemu: Qemu, raw: Path, out: Path) -> dict[str, Any]:
    """The image is sound, for QEMU and for us, and its disk is this one; returns what is said of it."""
    done = qemu.img("check", "-f", "qcow2", "--output=json", out)
    found = json.loads(done.stdout)
    assert not any(found.get(what) for what in ("corruptions", "leaks", "check-errors"))
    qemu.img("compare", "-f", "raw", "-F", "qcow2", raw, out)
    counts = fastqcow.check(out)
    assert (counts.corruptions, counts.leaks, counts.check_errors, counts.overlaps) == (0, 0, 0, 0)
    with fastqcow.open(out) as ours, fastqcow.open_raw(raw, whole_sectors=True) as theirs:
        assert fastqcow.compare(ours, theirs) is None
    said: dict[str, Any] = json.loads(qemu.img("info", "-f", "qcow2", "--output=json", out).stdout)
    return said


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def streams(path: Path) -> list[bytes]:
    """The compressed clusters of an image, with what follows them in their last sector."""
    data = path.read_bytes()
    with fastqcow.open(path) as image:
        head = image.header
    found = []
    for i in range(head.l1_entries):
        off = int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
        if off:
            table = fastqcow.parse_l2(data[off : off + head.cluster_size], cluster_bits=head.cluster_bits)
            found += [data[at : at + n] for at, n in zip(table.host_off, table.in_nbytes, strict=True) if n]
    return found


def run(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([sys.executable, "-m", "fastqcow", *map(str, arguments)], capture_output=True, check=False, **options)
    assert done.returncode == code, done.stderr.decode()
    return done
