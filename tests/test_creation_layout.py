"""Where what `convert` writes lies in the image: streams, clusters, tables, refcounts, the header."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import need_proc
from conftest import Qemu
from creating import check, needs_isal, out, raw, run, streams, write
from images import COMPRESSED, COPIED, mixed, noise, text

__all__ = ["out", "raw"]

OFFSET = 0x00FF_FFFF_FFFF_FE00


@pytest.mark.parametrize("level", [1, 6, 9, pytest.param("fast", marks=needs_isal)])
def test_distances_stay_within_4_kib(tmp_path: Path, out: Path, level: Any) -> None:
    """Readers that inflate by streaming, with the window that QEMU writes with, see every distance that is too far: the bytes
    repeat themselves after 5,000, which an encoder with a larger window would find."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(5000) * 26 + text(131_072))
    write(raw, out, compression_level=level)

    def inflate_streaming(stream: bytes, window_bits: int) -> int:
        decoder, nbytes, left = zlib.decompressobj(-window_bits), 0, stream
        while not decoder.eof and left:
            nbytes += len(decoder.decompress(left, 256))
            left = decoder.unconsumed_tail
        return nbytes

    found = streams(out)
    assert len(found) >= 2
    assert [inflate_streaming(stream, 12) for stream in found] == [65536] * len(found)
    encoder = zlib.compressobj(6, zlib.DEFLATED, -15)
    far = encoder.compress(noise(5000) * 13) + encoder.flush()
    with pytest.raises(zlib.error, match="too far back"):
        inflate_streaming(far, 12)


def test_tables_lie_side_by_side_behind_the_data(raw: Path, out: Path) -> None:
    write(raw, out, cluster_size=512)
    data = out.read_bytes()
    with fastqcow.open(out) as image:
        head = image.header
    l2 = [
        int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
        for i in range(head.l1_entries)
        if data[head.l1_off + 8 * i :][:8] != bytes(8)
    ]
    l1_end = head.l1_off + (head.l1_entries * 8 + 511 & ~511)
    assert l2 == list(range(l1_end, l1_end + 512 * len(l2), 512))
    assert head.refcount_table_off == l1_end + 512 * len(l2)


def entries(path: Path) -> list[tuple[int, int, int]]:
    """The L2 entries of an image with standard entries, as (cluster of the disk, entry, host offset)."""
    data = path.read_bytes()
    with fastqcow.open(path) as image:
        head = image.header
    per_table, found = head.cluster_size // 8, []
    for i in range(head.l1_entries):
        l2_off = int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & OFFSET
        for j in range(per_table if l2_off else 0):
            entry = int.from_bytes(data[l2_off + 8 * j :][:8], "big")
            mask = (1 << 62 - (head.cluster_bits - 8)) - 1 if entry & COMPRESSED else OFFSET
            if entry:
                found.append((i * per_table + j, entry, entry & mask))
    return found


def lengths(path: Path) -> list[tuple[int, int]]:
    """Where each compressed cluster's stream starts in the file, and how long it is to the byte; in the order of the disk."""
    data, found = path.read_bytes(), []
    for _, entry, host_off in entries(path):
        if entry & COMPRESSED:
            decoder = zlib.decompressobj(-12)
            stream = data[host_off : host_off + (1 << 21)]
            decoder.decompress(stream)
            assert decoder.eof
            found.append((host_off, len(stream) - len(decoder.unused_data)))
    return found


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_streams_are_packed_as_qemu_packs_them(qemu: Qemu, tmp_path: Path, out: Path, cluster_size: int) -> None:
    """To the byte: each starts where the one before ended, unless a table of QEMU's or a plain cluster lies there."""
    raw, theirs = tmp_path / "disk.raw", tmp_path / "theirs.qcow2"
    raw.write_bytes(text(1 << 20) + noise(70_000) + mixed(1 << 20) + bytes(1 << 20) + text(300_000, seed=1))
    raw.write_bytes(raw.read_bytes()[: raw.stat().st_size & ~511])
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", raw, theirs)
    write(raw, out, cluster_size=cluster_size)
    assert [c for c, entry, _ in entries(out) if entry & COMPRESSED] == [c for c, e, _ in entries(theirs) if e & COMPRESSED]
    own, qemus = lengths(out), lengths(theirs)
    assert [n for _, n in own] == [n for _, n in qemus]
    jumps = [at for (before, n), (at, _) in itertools.pairwise(own) if at != before + n]
    assert len(jumps) < len(own) * 0.1
    assert all(at % cluster_size == 0 for at in jumps)
    assert out.stat().st_size <= theirs.stat().st_size + cluster_size


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_refcounts_at_their_limits(qemu: Qemu, tmp_path: Path, out: Path, bits: int) -> None:
    """Streams of some hundred bytes: as many share a host cluster as its refcount can count, and with 1 bit none does."""
    raw, most = tmp_path / "disk.raw", (1 << bits) - 1
    raw.write_bytes(b"".join(noise(16, seed=i) * 256 for i in range(700)))
    write(raw, out, cluster_size=4096, refcount_bits=bits)
    check(qemu, raw, out)
    found = lengths(out)
    assert len(found) == 700
    assert all(n < 100 for _, n in found)
    sharing = Counter(cluster for at, n in found for cluster in range(at // 4096, (at + n - 1) // 4096 + 1))
    assert max(sharing.values()) == min(most, max(sharing.values()))
    if bits <= 4:
        assert max(sharing.values()) == most
    if bits == 1:
        assert all(at % 4096 == 0 for at, _ in found)
    data = out.read_bytes()
    table_off = int.from_bytes(data[48:56], "big")
    block_off = int.from_bytes(data[table_off : table_off + 8], "big")
    block = int.from_bytes(data[block_off : block_off + 4096], "little" if bits < 8 else "big")
    for cluster, count in sharing.items():
        shift = cluster * bits if bits < 8 else 4096 * 8 - (cluster + 1) * bits
        assert block >> shift & most == count


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_what_does_not_get_smaller_is_stored_as_it_is(raw: Path, out: Path, method: str) -> None:
    raw.write_bytes(noise(5 * 65536) + text(65536))
    write(raw, out, compression_type=method)
    found = entries(out)
    data = out.read_bytes()
    assert [bool(entry & COMPRESSED) for _, entry, _ in found] == [False] * 5 + [True]
    for cluster, entry, host_off in found[:5]:
        assert entry == COPIED | host_off
        assert host_off % 65536 == 0
        assert data[host_off : host_off + 65536] == noise(5 * 65536)[cluster * 65536 :][:65536]


def test_the_header_is_written_last(raw: Path, out: Path) -> None:
    """Until then what is there begins with zeroes, and has another name."""
    seen = []

    def look(done: int, total: int) -> None:
        (part,) = out.parent.iterdir()
        if part != out:
            seen.append(part.read_bytes()[:512].strip(b"\0"))

    write(raw, out, progress=look, cluster_size=512, threads=1)
    assert seen
    assert not any(seen[:-1])
    assert [p.name for p in out.parent.iterdir()] == ["disk.qcow2"]


def test_what_is_said_of_the_header(qemu: Qemu, raw: Path, out: Path) -> None:
    """As QEMU writes it for the same options, but for where the tables lie and the bits that say nothing."""
    theirs = out.with_name("theirs")
    for options in ([], ["compat=0.10"], ["compression_type=zstd"], ["extended_l2=on"], ["refcount_bits=64"], ["cluster_size=2M"]):
        given = [argument for option in options for argument in ("-o", option)]
        qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", *given, raw, theirs)
        run("convert", "-c", "-f", "raw", "-O", "qcow2", *given, raw, out)
        ours, qemus = ({**fastqcow.info(path)} for path in (out, theirs))
        for what in ("filename", "actual-size", "children"):
            ours.pop(what, None), qemus.pop(what, None)
        assert ours == qemus


@pytest.mark.parametrize("sparse_size", [0, 512, 4096, 131072, 1 << 20])
def test_sparse_size_counts_as_for_qemu(qemu: Qemu, tmp_path: Path, out: Path, sparse_size: int) -> None:
    """Which clusters are stored: compressed, with extended entries, and neither."""
    raw, theirs = tmp_path / "disk.raw", tmp_path / "theirs.qcow2"
    zeroes = (512, 4096, 60_000, 65536, 131072, 200_000, 1 << 20, 1 << 19)
    raw.write_bytes(b"".join(noise(5000 if i % 3 else 65536, seed=i) + bytes(n) for i, n in enumerate(zeroes * 2)) + bytes(224))

    def stored(path: Path) -> set[int]:
        with fastqcow.open(path) as image:
            found = [e for e in image.map() if e.data]
        return {c for e in found for c in range(e.start // 65536, (e.start + e.length + 65535) // 65536)}

    for arguments in ([], ["-c"], ["-o", "extended_l2=on"]):
        command: list[str | Path] = ["convert", *arguments, "-S", str(sparse_size), "-f", "raw", "-O", "qcow2", raw]
        qemu.img(*command, theirs)
        run(*command, out)
        check(qemu, raw, out)
        assert stored(out) == stored(theirs)


SAYS = """
import sys
from fastqcow.cli import main
main(["convert", "-c", "-f", "raw", "-O", "qcow2", *sys.argv[1:]])
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "64", "-o", "compression_level=1"],
        ["-m", "16", "-o", "cluster_size=2M,compression_type=zstd,compression_level=19"],
        ["-m", "64", "-o", "compression_type=zstd"],
        ["-m", "64", "-o", "cluster_size=2M,compression_level=1", "-B", "base", "-F", "raw"],
    ],
    ids=str,
)
def test_memory_stays_below_256_mib(tmp_path: Path, out: Path, options: list[str]) -> None:
    """Whatever the threads: the states of zstd alone take up to 37 MiB each."""
    need_proc()
    raw = tmp_path / "disk.raw"
    raw.write_bytes((text(30_000) + noise(2000)) * (96 << 20 >> 15))
    out.with_name("base").write_bytes(raw.read_bytes()[:512] + bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", SAYS, *options, raw, out], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) << 10 < 256 << 20
