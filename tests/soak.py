"""Many threads on few images for as long as is wanted: python tests/soak.py SECONDS [--threads N] [--seed N] [--stuck SECONDS].

Threads read pieces of all sizes, walk, map, open snapshots and close them, convert, and close and reopen what the others read,
through caches that are too small. Every byte is compared. It ends with an error where one is wrong, where a thread gets stuck,
where memory grows, or where a descriptor or a thread is left. On glibc memory is what was allocated and not freed, else what the
process has.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fastqcow
from capabilities import descriptors, resident
from faults import allocated_by_c
from images import mixed

SIZE = 12 << 20
CACHE_SIZE = 1 << 20
PIECES = (1, 512, 4096, 4096, 4096, 65_536, 100_000, 1 << 20, 3 << 20)
STUCK = 240
IN_USE_MAX = 800 << 20  # a third of it is what the disks are to hold; a conversion may take 100 MiB
RSS_MAX = 2400 << 20  # glibc keeps what is freed in up to eight arenas a CPU, each as large as its threads once needed
CONVERSIONS = threading.Semaphore(3)
GROWTH_MAX = 64 << 20


class Remote(io.BytesIO):
    """As the files of fastqcow.integrations.fsspec: several ranges by one call, from any thread."""

    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> list[bytes]:
        data = self.getbuffer()
        return [bytes(data[host_off : host_off + nbytes]) for host_off, nbytes in wanted]


class Disk:
    """What is read: how to open it, what it holds, and its snapshots. `image` is what all threads share until one replaces it."""

    def __init__(self, name: str, opened: Callable[[], fastqcow.Image], contents: bytes, snapshots: dict[str, bytes]) -> None:
        self.name, self.open, self.contents, self.snapshots = name, opened, contents, snapshots
        self.image = opened()

    def replace(self) -> None:
        old, self.image = self.image, self.open()
        old.close()


def qemu(*arguments: str | Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's, which is not for QEMU
    subprocess.run(list(map(str, arguments)), check=True, capture_output=True, env=clean)


def write(image: Path, contents: bytearray, rng: random.Random, count: int) -> None:
    """Patterns at random places, on the image and in what it is to hold."""
    commands = []
    for _ in range(count):
        start, length, byte = rng.randrange(SIZE), rng.choice((512, 5000, 70_000, 300_000)), rng.randrange(256)
        length = min(length, SIZE - start)
        contents[start : start + length] = bytes([byte]) * length
        commands += ["-c", f"write -P {byte} {start} {length}"]
    qemu("qemu-io", "-f", "qcow2", *commands, image)


def make_disks(folder: Path, rng: random.Random) -> list[Disk]:
    def disk(name: str, path: Path, contents: bytes, snapshots: dict[str, bytes] | None = None, threads: int | None = None) -> Disk:
        return Disk(name, lambda: fastqcow.open(path, cache_size=CACHE_SIZE, threads=threads), contents, snapshots or {})

    raw = folder / "first.raw"
    first = bytearray(mixed(SIZE, seed=rng.randrange(1000)))
    raw.write_bytes(first)
    found = []
    for name, options in (
        ("zlib", "compression_type=zlib"),
        ("zstd", "compression_type=zstd,cluster_size=4k"),
        ("large", "compression_type=zlib,cluster_size=2M"),
        ("extended", "compression_type=zstd,extended_l2=on"),
    ):
        path, contents, snapshots = folder / f"{name}.qcow2", bytearray(first), {}
        qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        for moment in ("one", "two", "three"):
            qemu("qemu-img", "snapshot", "-c", moment, path)
            snapshots[moment] = bytes(contents)
            write(path, contents, rng, 6)
        found.append(disk(name, path, bytes(contents), snapshots))
    below, contents = folder / "zlib.qcow2", bytearray(found[0].contents)
    for depth, options in enumerate(("cluster_size=512", "cluster_size=64k,extended_l2=on", "cluster_size=4k")):
        path = folder / f"over-{depth}.qcow2"
        qemu("qemu-img", "create", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b", below.name, path)
        write(path, contents, rng, 12)
        below = path
    found.append(disk("chain", below, bytes(contents)))
    found.append(disk("one thread", below, bytes(contents), threads=1))
    data, zlib = (folder / "zlib.qcow2").read_bytes(), found[0]
    for name, kind in (("file object", io.BytesIO), ("remote", Remote)):
        found.append(
            Disk(name, lambda kind=kind: fastqcow.open(kind(data), cache_size=CACHE_SIZE), zlib.contents, zlib.snapshots)  # type: ignore[misc]
        )
    return found


def expect(found: bytes | memoryview, contents: bytes, start: int, what: str) -> None:
    wanted = memoryview(contents)[start : start + len(found)]
    if found != wanted:
        first = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        raise AssertionError(f"{what}: a wrong byte at {start + first:#x}: {found[first]:#x}, not {wanted[first]:#x}")


def read_a_piece(image: fastqcow.Image, contents: bytes, rng: random.Random, what: str) -> None:
    start, nbytes = rng.randrange(len(contents)), rng.choice(PIECES)
    found = image.pread(nbytes, start)
    assert len(found) == min(nbytes, len(contents) - start), what
    expect(found, contents, start, what)


def read_into_buffers(image: fastqcow.Image, contents: bytes, rng: random.Random, what: str) -> None:
    """With bytes between the buffers that must not change."""
    guard = 64
    sizes = [rng.choice((0, 1, 100, 5000, 70_000)) for _ in range(rng.randrange(1, 7))]
    start = rng.randrange(len(contents) - sum(sizes))
    whole = memoryview(bytearray(b"\xa5") * (sum(sizes) + guard * (len(sizes) + 1)))
    at, places = guard, []
    for size in sizes:
        places.append(at)
        at += size + guard
    assert image.preadv([whole[p : p + n] for p, n in zip(places, sizes, strict=True)], start) == sum(sizes), what
    for place, size in zip(places, sizes, strict=True):
        expect(whole[place : place + size], contents, start, what)
        start += size
        assert whole[place + size : place + size + guard] == b"\xa5" * guard, what


def walk(image: fastqcow.Image, contents: bytes, rng: random.Random, what: str) -> None:
    """In small steps, so that workers inflate ahead."""
    step, at = rng.choice((700, 4096, 20_000)), rng.randrange(len(contents))
    for _ in range(40):
        expect(image.pread(step, at), contents, at, what)
        at += step


def look_at_the_map(image: fastqcow.Image, contents: bytes, rng: random.Random, what: str) -> None:
    start = at = rng.randrange(len(contents))
    nbytes = rng.randrange(1, 2 << 20)
    for extent in image.map(start, nbytes):
        assert extent.start == at, what
        assert extent.length > 0, what
        assert not extent.zero or not any(contents[at : at + extent.length]), what
        at += extent.length
    assert at == min(start + nbytes, len(contents)), what


def visit_a_snapshot(disk: Disk, rng: random.Random) -> None:
    if not disk.snapshots:
        return
    name = rng.choice(list(disk.snapshots))
    with disk.image.snapshot(name) as moment:
        for read in rng.choices((read_a_piece, read_into_buffers, walk, look_at_the_map), k=3):
            read(moment, disk.snapshots[name], rng, f"{disk.name}, snapshot {name}")


def convert(disk: Disk, rng: random.Random, folder: Path) -> None:
    target = folder / f"out-{threading.get_ident()}"
    if rng.randrange(2):
        fastqcow.convert(disk.image, target)
        expect(target.read_bytes(), disk.contents, 0, f"{disk.name}, converted")
    else:
        fastqcow.convert(disk.image, target, format="qcow2", compress=True, compression_level="fast")
        with fastqcow.open(target) as made:
            expect(made.pread(SIZE, 0), disk.contents, 0, f"{disk.name}, converted to qcow2")
    target.unlink()


class Soak:
    def __init__(self, disks: list[Disk], folder: Path, threads: int, seed: int, stuck: float) -> None:
        self.disks, self.folder, self.stuck = disks, folder, stuck
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.rss_max = 0
        self.stop = threading.Event()
        self.seen = [time.monotonic()] * threads
        self.threads = []
        for i in range(threads):
            rng = random.Random(seed * 1000 + i)
            self.threads.append(threading.Thread(target=self.work, args=(i, rng), daemon=True))

    def once(self, rng: random.Random) -> str:
        disk, dice = rng.choice(self.disks), rng.randrange(1000)
        if dice < 10:
            disk.replace()
            return "reopened"
        if dice < 13:
            if not CONVERSIONS.acquire(blocking=False):
                return "too many conversions"
            try:
                convert(disk, rng, self.folder)
            finally:
                CONVERSIONS.release()
            return "converted"
        if dice < 100:
            visit_a_snapshot(disk, rng)
            return "snapshot"
        read = rng.choices((read_a_piece, read_into_buffers, walk, look_at_the_map), (6, 3, 1, 1))[0]
        read(disk.image, disk.contents, rng, disk.name)
        return read.__name__

    def work(self, number: int, rng: random.Random) -> None:
        while not self.stop.is_set():
            self.seen[number] = time.monotonic()
            try:
                what = self.once(rng)
            except BaseException as e:
                if isinstance(e, ValueError) and "closed" in str(e):
                    what = "met a closed image"  # which another thread has replaced meanwhile
                else:
                    self.failures.append(traceback.format_exc())
                    self.stop.set()
                    return
            self.done[what] += 1

    def watch(self, seconds: float) -> list[int]:
        """Until the time is over, or something is wrong: the memory in use at each moment."""
        end, samples, last = time.monotonic() + seconds, [in_use()], time.monotonic()
        for thread in self.threads:
            thread.start()
        while (now := time.monotonic()) < end and not self.stop.wait(0.5):
            if now - last > 30:  # the whole process was stopped
                end += now - last
                self.seen = [seen + now - last for seen in self.seen]
            last = now
            faulthandler.dump_traceback_later(4 * self.stuck, exit=True)  # in case that this thread gets stuck too
            samples.append(in_use())
            self.rss_max = max(self.rss_max, resident())
            if allocated_by_c() > IN_USE_MAX or self.rss_max > RSS_MAX:
                self.failures.append(f"{samples[-1] >> 20} MiB of memory are in use, the process has {self.rss_max >> 20}")
                break
            if now - min(self.seen) > self.stuck:
                faulthandler.dump_traceback(all_threads=True)
                self.failures.append(f"a thread has not come on for {self.stuck:.0f} s")
                break
        self.stop.set()
        for thread in self.threads:
            thread.join(self.stuck if not self.failures else 1)
            if thread.is_alive() and not self.failures:
                faulthandler.dump_traceback(all_threads=True)
                self.failures.append("a thread does not end")
        faulthandler.cancel_dump_traceback_later()
        return samples


def in_use() -> int:
    """Bytes of memory that were allocated and not freed; where that is not to be known, as under TSan, what the process has."""
    return allocated_by_c() or resident()


def growth(samples: list[int]) -> int:
    """Of the last quarter over the second, by their means: the first is for warming up."""
    quarter = len(samples) // 4
    if quarter < 10:
        return 0
    return (sum(samples[3 * quarter : 4 * quarter]) - sum(samples[quarter : 2 * quarter])) // quarter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stuck", type=float, default=STUCK, help="a thread that does not come on for so many seconds is stuck")
    options = parser.parse_args()
    faulthandler.enable()
    sys.setswitchinterval(0.001)
    before = descriptors()
    with tempfile.TemporaryDirectory(prefix="fastqcow-soak-") as folder:
        disks = make_disks(Path(folder), random.Random(options.seed))
        soak = Soak(disks, Path(folder), options.threads, options.seed, options.stuck)
        samples = soak.watch(options.seconds)
        for disk in disks:
            disk.image.close()
        if soak.failures:
            print("\n".join(soak.failures), file=sys.stderr)
            os._exit(1)  # threads that are stuck would be waited for
    left = descriptors() - before
    operations = ", ".join(f"{what} {count}" for what, count in sorted(soak.done.items()))
    memory = f"{max(samples) >> 20} MiB in use at most, growth {growth(samples) >> 20}; {soak.rss_max >> 20} resident at most"
    print(f"soak: {options.threads} threads, {options.seconds:.0f} s, seed {options.seed}")
    print(f"soak: {soak.done.total()} operations, no wrong byte")
    print(f"soak: {operations}")
    print(f"soak: memory {memory}; descriptors left {left}")
    return int(left != 0 or growth(samples) > GROWTH_MAX)


if __name__ == "__main__":
    sys.exit(main())
