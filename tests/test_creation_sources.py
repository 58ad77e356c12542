"""convert to qcow2 from every kind of source, and over backing files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from creating import SMALL, check, digest, out, raw, run, write
from images import PAYLOAD, build, data_entry, mixed, noise, text
from webserver import WebServer

__all__ = ["out", "raw"]


def test_standard_input(qemu: Qemu, raw: Path, out: Path) -> None:
    """A pipe, a file, and nothing at all."""
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=raw.read_bytes())
    check(qemu, raw, out)
    from_pipe = digest(out)
    with open(raw, "rb") as file:
        run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, stdin=file)
    assert digest(out) == from_pipe
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=b"")
    assert fastqcow.info(out)["virtual-size"] == 0
    qemu.img("check", out)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=b"x" * 70_001)
    with fastqcow.open(out) as image:
        assert image.read() == (b"x" * 70_001).ljust(70_144, b"\0")


def test_stream_to_raw_is_refused(out: Path) -> None:
    done = run("convert", "-f", "raw", "-", out, input=b"x" * 512, code=1)
    assert done.stderr == b"fastqcow: a stream can be written to a qcow2 image only\n"
    assert not out.exists()


def cluster_at(disk: bytes | bytearray, off: int) -> bytes:
    return bytes(disk[off : off + 65536]).ljust(65536, b"\0")


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": True}, {"compress": False}], ids=str)
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@pytest.mark.parametrize("longer", [-100_000, 0, 200_000])
def test_backing_file(qemu: Qemu, tmp_path: Path, out: Path, options: dict[str, Any], backing_format: str, longer: int) -> None:
    """Only what differs is written; and zeroes over data are zeroes."""
    base, raw = out.with_name("base"), tmp_path / "disk.raw"
    below = (SMALL + text(200_000, seed=9))[: len(SMALL) + longer & ~511]
    disk = bytearray(SMALL)
    disk[1000:1010] = b"0123456789"
    disk[131_072:] = bytes(len(SMALL) - 131_072)
    raw.write_bytes(disk[: len(disk) & ~511])
    (tmp_path / "base.raw").write_bytes(below)
    qemu.img("convert", "-f", "raw", "-O", backing_format, tmp_path / "base.raw", base)
    write(raw, out, backing_file="base", backing_format=backing_format, **options)
    said = check(qemu, raw, out)
    assert said["backing-filename"] == "base"
    assert said["backing-filename-format"] == backing_format
    pairs = [(cluster_at(disk, i), cluster_at(below, i)) for i in range(0, len(disk), 65536)]
    stored = [ours for ours, theirs in pairs if ours != theirs and (any(ours) or options.get("compat") == "0.10")]
    assert fastqcow.check(out).allocated_clusters == len(stored) < len(pairs)


def test_backing_file_by_the_command(qemu: Qemu, raw: Path, out: Path) -> None:
    base = out.with_name("ba,se")
    shutil.copy(raw, base)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-B", "ba,se", "-F", "raw", raw, out)
    check(qemu, raw, out)
    by_letters = digest(out)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "backing_file=ba,,se,backing_fmt=raw", raw, out)
    assert digest(out) == by_letters
    assert fastqcow.check(out).allocated_clusters == 0


def test_errors_of_a_backing_file_bear_its_name(raw: Path, out: Path) -> None:
    base = out.with_name("base.qcow2")
    write(raw, base)
    with fastqcow.open(base) as image:
        l2_off = int.from_bytes(base.read_bytes()[image.header.l1_off :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
    data = bytearray(base.read_bytes())
    data[l2_off : l2_off + 8] = (0x101).to_bytes(8, "big")
    data[l2_off : l2_off + 8] = (1 << 63 | 0x200).to_bytes(8, "big")
    base.write_bytes(data)
    with pytest.raises(fastqcow.FormatError) as caught:
        write(raw, out, backing_file="base.qcow2", backing_format="qcow2")
    assert caught.value.path == str(base)
    assert sorted(p.name for p in out.parent.iterdir()) == ["base.qcow2"]


def test_errors_of_a_source_and_of_a_backing_file_at_once(qemu: Qemu, raw: Path, out: Path, tmp_path: Path) -> None:
    """Two threads meet damage at the same time, the one in the source's chain, the other in the backing file: the lowest is told,
    and of its own file.
    """
    damaged = 0x200 | 1 << 63  # not aligned
    below, top, base = tmp_path / "below.qcow2", tmp_path / "top.qcow2", out.with_name("base.qcow2")
    stretch = (512 << 10) // 65536
    entries = [data_entry(PAYLOAD * 65536)] * (3 * stretch)
    of_source, of_base = [*entries], [*entries]
    of_source[stretch - 1], of_base[stretch] = damaged, damaged
    below.write_bytes(build(of_source, noise(65536)))
    base.write_bytes(build(of_base, noise(65536, seed=2)))
    qemu.img("create", "-q", "-f", "qcow2", "-b", "below.qcow2", "-F", "qcow2", top)
    found = set()
    for _ in range(30):
        with pytest.raises(fastqcow.FormatError) as caught:
            fastqcow.convert(top, out, format="qcow2", compress=True, backing_file=base.name, backing_format="qcow2", threads=4)
        found.add((caught.value.path, caught.value.guest_off))
    assert found == {(str(below), (stretch - 1) * 65536)}


@pytest.mark.parametrize("name", ["snapshot", "chain"])
def test_sources(qemu: Qemu, raw: Path, out: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "disk.qcow2"
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, source)
    if name == "snapshot":
        qemu.img("snapshot", "-c", "before", source)
        qemu.io(source, "write -P 3 0 1M")
        run("convert", "-c", "-l", "before", "-O", "qcow2", source, out)
        check(qemu, raw, out)
        return
    top, flat = tmp_path / "top.qcow2", tmp_path / "flat.raw"
    qemu.img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
    qemu.io(top, "write -P 3 70000 100000", "write -z 1M 256k")
    qemu.img("convert", "-O", "raw", top, flat)
    run("convert", "-c", "-O", "qcow2", "-o", "cluster_size=16k", top, out)
    check(qemu, flat, out)


def test_a_stream_that_never_ends_can_be_interrupted(out: Path) -> None:
    """The writer of the pipe is silent: a signal ends it all the same, and nothing is left."""
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "fastqcow", "convert", "-c", "-f", "raw", "-O", "qcow2", "-", str(out)],
        stdin=read_end,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(read_end)
        os.write(write_end, noise(60_000))
        for _ in range(1000):
            if list(out.parent.iterdir()):
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    os.close(write_end)
    assert (process.returncode, stderr) == (130, b"fastqcow: interrupted\n")
    assert list(out.parent.iterdir()) == []


def test_encrypted_source(qemu: Qemu, raw: Path, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    source = tmp_path / "secret.qcow2"
    secret, options = ("--object", "secret,id=s,data=moo"), "encrypt.format=aes,encrypt.key-secret=s,cluster_size=4k"
    qemu.img("convert", *secret, "-f", "raw", "-O", "qcow2", "-o", options, raw, source)
    (tmp_path / "password").write_text("moo")
    run("convert", "-c", "-O", "qcow2", "--password-file", tmp_path / "password", source, out)
    check(qemu, raw, out)
    assert "encrypted" not in fastqcow.info(out)


@pytest.mark.parametrize("snapshot", [False, True])
def test_source_at_a_url(qemu: Qemu, raw: Path, out: Path, server: WebServer, snapshot: bool) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    source = out.with_name("source.qcow2")
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, source)
    if snapshot:
        qemu.img("snapshot", "-c", "before", source)
        qemu.io(source, "write -P 3 0 1M")
    server.files["disk.qcow2"] = source.read_bytes()
    run("convert", "-c", "-O", "qcow2", *(("-l", "before") if snapshot else ()), server.url("disk.qcow2"), out)
    check(qemu, raw, out)
    by_url = digest(out)
    fastqcow.convert(source, out, format="qcow2", compress=True) if not snapshot else write(raw, out)
    assert digest(out) == by_url


def test_source_with_holes(qemu: Qemu, out: Path, tmp_path: Path) -> None:
    """Which are not read; and the file is that of the same disk without holes."""
    sparse, dense = tmp_path / "sparse.raw", tmp_path / "dense.raw"
    with open(sparse, "wb") as file:
        file.truncate(40 << 20)
        for at in (0, 3_000_000, 20 << 20, (40 << 20) - 512):
            file.seek(at)
            file.write(text(512) if at else text(100_000))
    dense.write_bytes(sparse.read_bytes())
    with fastqcow.open_raw(sparse) as disk:
        fastqcow.convert(disk, out, format="qcow2", compress=True)
        read = disk._open_reader().stats()["bytes_fetched"]
    assert sparse.stat().st_blocks * 512 >= 40 << 20 or read < 4 << 20
    check(qemu, sparse, out)
    of_sparse = digest(out)
    write(dense, out)
    assert digest(out) == of_sparse
    qemu.img("convert", "-f", "raw", "-O", "qcow2", sparse, tmp_path / "plain.qcow2")
    fastqcow.convert(tmp_path / "plain.qcow2", out, format="qcow2", compress=True)
    assert digest(out) == of_sparse


def test_letters(qemu: Qemu, raw: Path, out: Path) -> None:
    """-m, -p and -S on the command line; the file is the same."""
    found = set()
    for arguments in ([], ["-m", "1"], ["-m", "8", "-p"], ["-S", "64k"], ["-W"]):
        run("convert", "-c", *arguments, "-f", "raw", "-O", "qcow2", raw, out)
        found.add(digest(out))
    assert len(found) == 1
    run("convert", "-c", "-S", "0", "-f", "raw", "-O", "qcow2", raw, out)
    check(qemu, raw, out)
    assert fastqcow.check(out).allocated_clusters == -(-raw.stat().st_size // 65536)


def test_ctrl_c_while_clusters_are_compressed(raw: Path, out: Path) -> None:
    """Whatever was there before is there after."""
    raw.write_bytes(mixed(20_000_000))
    out.write_bytes(b"precious")
    with subprocess.Popen(
        [sys.executable, "-m", "fastqcow", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_level=9", raw, out],
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None and not any(p.name.endswith(".part") and p.stat().st_size for p in out.parent.iterdir()):
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, b"fastqcow: interrupted\n")
    assert [(p.name, p.read_bytes()) for p in out.parent.iterdir()] == [("disk.qcow2", b"precious")]
