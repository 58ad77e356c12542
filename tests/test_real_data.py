"""The real Debian image beside the checkout, and the one that the project ships: digests of the whole."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastqcow
from capabilities import need_proc


@pytest.fixture(scope="module")
def boot(real_data: Path) -> tuple[Path, str]:
    return real_data / "boot-zlib.qcow2", (real_data / "boot.sha256").read_text().split()[0]


@pytest.mark.parametrize("nbytes", [1 << 20, 4096])
def test_sequential_reads(boot: tuple[Path, str], nbytes: int) -> None:
    digest = hashlib.sha256()
    with fastqcow.open(boot[0]) as image:
        while data := image.read(nbytes):
            digest.update(data)
        stats = image.stats()
    assert digest.hexdigest() == boot[1]
    assert stats["clusters_inflated"] == 2315


def test_from_a_gzipped_copy(boot: tuple[Path, str], tmp_path: Path) -> None:
    packed = tmp_path / "boot.qcow2.gz"
    packed.write_bytes(gzip.compress(boot[0].read_bytes(), 1))
    digest = hashlib.sha256()
    with gzip.open(packed) as file, fastqcow.open(file) as image:
        while data := image.read(1 << 20):
            digest.update(data)
    assert digest.hexdigest() == boot[1]


def test_convert_command(boot: tuple[Path, str], tmp_path: Path) -> None:
    """In a process of its own, whose memory is bounded. (getrusage would count the memory of the process that started it.)"""
    need_proc()
    code = (
        "import sys; from fastqcow.cli import main; code = main(sys.argv[1:]);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", boot[0], tmp_path / "o"], capture_output=True, text=True, check=True
    )
    with (tmp_path / "o").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == boot[1]
    assert int(done.stdout) < 128 << 10  # KiB


def test_recorded_boot(boot: tuple[Path, str], real_data: Path) -> None:
    """The reads of a machine that booted from this disk, against the raw disk."""
    trace = [tuple(map(int, line.split())) for line in (real_data / "boot.trace").read_text().splitlines()]
    with fastqcow.open(boot[0]) as image, fastqcow.open(boot[0], engine="libz", threads=1, cache_size=0) as control:
        for offset, nbytes in trace:
            assert image.pread(nbytes, offset) == control.pread(nbytes, offset)


def test_demo_image(demo_image: Path) -> None:
    expected = demo_image.with_suffix(".sha256").read_text().split()[0]
    assert demo_image.stat().st_size < 2_000_000
    with fastqcow.open(demo_image) as image:
        assert hashlib.file_digest(image, "sha256").hexdigest() == expected
