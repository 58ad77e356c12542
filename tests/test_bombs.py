"""Images made to cost time or memory: what they can cost is bounded by what their file holds and by what was asked for.

The bounds are those of SECURITY.md. Memory is the most that a process of its own has held; time is counted: bytes read, clusters
inflated, or seconds of CPU, which do not depend on what else a machine does. The clock is a backstop.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bombs
import fastqcow
import serving
from capabilities import need_proc
from cases import run
from conftest import Qemu
from images import build, compressed_entry, patched, text
from images import deflate as usual_deflate
from luksmaker import SLOTS, header_off, u32

BACKSTOP = 300  # seconds of the clock, on a machine that does much else
CPU_SECONDS = 0.25  # so much an operation is given; then it is interrupted, as by Ctrl-C
LATENCY = 0.5  # seconds of CPU, of all threads together, between Ctrl-C and the end
MIB = 1 << 20

# Runs each command of a list, and says how it ended; Ctrl-C comes after so much CPU. Output is counted, and dropped.
RUN = """
import contextlib, io, json, os, resource, signal, sys, time
import fastqcow
from fastqcow.cli import main

class Counter(io.TextIOBase):
    nbytes = 0
    def write(self, text):
        self.nbytes += len(text)
        return len(text)
    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)

armed = False

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

signal.signal(signal.SIGPROF, interrupt)
commands, seconds = json.loads(sys.argv[1])
for command in commands:
    out, err = Counter(), io.StringIO()
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        armed = True
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            code = main(command)
            armed = False
        except KeyboardInterrupt:
            code, armed = 130, False
        signal.setitimer(signal.ITIMER_PROF, 0)
    took = time.process_time() - started
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    print(json.dumps([command[0], code, took, out.nbytes, err.getvalue()[-300:], peak]))
"""


class Done(NamedTuple):
    """How a command ended: `peak` is the most memory that the process has held until then."""

    command: str
    code: int
    seconds: float
    out_nbytes: int
    said: str
    peak: int


def run_all(commands: list[list[str]], seconds: float = CPU_SECONDS) -> list[Done]:
    need_proc()
    command = [sys.executable, "-c", RUN, json.dumps([commands, seconds])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BACKSTOP)
    assert done.returncode == 0, done.stderr
    return [Done(*json.loads(line)) for line in done.stdout.splitlines()]


def commands_for(path: Path, out: Path) -> list[list[str]]:
    image = str(path)
    return [
        ["info", image],
        ["info", "--output=json", "--backing-chain", image],
        ["check", image],
        ["snapshot", "-l", image],
        ["bitmap", image],
        ["map", "-l", "512", image],
        ["map", "--output=json", image],
        ["compare", image, image],
        ["checksum", image],
        ["checksum", "--blkhash", image],
        ["convert", image, str(out)],
        ["convert", "--check", "--verify", "--checksum", image, str(out)],
    ]


@pytest.fixture(scope="module")
def usual_peak(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What all of it takes with a small image that is none of them."""
    folder = tmp_path_factory.mktemp("usual")
    stream = usual_deflate(text(bombs.CLUSTER))
    (folder / "disk.qcow2").write_bytes(build([compressed_entry(bombs.AT, len(stream), 16)] * 64, stream))
    return max(done.peak for done in run_all(commands_for(folder / "disk.qcow2", folder / "out")))


class Bomb(NamedTuple):
    """memory: bytes that it may take beyond what a small image does. latency: seconds of CPU from Ctrl-C to the end. large:
    commands that may have to be interrupted, as more was asked for than they are given here. seconds: how much they are given."""

    make: Callable[[], bytes]
    memory: int = 8 * MIB
    latency: float = LATENCY
    large: tuple[str, ...] = ()
    seconds: float = CPU_SECONDS


READING = ("compare", "checksum", "convert")
EVERYTHING = ("info", "check", "snapshot", "bitmap", "map", *READING)
L1_MEMORY = 3 * 33 * MIB  # of 32 MiB each: the image's, that of what it is compared with, and one that is about to be freed
BOMBS: dict[str, Bomb] = {
    "64 KiB that claim 2^63 bytes": Bomb(lambda: bombs.claims((1 << 63) - 1)),
    "64 KiB that claim one more": Bomb(lambda: bombs.claims(1 << 63)),
    "64 KiB, all tables in the header": Bomb(bombs.all_in_the_header, large=READING),
    "the largest disk": Bomb(bombs.largest, memory=L1_MEMORY, large=READING),
    **{
        f"one for all: {kind}": Bomb(lambda kind=kind: bombs.one_for_all(kind), large=("map", *READING))  # type: ignore[misc]
        for kind in ("compressed and nothing in turn", "the L2 table", "the header")
    },
    "the L1 table is its own L2 table": Bomb(bombs.l1_is_l2, large=("map", *READING)),
    "clusters of 512 bytes": Bomb(bombs.small_clusters, memory=L1_MEMORY, large=("map", *READING)),
    "65,536 snapshots of nothing": Bomb(lambda: bombs.snapshots(None), memory=80 * MIB, large=("info", "snapshot"), seconds=1.5),
    "snapshots with long names": Bomb(bombs.long_names, memory=5 * 64 * MIB, large=EVERYTHING),
    "65,536 snapshots, tables over each other": Bomb(
        bombs.long_snapshot_tables, memory=130 * MIB, large=("info", "snapshot"), seconds=1.5
    ),
    "65,535 bitmaps": Bomb(bombs.bitmap_directory, memory=80 * MIB, large=("info", "bitmap"), seconds=1.5),
    "a bitmap with every other bit": Bomb(bombs.bits_that_take_turns, memory=L1_MEMORY, large=READING),
    "header extensions": Bomb(bombs.extensions, memory=16 * MIB),
    "names of features": Bomb(bombs.feature_names, memory=16 * MIB),
    "slow deflate, 64 KiB": Bomb(lambda: bombs.slow_clusters("deflate", 16), large=READING),
    "slow zstd, 64 KiB": Bomb(lambda: bombs.slow_clusters("zstd", 16), large=READING),
    "slow deflate, 2 MiB": Bomb(lambda: bombs.slow_clusters("deflate", 21), memory=48 * MIB, latency=1.5, large=READING),
    "slow zstd, 2 MiB": Bomb(lambda: bombs.slow_clusters("zstd", 21), memory=48 * MIB, latency=3.5, large=READING),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_every_command_ends(bomb: Bomb, tmp_path: Path, usual_peak: int) -> None:
    """By itself, or soon after Ctrl-C where what was asked for is large; in one line; and without more memory than is stated."""
    path, out = bombs.write_sparse(tmp_path / "disk.qcow2", bomb.make()), tmp_path / "out"
    for done in run_all(commands_for(path, out), bomb.seconds):
        assert done.code in (0, 1, 2, 3) or (done.code == 130 and done.command in bomb.large), done
        assert done.seconds < bomb.seconds + bomb.latency, done
        assert "Traceback" not in done.said, done
        assert done.peak < usual_peak + bomb.memory, (done, usual_peak)
    assert not list(tmp_path.glob(".*.part"))


# What is counted


class Counting(io.BytesIO):
    """A file that counts what is read from it."""

    nbytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.nbytes += len(data)
        return data


@pytest.mark.parametrize("name", [name for name in BOMBS if "claim" not in name and name != "snapshots with long names"])
def test_opening_and_one_sector_read_what_they_need(name: str) -> None:
    """Opening reads the header, the L1 table and the snapshots; a sector, a slice of an L2 table and one cluster."""
    file = Counting(BOMBS[name].make())
    with fastqcow.open(file, threads=2) as image:
        header = image.header
        tables = header.cluster_size + 8 * header.l1_entries + sum(s.nbytes for s in image.snapshots)
        assert file.nbytes <= tables + 1024
        before, fetched, inflated = file.nbytes, image.stats()["bytes_fetched"], image.stats()["clusters_inflated"]
        try:
            image.pread(512, 0)
        except fastqcow.FormatError:
            assert name == "64 KiB, all tables in the header"
        assert file.nbytes - before <= 65_536 + 2 * header.cluster_size
        assert image.stats()["bytes_fetched"] - fetched <= 65_536 + 2 * header.cluster_size
        assert image.stats()["clusters_inflated"] - inflated <= 1


def test_the_largest_table_of_snapshots(tmp_path: Path, usual_peak: int) -> None:
    """An image opens with some three bytes of memory for each byte of it, and lists it with no more than that."""
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bombs.long_names())
    commands = [["map", str(path)], ["convert", str(path), str(tmp_path / "out")], ["snapshot", "-l", "--output=json", str(path)]]
    for done in run_all(commands, seconds=60):
        assert done.code == 0, done
        assert done.peak < usual_peak + 3 * 64 * MIB, done
    assert done.out_nbytes > 6 * 60 * MIB


@pytest.mark.parametrize("name", [name for name in BOMBS if "claim" not in name and "names" not in name])
def test_a_check_reads_no_byte_more_than_thrice(name: str) -> None:
    """However often tables refer to it: the header, snapshots and bitmaps in the first place, then the tables, then refcounts."""
    file = Counting(BOMBS[name].make())
    fastqcow.check(file)
    assert file.nbytes <= 3 * len(file.getvalue()) + 65_536


def test_findings_are_reported_a_thousand_times_at_most() -> None:
    """Also those that are made in Python."""
    reported: list[object] = []
    found = fastqcow.check(io.BytesIO(bombs.snapshots(None)), report=reported.append)
    assert found.corruptions >= bombs.SNAPSHOTS_MAX
    assert len(reported) < 3000
    assert found.not_reported >= bombs.SNAPSHOTS_MAX - 1000


def test_tables_over_each_other_are_counted_as_often_as_they_are(tmp_path: Path, qemu: Qemu) -> None:
    """As many references as qemu-img finds, although each cluster is met once."""
    from images import snapshot_entry

    extra = (0).to_bytes(8, "big") + (512).to_bytes(8, "big")
    tables = [(4096, 900), (4096, 70), (4608, 64), (8192, 1), (11_000 // 512 * 512, 8), (1 << 20, 9), (16_384 - 512, 64)]
    entries = b"".join(
        snapshot_entry(b"%d" % i, b"s%d" % i, l1_off=off, l1_entries=count, extra=extra) for i, (off, count) in enumerate(tables)
    )
    image = patched(build([0], size=512, cluster_bits=9), 60, len(tables).to_bytes(4, "big") + (2560).to_bytes(8, "big"))
    for length in (16_384, 16_384 + 100):
        path = tmp_path / f"{length}.qcow2"
        path.write_bytes((image.ljust(2560, b"\0") + entries).ljust(length, b"\0"))
        theirs = json.loads(qemu.img("check", "-f", "qcow2", "--output=json", path, check=False).stdout)
        ours = json.loads(run("check", path)[1])
        assert ours["corruptions"] == theirs["corruptions"]


# Chains


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bombs.write_chain(tmp_path_factory.mktemp("chain"), 200)


def test_tables_of_a_deep_chain_are_read_once(chain: Path) -> None:
    """They used to push each other out of the cache: 200 tables were read for every cluster, at 60 ms."""
    with fastqcow.open(chain, threads=2) as image:
        before = image.stats()["bytes_fetched"]
        image.pread(512, 0)
        assert image.stats()["bytes_fetched"] - before <= 200 * 65_536 + 2 * 65_536
        before = image.stats()["bytes_fetched"]
        assert len(list(image.map(0, 64 * MIB))) == 1024
        image.pread(16 * MIB, 0)
        assert image.stats()["bytes_fetched"] - before <= 16 * MIB


def test_deep_chains(chain: Path, tmp_path: Path, usual_peak: int) -> None:
    for done in run_all(commands_for(chain, tmp_path / "out"), seconds=1):
        assert done.code in (0, 1, 2) or (done.code == 130 and done.command in ("map", *READING)), done
        assert done.seconds < 1 + LATENCY, done
        assert done.peak < usual_peak + 80 * MIB, done


@pytest.mark.parametrize(("sort", "depth"), [("snapshots_in_each", 4), ("extended_header", 40)])
def test_chains_of_large_headers(tmp_path: Path, usual_peak: int, sort: str, depth: int) -> None:
    """What the files below the first one say is not kept: it could be 200 times what one says."""
    top = bombs.write_chain(tmp_path, depth, **{sort: True})
    for done in run_all([["info", "--backing-chain", str(top)], ["map", "-l", "512", str(top)]], seconds=60):
        assert done.code == 0, done
        assert done.peak < usual_peak + 60 * MIB, done


# Encryption


@pytest.fixture
def locked(qemu: Qemu, tmp_path: Path) -> Path:
    """An image whose password takes as long to try as one may."""
    pytest.importorskip("cryptography")
    path = tmp_path / "disk.qcow2"
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    qemu.img("create", "-f", "qcow2", *secret, path, "1M")
    image = path.read_bytes()
    at = header_off(image)
    path.write_bytes(patched(image, at + SLOTS + 4, u32((1 << 26) - 200_000)))
    (tmp_path / "password").write_text("wrong")
    return path


def test_a_password_that_takes_a_minute_can_be_interrupted(locked: Path) -> None:
    command = ["map", "--password-file", str(locked.parent / "password"), str(locked)]
    (done,) = run_all([command])
    assert done.code == 130
    assert done.seconds < CPU_SECONDS + LATENCY


def test_passwords_of_a_chain_are_bounded_together(locked: Path) -> None:
    """Five of a minute are one too many: what is to come is added up before a password is tried."""
    from fastqcow import luks
    from fastqcow.crypt import open_crypt
    from fastqcow.header import Header
    from fastqcow.source import open_source

    opened = open_source(locked)
    header = Header.read(opened.pread, opened.path)
    with pytest.raises(fastqcow.FormatError, match="of the chain"):
        open_crypt(opened, header, "wrong", luks.CHAIN_HASHINGS_MAX - luks.HASHINGS_MAX // 2)


# Streams


def cost(method: Any, cluster_size: int, nbytes: int) -> float:
    """Seconds of CPU to inflate a stream that is as slow as one can be made."""
    import time

    make = bombs.slow_zstd if method == "zstd" else bombs.slow_deflate
    stream = make(nbytes, cluster_size)
    best = 9.0
    for _ in range(3 if nbytes < MIB else 1):
        started = time.process_time()
        assert fastqcow.inflate(stream, cluster_size, method) == bytes(cluster_size)
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.parametrize(("method", "nanoseconds"), [("zlib", 500), ("zstd", 800)])
@pytest.mark.parametrize("cluster_size", [65_536, 2 << 20])
@pytest.mark.parametrize("factor", [1, 2])
def test_what_a_byte_of_a_stream_can_cost(method: Any, nanoseconds: int, cluster_size: int, factor: int) -> None:
    """Measured 190 ns for deflate, 45 where the stream is longer than a cluster, and 250 for zstd; the bound is thrice that."""
    nbytes = factor * cluster_size - 1024
    assert cost(method, cluster_size, nbytes) < nbytes * nanoseconds * 1e-9


# Serving


@pytest.mark.parametrize("name", ["the largest disk", "one for all: the L2 table", "clusters of 512 bytes", "slow zstd, 2 MiB"])
def test_serving_starts(name: str, tmp_path: Path) -> None:
    serving.need("nbdinfo")
    path = bombs.write_sparse(tmp_path / "disk.qcow2", BOMBS[name].make())
    with fastqcow.open(path) as image:
        size = image.size
    with serving.served(tmp_path, path) as server:
        assert int(serving.run("nbdinfo", "--size", server.uri).stdout) == size


def test_serving_a_deep_chain_starts(chain: Path, tmp_path: Path) -> None:
    serving.need("nbdinfo")
    with serving.served(tmp_path, chain) as server:
        assert int(serving.run("nbdinfo", "--size", server.uri).stdout) == 512 * MIB


def test_every_bit_of_a_bitmap_comes_as_it_is_asked_for(tmp_path: Path, usual_peak: int) -> None:
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bombs.bits_that_take_turns())
    (done,) = run_all([["bitmap", str(path), "b"]])
    assert done.code == 130
    assert done.seconds < CPU_SECONDS + LATENCY
    assert done.out_nbytes > 100_000
    assert done.peak < usual_peak + L1_MEMORY
    with fastqcow.open(path) as image:
        ranges: Iterator[fastqcow.Range] = image.bitmap("b")
        assert next(ranges) == (0, 512)
        assert next(ranges) == (1024, 512)
