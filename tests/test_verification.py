"""Conversions that are checked, digested and verified: what is written is right, or there is an error and no target."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from cases import run
from conftest import Qemu
from fastqcow.cli import main
from images import COPIED, L2, PAYLOAD, build, data_entry, mixed, noise, patched, plain_and_compressed, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
SIZE = 9 << 20


@pytest.fixture(scope="module")
def contents() -> bytes:
    return mixed(SIZE - 5 * CLUSTER, seed=5) + bytes(4 * CLUSTER) + noise(CLUSTER)


@pytest.fixture
def source(qemu: Qemu, tmp_path: Path, contents: bytes) -> Path:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(contents)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    return image


TARGETS: dict[str, dict[str, Any]] = {
    "raw": {},
    "raw, no holes": {"sparse_size": 0},
    "raw, by the kernel": {"copy_offload": True},
    "raw, preallocated": {"preallocation": "full"},
    "qcow2": {"format": "qcow2"},
    "qcow2, compressed": {"format": "qcow2", "compress": True},
    "qcow2, zstd": {"format": "qcow2", "compress": True, "compression_type": "zstd", "cluster_size": 4096},
    "qcow2, dense": {"format": "qcow2", "sparse_size": 0},
}


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_the_digest_is_that_of_the_disk(
    source: Path, contents: bytes, tmp_path: Path, options: dict[str, Any], threads: int
) -> None:
    target = tmp_path / "out"
    done = fastqcow.convert(source, target, checksum="sha256", verify=True, check=True, threads=threads, **options)
    assert done.checksum == hashlib.sha256(contents).hexdigest()
    with fastqcow.open(target) if "format" in options else fastqcow.open_raw(target) as written:
        assert fastqcow.checksum(written) == done.checksum
        assert written.read() == contents
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_the_digest_of_plain_and_compressed_clusters(tmp_path: Path, scattered: bool, fmt: str) -> None:
    image, contents = plain_and_compressed(scattered=scattered)
    done = fastqcow.convert(io.BytesIO(image), tmp_path / "out", format=fmt, checksum="sha256", verify=True)  # read in order
    assert done.checksum == hashlib.sha256(contents).hexdigest()
    (tmp_path / "disk.qcow2").write_bytes(image)
    assert fastqcow.convert(tmp_path / "disk.qcow2", tmp_path / "out", format=fmt, checksum="md5").checksum == (
        hashlib.md5(contents).hexdigest()
    )


@pytest.mark.parametrize("size", [0, 512, CLUSTER - 512, CLUSTER, 3 * CLUSTER + 1024, 70 << 20])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_zeroes_are_digested_without_being_read(tmp_path: Path, size: int, fmt: str) -> None:
    """One cluster of data in the middle of nothing, or nothing at all."""
    clusters = -(-size // CLUSTER)
    entries = [data_entry(AT) if i == clusters // 2 else 0 for i in range(clusters)]
    image = build(entries, text(CLUSTER), size=size, l1=[COPIED | L2 * CLUSTER] if size else [])
    expected = b"".join(text(CLUSTER) if entry else bytes(CLUSTER) for entry in entries)[:size]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    with fastqcow.open(path) as disk:
        done = fastqcow.convert(disk, tmp_path / "out", format=fmt, checksum="sha256")
        assert disk.stats()["bytes_fetched"] <= 3 * CLUSTER
    assert done.checksum == hashlib.sha256(expected).hexdigest()


def test_the_digest_of_a_stream_is_that_of_whole_sectors(tmp_path: Path) -> None:
    data = text((1 << 20) + 700)
    command = [sys.executable, "-m", "fastqcow", "convert", "--checksum", "-f", "raw", "-O", "qcow2", "-", str(tmp_path / "out")]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data + bytes(-len(data) % 512)).hexdigest()
    with fastqcow.open(tmp_path / "out") as image:
        assert fastqcow.checksum(image) == done.stdout.split()[0].decode()
    done = subprocess.run([*command, "--verify"], input=data, capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)


def test_nothing_is_read_twice(source: Path, tmp_path: Path) -> None:
    with fastqcow.open(source) as plain, fastqcow.open(source) as digested:
        fastqcow.convert(plain, tmp_path / "out")
        fastqcow.convert(digested, tmp_path / "out", checksum="sha256")
        assert digested.stats()["clusters_inflated"] == plain.stats()["clusters_inflated"]
        assert digested.stats()["bytes_fetched"] == plain.stats()["bytes_fetched"]


def test_a_damaged_cluster_ends_it_with_the_error_of_that_cluster(tmp_path: Path) -> None:
    """Threads that wait for their turn to digest are not left waiting."""
    image, _ = plain_and_compressed()
    with fastqcow.open(io.BytesIO(image)) as disk:
        damaged = next(e for e in disk.map() if e.compressed and e.start > 3 << 20)
    at = 8 * (damaged.start // CLUSTER) + L2 * CLUSTER
    path = tmp_path / "disk.qcow2"
    path.write_bytes(patched(image, at, (1 << 62 | len(image)).to_bytes(8, "big")))
    for options in ({}, {"format": "qcow2"}):
        with pytest.raises(fastqcow.FormatError) as caught:
            fastqcow.convert(path, tmp_path / "out", checksum="sha256", threads=4, **options)  # type: ignore[arg-type]
        assert caught.value.guest_off == damaged.start
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_a_digest_that_fails(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        digest_size = 32

        def update(self, data: object) -> None:
            raise RuntimeError("no more")

    monkeypatch.setattr(hashlib, "new", lambda _: Failing())
    for fmt in ("raw", "qcow2"):
        with pytest.raises(RuntimeError, match="no more"):
            fastqcow.convert(source, tmp_path / "out", checksum="sha256", format=fmt)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["sha", "shake_128"])
def test_digests_that_there_are_not(source: Path, tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(ValueError, match=r"unsupported hash type|no length"):
        fastqcow.convert(source, tmp_path / "out", checksum=algorithm)


# Verification: what is stored is changed when it is about to be stored


@pytest.fixture
def bad_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bytes | None], None]:
    """A disk that keeps other bytes than it was given, at an offset; without bytes it loses what comes from there on."""

    def install(at: int, data: bytes | None) -> None:
        def fsync(fd: int) -> None:
            os.truncate(fd, at) if data is None else os.pwrite(fd, data, at)

        monkeypatch.setattr(os, "fsync", fsync)

    return install


BAD_TARGETS: dict[str, tuple[dict[str, Any], int, bytes | None]] = {
    "a byte": ({}, 12_345, b"\xee"),
    "the first byte": ({}, 0, b"\xee"),
    "the last byte": ({}, SIZE - 1, b"\xee\xee"[:1]),
    "in a hole": ({}, SIZE - 3 * CLUSTER, b"\xee"),
    "the end is lost": ({}, SIZE - 1, None),
    "all is lost": ({}, 0, None),
    "too long": ({}, SIZE, b"\0"),
    "qcow2, a byte": ({"format": "qcow2"}, 8 * CLUSTER, b"\xee"),
    "qcow2, the header": ({"format": "qcow2"}, 20, b"\xee"),
    "qcow2, the end is lost": ({"format": "qcow2"}, 4 * CLUSTER, None),
    "compressed, a byte": ({"format": "qcow2", "compress": True}, 3 * CLUSTER, b"\xee\xee\xee"),
}


@pytest.mark.parametrize(("options", "at", "data"), BAD_TARGETS.values(), ids=BAD_TARGETS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "over a file"])
def test_what_was_stored_is_not_what_was_written(
    source: Path,
    tmp_path: Path,
    bad_disk: Callable[[int, bytes | None], None],
    options: dict[str, Any],
    at: int,
    data: bytes | None,
    exists: bool,
) -> None:
    target = tmp_path / "out"
    if exists:
        target.write_bytes(b"as it was")
    bad_disk(at, data)
    fastqcow.convert(source, tmp_path / "unverified", **options)  # nobody looks
    with pytest.raises(fastqcow.Error) as caught:
        fastqcow.convert(source, target, verify=True, **options)
    assert caught.value.path == str(target)
    assert not exists or target.read_bytes() == b"as it was"
    assert target.exists() == exists
    assert not list(tmp_path.glob(".*"))


def test_the_place_of_a_difference(source: Path, tmp_path: Path, bad_disk: Callable[[int, bytes | None], None]) -> None:
    bad_disk(12_345, b"\xee")
    with pytest.raises(fastqcow.VerifyError) as caught:
        fastqcow.convert(source, tmp_path / "out", verify=True)
    assert (caught.value.guest_off, caught.value.path) == (12_345 // 512 * 512, str(tmp_path / "out"))
    code, _, err = run("convert", source, tmp_path / "out", "--verify")
    assert (code, err.count("\n")) == (1, 1)
    assert "read back" in err


def test_in_place(source: Path, contents: bytes, tmp_path: Path, bad_disk: Callable[[int, bytes | None], None]) -> None:
    """What is written in place, as a device is, may be longer, and stays what it is where it is found to be wrong."""
    target = tmp_path / "out"
    target.write_bytes(b"\xaa" * (SIZE + 999))
    fastqcow.convert(source, target, verify=True, in_place=True)
    assert target.read_bytes() == contents + b"\xaa" * 999
    bad_disk(CLUSTER, b"\xee\xed")
    with pytest.raises(fastqcow.VerifyError):
        fastqcow.convert(source, target, verify=True, in_place=True)
    assert target.read_bytes()[CLUSTER : CLUSTER + 2] == b"\xee\xed"


@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
def test_over_a_backing_file(
    source: Path, contents: bytes, tmp_path: Path, backing_format: str, bad_disk: Callable[[int, bytes | None], None]
) -> None:
    base, target = tmp_path / f"base.{backing_format}", tmp_path / "out"
    raw = bytearray(contents)
    raw[3 * CLUSTER : 3 * CLUSTER + 9] = b"different"
    (tmp_path / "base.raw").write_bytes(raw)
    if backing_format == "qcow2":
        with fastqcow.open_raw(tmp_path / "base.raw") as disk:
            fastqcow.convert(disk, base, format="qcow2", verify=True)
    options: dict[str, Any] = {"format": "qcow2", "backing_file": base.name, "backing_format": backing_format}
    done = fastqcow.convert(source, target, verify=True, checksum="sha256", **options)
    assert done.checksum == hashlib.sha256(contents).hexdigest()
    assert done.bytes_written == CLUSTER
    target.unlink()
    bad_disk(0, bytes(512))
    with pytest.raises(fastqcow.Error):
        fastqcow.convert(source, target, verify=True, **options)
    assert not target.exists()


def _note(seen: list[tuple[int, int]], done: int, size: int) -> None:
    seen.append((done, size))


def test_progress_counts_what_is_verified(source: Path, tmp_path: Path) -> None:
    for fmt in ("raw", "qcow2"):
        seen: list[tuple[int, int]] = []
        fastqcow.convert(source, tmp_path / "out", verify=True, progress=partial(_note, seen), format=fmt)
        assert seen == sorted(seen)
        assert seen[-1] == (2 * SIZE, 2 * SIZE)


# The check before


def test_a_corrupt_image_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([data_entry(AT)], text(CLUSTER)))  # without refcounts
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    (tmp_path / "out").unlink()
    for options in ([], ["-O", "qcow2"]):
        assert main(["convert", "--check", *options, str(path), str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "the check found" in said
        assert not (tmp_path / "out").exists()


def test_a_corrupt_backing_file(qemu: Qemu, tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    base.write_bytes(build([data_entry(AT)], text(CLUSTER)))
    qemu.img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)
    with pytest.raises(fastqcow.FormatError, match="the check found") as caught:
        fastqcow.convert(path, tmp_path / "out", check=True)
    assert caught.value.path == str(base)


def test_leaks_are_told(qemu: Qemu, source: Path, contents: bytes, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    table_off = int.from_bytes(data[48:56], "big")
    block_off = int.from_bytes(data[table_off : table_off + 8], "big")
    end = -(-len(data) // CLUSTER)
    data[block_off + 2 * end : block_off + 2 * end + 2] = b"\0\1"
    source.write_bytes(data.ljust((end + 1) * CLUSTER, b"\0"))
    assert qemu.img("check", source, check=False).returncode == 3
    with pytest.warns(fastqcow.CheckWarning, match="1 leaked clusters"):
        fastqcow.convert(source, tmp_path / "out", check=True)
    assert (tmp_path / "out").read_bytes() == contents
    command = [sys.executable, "-m", "fastqcow", "convert", "--check", str(source), str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr.count("\n")) == (0, 1)
    assert told.stderr.startswith("fastqcow: warning: ")


def test_a_raw_image_cannot_be_checked(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(512))
    with fastqcow.open_raw(raw) as disk, pytest.raises(ValueError, match="no tables to check"):
        fastqcow.convert(disk, tmp_path / "out", check=True)


def test_a_snapshot_is_checked_with_its_image(qemu: Qemu, source: Path, contents: bytes, tmp_path: Path) -> None:
    qemu.img("snapshot", "-c", "before", source)
    with fastqcow.open(source) as image, image.snapshot("before") as snapshot:
        done = fastqcow.convert(snapshot, tmp_path / "out", check=True, verify=True, checksum="sha256")
    assert done.checksum == hashlib.sha256(contents).hexdigest()


# The command


def test_the_command(source: Path, contents: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, digest = tmp_path / "out", hashlib.sha256(contents).hexdigest()
    assert main(["convert", "--check", "--verify", "--checksum", str(source), str(target)]) == 0
    line = capsys.readouterr().out
    assert line == f"{digest}  {target}\n"
    done = subprocess.run(["sha256sum", "-c"], input=line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert main(["checksum", str(target)]) == 0
    assert capsys.readouterr().out == line
    assert main(["convert", "--output=json", "--checksum", str(source), str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["checksum"] == digest
    assert main(["convert", "--output=json", str(source), str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["checksum"] is None
