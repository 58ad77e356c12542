"""What fails below fastqcow, or is done to it from outside: each has one outcome, which docs/faults.md states.

What fails in the core alone (memory, threads, reads and writes at every place) is in c/test_faults_reading.c and
c/test_faults_writing.c.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastqcow
import faults
from capabilities import descriptors, need_glibc, need_proc
from faults import UNDER_ASAN, UNDER_TSAN
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, noise, plain_and_compressed, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
IMAGE, CONTENTS = plain_and_compressed(40)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


# A file that changes


@pytest.mark.parametrize("cut", [0, 10, 3 * CLUSTER + 5, AT - 1, AT + 30_000, AT + CLUSTER, len(IMAGE) // 2, len(IMAGE) - 513])
def test_a_file_that_shrinks(path: Path, cut: int) -> None:
    """What was read before stays right; what is gone is an error, and never zeroes, nor a signal."""
    whole = tuple(fastqcow.open(path).map())
    with fastqcow.open(path, threads=3) as image, fastqcow.open(path, cache_size=0) as fresh:
        assert image.pread(100, 5 * CLUSTER) == CONTENTS[5 * CLUSTER : 5 * CLUSTER + 100]
        os.truncate(path, cut)
        lost = 0
        for opened in (image, fresh):
            for start in range(0, len(CONTENTS), 40_000):
                try:
                    assert opened.pread(40_000, start) == CONTENTS[start : start + 40_000]
                except fastqcow.FormatError:
                    lost += 1
            with pytest.raises(fastqcow.FormatError):
                opened.read()
        assert lost
        with pytest.raises(fastqcow.FormatError):
            fastqcow.convert(image, path.with_name("out"))
        assert not path.with_name("out").exists()
    os.truncate(path, len(IMAGE))
    assert whole


def test_a_file_that_shrinks_while_it_is_checked(path: Path) -> None:
    """Its tables are gone, which is an error, not leaks."""
    file = io.BytesIO(IMAGE)

    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            at = self.tell()
            return b"" if at >= 3 * CLUSTER else super().read(size)  # the L2 table

    assert fastqcow.check(file).corruptions  # there are no refcounts
    with pytest.raises(fastqcow.FormatError, match="ended before"):
        fastqcow.check(Shrinking(IMAGE))


def test_a_file_that_grows(path: Path) -> None:
    raw = path.with_name("disk.raw")
    raw.write_bytes(CONTENTS)
    with fastqcow.open(path) as image, fastqcow.open_raw(raw) as plain:
        for grown in (path, raw):
            with grown.open("ab") as file:
                file.write(noise(300_000))
        assert image.read() == CONTENTS
        assert plain.read() == CONTENTS
        assert plain.size == len(CONTENTS)


# Sources of Python that do not do what they should


class Rogue(io.BytesIO):
    """Answers of its methods, by their names, in place of the right ones: from the second opening phase on, when `on` is set."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        super().__init__(IMAGE)
        self.answers = answers

    def seek(self, offset: int, whence: int = 0, /) -> Any:
        right = super().seek(offset, whence)
        return self.answers["seek"](right) if "seek" in self.answers and whence == os.SEEK_END else right

    def read(self, size: int | None = -1, /) -> Any:
        return self.answers["read"](super().read(size)) if "read" in self.answers else super().read(size)


class RogueRemote(Rogue):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> Any:
        answers = [IMAGE[host_off : host_off + nbytes] for host_off, nbytes in wanted]
        return self.answers["read_ranges"](answers) if "read_ranges" in self.answers else answers


class CableError(Exception):
    pass


def fail(right: object) -> object:
    raise CableError("the cable is out")


ROGUES: dict[str, tuple[type[Rogue], dict[str, Callable[[Any], Any]], type[Exception]]] = {
    "seek raises": (Rogue, {"seek": fail}, CableError),
    "seek returns None": (Rogue, {"seek": lambda right: None}, TypeError),
    "seek returns text": (Rogue, {"seek": lambda right: "much"}, TypeError),
    "seek returns a negative number": (Rogue, {"seek": lambda right: -1}, OverflowError),
    "seek returns 2^70": (Rogue, {"seek": lambda right: 1 << 70}, OverflowError),
    "read raises": (Rogue, {"read": fail}, CableError),
    "read returns too much": (Rogue, {"read": lambda right: right + b"x"}, ValueError),
    "read returns nothing": (Rogue, {"read": lambda right: b""}, fastqcow.FormatError),
    "read returns None": (Rogue, {"read": lambda right: None}, TypeError),
    "read returns a bytearray": (Rogue, {"read": bytearray}, TypeError),
    "read_ranges raises": (RogueRemote, {"read_ranges": fail}, CableError),
    "read_ranges returns too much": (RogueRemote, {"read_ranges": lambda right: [*right[:-1], right[-1] + b"x"]}, ValueError),
    "read_ranges returns too little": (RogueRemote, {"read_ranges": lambda right: [*right[:-1], b""]}, fastqcow.FormatError),
    "read_ranges returns too many": (RogueRemote, {"read_ranges": lambda right: [*right, b""]}, ValueError),
    "read_ranges returns too few": (RogueRemote, {"read_ranges": lambda right: right[1:]}, ValueError),
    "read_ranges returns None": (RogueRemote, {"read_ranges": lambda right: None}, TypeError),
    "read_ranges returns text": (RogueRemote, {"read_ranges": lambda right: ["x"] * len(right)}, TypeError),
}


@pytest.mark.parametrize("name", ROGUES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_source_of_python_that_misbehaves(name: str, threads: int, tmp_path: Path) -> None:
    """What it raises, or a TypeError or ValueError that names its method; afterwards the image reads on."""
    kind, answers, error = ROGUES[name]
    with pytest.raises(error):
        fastqcow.open(kind(**answers))
    if "seek" in answers:
        return
    file = kind()
    with fastqcow.open(file, threads=threads, cache_size=0) as image:
        file.answers = answers
        for read in (lambda: image.pread(100, 0), image.readall, lambda: fastqcow.convert(image, tmp_path / "out")):
            image.seek(0)
            with pytest.raises(error):
                read()
        assert os.listdir(tmp_path) == []
        file.answers = {}
        assert image.pread(len(CONTENTS), 0) == CONTENTS


# Limits of the process


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_no_descriptor_is_left_to_be_had(path: Path, tmp_path: Path) -> None:
    """A chain that needs more than there are: the system's error, and what was opened is closed."""
    below = path.name
    for i in range(30):
        over = tmp_path / f"over-{i}.qcow2"
        over.write_bytes(build([0] * 40, backing=(below, "qcow2")))
        below = over.name
    before = descriptors()
    with limited(resource.RLIMIT_NOFILE, before + 20), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        fastqcow.open(over)
    assert descriptors() == before
    with fastqcow.open(over) as image:
        with limited(resource.RLIMIT_NOFILE, 3):
            assert image.read() == CONTENTS  # which needs none
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                fastqcow.convert(image, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(UNDER_ASAN or UNDER_TSAN, reason="a sanitizer needs all addresses that there are")
def test_no_memory_is_left_to_be_had(path: Path, tmp_path: Path) -> None:
    """By RLIMIT_AS, in a process of its own: MemoryError, and the right bytes when there is memory again."""
    need_proc()
    script = f"""
import os, resource, sys
import fastqcow
expected = fastqcow.open({str(path)!r}).read()
fastqcow.convert({str(path)!r}, {str(tmp_path / "out")!r}, format="qcow2", compress=True)  # imports what it needs
refused = 0
for room in range(0, 40 << 20, 1 << 19):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + room, -1))
    try:
        image = fastqcow.open({str(path)!r}, threads=3)
        assert image.pread(len(expected), 0) == expected
        fastqcow.convert(image, {str(tmp_path / "out")!r}, format="qcow2", compress=True)
    except MemoryError:
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert image.pread(len(expected), 0) == expected
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


def test_no_allocation_of_python_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("_testcapi")
    script = """
import _testcapi

def add(numbers):
    return sum(8 * n for n in numbers)

add([1, 2])
for nth in range(40):
    _testcapi.set_nomemory(nth, nth + 1)
    try:
        add([1, 2])
    except MemoryError:
        pass
    finally:
        _testcapi.remove_mem_hooks()
"""
    if subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode < 0:
        pytest.skip("this Python crashes itself where it has no memory to make a function; 3.12.1 and 3.13.0 do")
    injected = faults.told(faults.run("memory.py", tmp_path, folder=tmp_path, preload=False))
    left = injected.pop("files left")
    refused = sum(count for what, count in injected.items() if what.endswith("MemoryError"))
    assert refused > 2000
    assert injected.total() - refused < refused / 20
    assert left < 50


# Calls that fail


def test_every_call_of_a_conversion_fails(tmp_path: Path) -> None:
    """ENOSPC, EIO, EDQUOT, EINTR and short counts of reading, writing, allocating, storing, closing, renaming, at every place."""
    folder = tmp_path / "files"
    folder.mkdir()
    assert faults.told(faults.run("converting.py", folder, folder=tmp_path)).total() > 1000


def test_no_thread_can_be_started(tmp_path: Path) -> None:
    """The calling thread does all of it."""
    if UNDER_ASAN or UNDER_TSAN:
        pytest.skip("a sanitizer has a part in the starting of threads")
    assert faults.run("threadless.py", folder=tmp_path).startswith("refused")


def system(*command: str | Path) -> None:
    """Run what needs rights and devices that are not everywhere."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    if os.getuid() != 0 or not shutil.which(command[0], path=path):
        pytest.skip(f"{command[0]} is not to be had, or not by this user")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ, PATH=path))
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr}")


@contextlib.contextmanager
def small_file_system(tmp_path: Path, kind: str) -> Iterator[Path]:
    """Of 700 KiB in memory, or of some 900 KiB in a file."""
    folder, disk = tmp_path / "small", tmp_path / "disk.ext4"
    folder.mkdir()
    if kind == "ext4":
        disk.write_bytes(bytes(2 << 20))
        system("mkfs.ext4", "-q", "-F", disk)
        system("mount", "-t", "ext4", "-o", "loop", disk, folder)
    else:
        system("mount", "-t", "tmpfs", "-o", f"size={700 << 10}", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize(
    "options",
    [{}, {"format": "qcow2"}, {"format": "qcow2", "compress": True}, {"preallocation": "falloc"}],
    ids=["raw", "qcow2", "compressed", "allocated"],
)
def test_a_file_system_that_is_full(path: Path, tmp_path: Path, options: Any, kind: str) -> None:
    """The error has the target's name; the old target stays, and its file system gets back what was written."""
    with small_file_system(tmp_path, kind) as folder:
        out = folder / "out"
        out.write_bytes(b"precious")
        free = os.statvfs(folder).f_bavail
        with pytest.raises(OSError, match="No space left") as caught:
            fastqcow.convert(path, out, **options)
        assert caught.value.filename == str(out)
        assert [(p.name, p.read_bytes()) for p in folder.iterdir() if p.is_file()] == [("out", b"precious")]
        assert os.statvfs(folder).f_bavail == free


@pytest.mark.parametrize("options", ["-O raw", "-O qcow2", "-c -O qcow2"])
def test_killed_at_any_moment(tmp_path: Path, options: str) -> None:
    """The target's name holds what it held, or all of the new one; and a second try is not disturbed by what the first left."""
    stream = deflate(text(CLUSTER))
    entries = [compressed_entry(AT, len(stream), 16), data_entry(AT + CLUSTER)] * 700
    path, out = tmp_path / "disk.qcow2", tmp_path / "out" / "disk"
    path.write_bytes(build(entries, stream.ljust(CLUSTER, b"\0") + noise(CLUSTER)))
    out.parent.mkdir()
    command = [sys.executable, "-m", "fastqcow", "convert", *options.split(), str(path), str(out)]
    started = time.monotonic()
    subprocess.run(command, check=True)
    whole, takes = out.read_bytes(), time.monotonic() - started
    rng, killed = random.Random(options), 0
    for i in range(12):
        out.write_bytes(b"precious")
        with subprocess.Popen(command) as process:
            time.sleep(takes * rng.random() if i else takes * 0.9)
            process.kill()
        assert out.read_bytes() in (b"precious", whole)
        killed += process.returncode == -signal.SIGKILL
    assert killed
    out.unlink()
    subprocess.run(command, check=True)
    assert out.read_bytes() == whole


# Signals, the end of the process


def test_signals_while_reading_and_writing(path: Path, tmp_path: Path) -> None:
    """A handler that returns disturbs nothing: calls that were interrupted go on, also of a pipe."""
    came = 0

    def handler(number: int, frame: object) -> None:
        nonlocal came
        came += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(10):
            with fastqcow.open(path, cache_size=0) as image:
                assert image.read() == CONTENTS
                fastqcow.convert(image, tmp_path / "out.raw")
                fastqcow.convert(image, tmp_path / "out.qcow2", format="qcow2", compress=True)
        read_end, write_end = os.pipe()

        def fill_the_pipe() -> None:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(CONTENTS[:CLUSTER])
                pipe.flush()
                time.sleep(0.1)

        writer = threading.Thread(target=fill_the_pipe)
        writer.start()
        with os.fdopen(read_end, "rb") as pipe:
            fastqcow.convert(fastqcow.RawStream(pipe), tmp_path / "pipe.qcow2", format="qcow2")
        writer.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came > 10
    assert (tmp_path / "out.raw").read_bytes() == CONTENTS
    with fastqcow.open(tmp_path / "out.qcow2") as image, fastqcow.open(tmp_path / "pipe.qcow2") as piped:
        assert image.read() == CONTENTS
        assert piped.read() == CONTENTS[:CLUSTER]


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[fastqcow.Image]:
    """64 GiB, and each cluster the same one: a read of it takes a minute of work."""
    stream = deflate(text(CLUSTER))
    path = tmp_path / "large.qcow2"
    entries, l1 = [compressed_entry(AT, len(stream), 16)] * 8192, [1 << 63 | 3 * CLUSTER] * 128
    path.write_bytes(build(entries, stream.ljust(4096), size=64 << 30, l1=l1))
    with fastqcow.open(path, threads=2) as image:
        yield image


@contextlib.contextmanager
def signal_after(seconds: float, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Seconds of work, not those by the clock: other processes may be at work too."""
    before = signal.signal(signal.SIGPROF, handler)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def test_a_signal_handler_that_raises(endless: fastqcow.Image) -> None:
    """In the middle of a long read: what it raises comes out within a tenth of a second of work; five times that is allowed."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("enough")

    buffer = bytearray(16 << 20)
    started = time.process_time()
    with signal_after(0.06, give_up), pytest.raises(TimeoutError):
        endless.preadv([buffer] * 4096, 0)
    assert time.process_time() - started < 0.06 + 0.5
    assert endless.pread(1000, 5) == text(CLUSTER)[5:1005]


def test_a_signal_handler_that_reads(endless: fastqcow.Image) -> None:
    """From the image that is being read: both get the right bytes."""
    buffer, found = bytearray(16 << 20), []

    def read(number: int, frame: object) -> None:
        found.append(endless.pread(1000, 5))

    with signal_after(0.06, read):
        while not found:
            assert endless.preadv([buffer] * 16, 0) == 16 * len(buffer)
            assert buffer[-CLUSTER:] == text(CLUSTER)
    assert found == [text(CLUSTER)[5:1005]]


@pytest.mark.parametrize("kind", ["path", "file", "remote", "digest", "check", "cipher"])
def test_the_interpreter_ends_while_daemon_threads_work(tmp_path: Path, kind: str) -> None:
    """They end with it, wherever they are, in callbacks too. What C does at its exit is held up, so that they meet what is gone."""
    need_glibc()
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(faults.HERE.parent), os.environ.get("PYTHONPATH", "")]))
    environment["ASAN_OPTIONS"] = f"{os.environ.get('ASAN_OPTIONS', '')}:detect_leaks=0"  # what those threads had is lost with them
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, str(faults.HERE / "ending.py"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"end\n"
            time.sleep(0.5)
            _, said = process.communicate(b"\n", timeout=60)
        assert (process.returncode, said) == (0, b"")
