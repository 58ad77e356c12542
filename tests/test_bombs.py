"""Images made to cost time or memory: what they can cost is bounded by what their file holds and by what was asked for.

The bounds are those of SECURITY.md, which says what the figures below are. Memory is the most that a process of its own has held.
Time is counted: bytes read, clusters inflated, or seconds of CPU, which hardly depend on what else a machine does. They may be
RESERVE times what is stated, as machines differ. The clock is a backstop.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bombs
import fastqcow
import serving
from capabilities import need_proc
from cases import run
from conftest import Qemu
from faults import UNDER_ASAN, UNDER_TSAN
from images import build, compressed_entry, patched
from luksmaker import SLOTS, header_off, u32

BACKSTOP = 300  # seconds of the clock, on a machine that does much else
CPU_SECONDS = 0.25  # so much an operation is given; then it is interrupted, as by Ctrl-C
MIB = 1 << 20

ZLIB_NS = 190
ZSTD_NS = 250
DIGEST_MS = 1000
INTERRUPT_MS = 100
ENTRY_NBYTES = 1024
ENTRY_TIMES = 5
SANITIZED = UNDER_ASAN or UNDER_TSAN  # which take time, and memory that is not counted then
RESERVE = 30 if SANITIZED else 3

# Runs each command of a list, and says how it ended; Ctrl-C comes after so much CPU. Output is counted, and dropped.
THREADS = 2
RUN = """
import contextlib, io, json, os, resource, signal, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
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
    found = [Done(*json.loads(line)) for line in done.stdout.splitlines()]
    return [done._replace(peak=0) for done in found] if SANITIZED else found


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
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image that is none of them."""
    path = tmp_path_factory.mktemp("usual") / "disk.qcow2"
    path.write_bytes(build([compressed_entry(bombs.AT, len(bombs.STREAM), 16)] * 64, bombs.STREAM))
    return path


@pytest.fixture(scope="module")
def usual_peak(usual: Path) -> int:
    """What all of it takes with that."""
    return max(done.peak for done in run_all(commands_for(usual, usual.with_name("out"))))


def latency(cluster_ns: float = 0) -> float:
    """Seconds of CPU, of all threads together, from Ctrl-C to the end; each has to be done with the cluster that it is at."""
    return RESERVE * THREADS * (INTERRUPT_MS / 1e3 + cluster_ns / 1e9)


def entries_nbytes(count: int, table_nbytes: int) -> int:
    """What snapshots take, or bitmaps where they are listed."""
    return ENTRY_NBYTES * count + ENTRY_TIMES * table_nbytes


class Bomb(NamedTuple):
    """What an image may cost beyond a small one.

    Attributes:
        opened, copies: bytes to open it and to list what it has; how many of these there may be where it is compared with itself.
        reading: bytes to read it.
        interrupted: seconds of CPU from Ctrl-C to the end.
        large: commands that may have to be interrupted, as more was asked for than they are given here.
        seconds: how much they are given.
    """

    make: Callable[[], bytes]
    opened: int = 0
    copies: int = 1
    reading: int = 8 * MIB
    interrupted: float = latency()
    large: tuple[str, ...] = ()
    seconds: float = CPU_SECONDS

    @property
    def memory(self) -> int:
        return self.copies * self.opened + self.reading


READING = ("compare", "checksum", "convert")
EVERYTHING = ("info", "check", "snapshot", "bitmap", "map", *READING)
L1 = {"opened": 32 * MIB, "copies": 3}  # the image's, that of what it is compared with, and one that is about to be freed


def slow(codec: str, cluster_bits: int) -> Bomb:
    cost = ZLIB_NS << cluster_bits if codec == "deflate" else 2 * ZSTD_NS << cluster_bits
    batches = 2 * THREADS * 2 * (3 << cluster_bits)  # of two images: a cluster each, and what it is inflated from
    make = partial(bombs.slow_clusters, codec, cluster_bits)
    return Bomb(make, reading=8 * MIB + batches, interrupted=latency(cost), large=READING)


BOMBS: dict[str, Bomb] = {
    "64 KiB that claim 2^63 bytes": Bomb(lambda: bombs.claims((1 << 63) - 1)),
    "64 KiB that claim one more": Bomb(lambda: bombs.claims(1 << 63)),
    "64 KiB, all tables in the header": Bomb(bombs.all_in_the_header, large=READING),
    "the largest disk": Bomb(bombs.largest, **L1, large=READING),
    **{f"one for all: {kind}": Bomb(partial(bombs.one_for_all, kind), large=("map", *READING)) for kind in bombs.ONE_FOR_ALL},
    "the L1 table is its own L2 table": Bomb(bombs.l1_is_l2, large=("map", *READING)),
    "clusters of 512 bytes": Bomb(bombs.small_clusters, **L1, large=("map", *READING)),
    "65,536 snapshots of nothing": Bomb(
        lambda: bombs.snapshots(None), opened=entries_nbytes(65_536, 40 * 65_536), large=("info", "snapshot"), seconds=1.5
    ),
    "snapshots with long names": Bomb(bombs.long_names, opened=entries_nbytes(65_536, 64 * MIB), large=EVERYTHING),
    "65,536 snapshots, tables over each other": Bomb(
        bombs.long_snapshot_tables, opened=entries_nbytes(65_536, 64 * 65_536), large=("info", "snapshot"), seconds=1.5
    ),
    "65,535 bitmaps": Bomb(
        bombs.bitmap_directory, opened=entries_nbytes(65_535, 32 * 65_535), large=("info", "bitmap"), seconds=1.5
    ),
    "a bitmap with every other bit": Bomb(bombs.bits_that_take_turns, **L1, large=READING),
    "header extensions": Bomb(bombs.extensions, opened=16 * MIB),
    "names of features": Bomb(bombs.feature_names, opened=16 * MIB),
    "slow deflate, 64 KiB": slow("deflate", 16),
    "slow zstd, 64 KiB": slow("zstd", 16),
    "slow deflate, 2 MiB": slow("deflate", 21),
    "slow zstd, 2 MiB": slow("zstd", 21),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_every_command_ends(bomb: Bomb, tmp_path: Path, usual_peak: int) -> None:
    """By itself, or soon after Ctrl-C where what was asked for is large; in one line; and without more memory than is stated."""
    path, out = bombs.write_sparse(tmp_path / "disk.qcow2", bomb.make()), tmp_path / "out"
    given = bomb.seconds * (4 if SANITIZED else 1)
    for done in run_all(commands_for(path, out), given):
        assert done.code in (0, 1, 2, 3) or (done.code == 130 and done.command in bomb.large), done
        assert done.seconds < given + bomb.interrupted, done
        assert "Traceback" not in done.said, done
        assert done.peak < usual_peak + bomb.memory, (done, usual_peak)
    assert not list(tmp_path.glob(".*.part"))


ENTRIES: dict[str, Bomb] = {
    **{
        f"snapshots with names of {nbytes} bytes": Bomb(
            partial(bombs.costly_snapshots, nbytes),
            opened=entries_nbytes(65_536, 65_536 * (72 + 2 * nbytes)),
        )
        for nbytes in (4, 440)
    },
    **{
        f"bitmaps with names of {nbytes} bytes": Bomb(
            partial(bombs.bitmap_directory, "\N{COW}".encode().ljust(nbytes - 8, b"a")),
            opened=entries_nbytes(65_535, 65_535 * (24 + nbytes)),
        )
        for nbytes in (16, 1000)
    },
}


OPENED = [
    "the largest disk",
    "65,536 snapshots, tables over each other",
    "65,535 bitmaps",
    "header extensions",
    "names of features",
]


@pytest.mark.parametrize("name", [*OPENED, *ENTRIES])
def test_what_opening_takes(name: str, tmp_path: Path, usual: Path) -> None:
    """And to list all that there is: beyond what a small image takes, and what is read to find where something lies."""
    bomb = (BOMBS | ENTRIES)[name]
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bomb.make())
    small, *large = run_all([["bitmap", str(usual)], ["bitmap", str(path)], ["snapshot", str(path)]], seconds=60)
    assert [done.code for done in large] == [0, 0]
    assert max(done.peak for done in large) - small.peak < bomb.opened + MIB


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


@pytest.mark.parametrize(
    "name", [name for name in BOMBS if name.startswith(("one for all", "the L1", "clusters of", "slow zstd, 64"))]
)
def test_a_stretch_costs_in_proportion_to_its_length(name: str) -> None:
    """A cluster of it is fetched and inflated once, and nothing beside it."""
    with fastqcow.open(io.BytesIO(BOMBS[name].make()), threads=THREADS, cache_size=0) as image:
        size = image.header.cluster_size
        for clusters in (8, 4, 1):
            at, nbytes = image.size // 2, clusters * size
            tables = 2 * 65_536
            before = image.stats()
            assert len(image.pread(nbytes, at)) == nbytes
            after = image.stats()
            assert after["clusters_inflated"] - before["clusters_inflated"] <= clusters
            assert after["bytes_fetched"] - before["bytes_fetched"] <= 2 * nbytes + tables
            assert len(list(image.map(at, nbytes))) <= clusters
            assert image.stats()["bytes_fetched"] - after["bytes_fetched"] <= tables


def test_zeroes_take_time_to_digest(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([0], size=256 * MIB, l1=[0]))
    (done,) = run_all([["checksum", str(path)]], seconds=60)
    assert done.code == 0
    assert done.seconds < RESERVE * DIGEST_MS / 1e3 / 4


def test_what_a_check_takes_for_what_is_used(tmp_path: Path, usual: Path) -> None:
    """5 KiB for each page of counters, of which each of these clusters needs one."""
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bombs.pages_of_counters(), nbytes=512 << 30)
    small, large = run_all([["check", str(usual)], ["check", str(path)]], seconds=60)
    assert large.code == 2
    assert large.peak - small.peak < 5 * 1024 * bombs.ENTRIES + 4 * MIB


def test_the_largest_table_of_snapshots(tmp_path: Path, usual_peak: int) -> None:
    """An image opens with it, and lists it with no more memory than that takes."""
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bombs.long_names())
    commands = [["map", str(path)], ["convert", str(path), str(tmp_path / "out")], ["snapshot", "-l", "--output=json", str(path)]]
    for done in run_all(commands, seconds=60):
        assert done.code == 0, done
        assert done.peak < usual_peak + BOMBS["snapshots with long names"].opened, done
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
        assert done.seconds < 1 + latency(), done
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
    assert done.seconds < CPU_SECONDS + latency()


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


@pytest.mark.parametrize(("method", "nanoseconds"), [("zlib", ZLIB_NS), ("zstd", ZSTD_NS)])
@pytest.mark.parametrize("cluster_size", [65_536, 2 << 20])
@pytest.mark.parametrize("factor", [1, 2])
def test_what_a_byte_of_a_stream_can_cost(method: Any, nanoseconds: int, cluster_size: int, factor: int) -> None:
    """Less for deflate where the stream is longer than a cluster."""
    nbytes = factor * cluster_size - 1024
    assert cost(method, cluster_size, nbytes) < RESERVE * nbytes * nanoseconds * 1e-9


# Serving


class Serving(NamedTuple):
    """A process that serves: what it had taken when the first client was gone."""

    seconds: float
    peak: int


def serve(folder: Path, path: Path) -> Serving:
    with fastqcow.open(path) as image:
        size = image.size
    with serving.served(folder, path) as server:
        assert int(serving.run("nbdinfo", "--size", server.uri).stdout) == size
        of = Path("/proc", str(server.process.pid))
        ticks = of.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        peak = next(int(line.split()[1]) << 10 for line in of.joinpath("status").read_text().splitlines() if "VmHWM" in line)
        return Serving(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), peak)


@pytest.fixture(scope="module")
def usual_serving(tmp_path_factory: pytest.TempPathFactory, usual: Path) -> Serving:
    serving.need("nbdinfo")
    return serve(tmp_path_factory.mktemp("serving"), usual)


SERVED = [
    "the largest disk",
    "one for all: the L2 table",
    "clusters of 512 bytes",
    "65,536 snapshots of nothing",
    "slow zstd, 2 MiB",
]


@pytest.mark.parametrize("name", SERVED)
def test_serving_starts(name: str, tmp_path: Path, usual_serving: Serving) -> None:
    """With the memory that opening takes, and hardly more time than an image of which nothing is large."""
    done = serve(tmp_path, bombs.write_sparse(tmp_path / "disk.qcow2", BOMBS[name].make()))
    print(done, usual_serving, BOMBS[name].opened >> 20)
    assert done.peak - usual_serving.peak < BOMBS[name].opened + 2 * MIB
    assert done.seconds < RESERVE * (usual_serving.seconds + 0.5)


def test_serving_a_deep_chain_starts(chain: Path, tmp_path: Path, usual_serving: Serving) -> None:
    done = serve(tmp_path, chain)
    assert done.seconds < RESERVE * (usual_serving.seconds + 0.5)


def test_every_bit_of_a_bitmap_comes_as_it_is_asked_for(tmp_path: Path, usual_peak: int) -> None:
    path = bombs.write_sparse(tmp_path / "disk.qcow2", bombs.bits_that_take_turns())
    (done,) = run_all([["bitmap", str(path), "b"]])
    assert done.code == 130
    assert done.seconds < CPU_SECONDS + latency()
    assert done.out_nbytes > 100_000
    assert done.peak < usual_peak + BOMBS["a bitmap with every other bit"].memory
    with fastqcow.open(path) as image:
        ranges: Iterator[fastqcow.Range] = image.bitmap("b")
        assert next(ranges) == (0, 512)
        assert next(ranges) == (1024, 512)
