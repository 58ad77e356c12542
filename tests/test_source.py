"""What can be opened: paths and file objects of all kinds."""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import descriptors
from conftest import Qemu
from fastqcow import _reader
from fastqcow.cli import main
from faults import UNDER_ASAN
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, extension, noise, patched, text

CLUSTER = 65536
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
STREAM = deflate(TEXT).ljust(CLUSTER, b"\0")
AT = PAYLOAD * CLUSTER
IMAGE = build([compressed_entry(AT, len(deflate(TEXT)), 16), 0, data_entry(AT + CLUSTER)], STREAM + PLAIN)
CONTENTS = TEXT + bytes(CLUSTER) + PLAIN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths(path: Path, kind: Any) -> None:
    with fastqcow.open(kind(path)) as image:
        assert image.read() == CONTENTS
        assert image.name == str(path)


@pytest.mark.parametrize("buffering", [-1, 0])
def test_open_file_is_read_by_its_descriptor_and_left_alone(path: Path, buffering: int) -> None:
    with path.open("rb", buffering=buffering) as file:
        file.seek(100)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS
            assert image.name == str(path)
        assert file.tell() == 100
        assert not file.closed


def test_image_outlives_the_file_it_was_opened_from(path: Path) -> None:
    file = path.open("rb")
    image = fastqcow.open(file)
    file.close()
    with path.open("rb"):  # takes the number of the descriptor that was closed
        assert image.read() == CONTENTS
    image.close()


def test_unflushed_writes_are_seen(tmp_path: Path) -> None:
    with (tmp_path / "new").open("w+b") as file:
        file.write(IMAGE)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS


def test_gzip_is_read_by_its_methods(path: Path) -> None:
    """A GzipFile has a fileno(), of the compressed bytes."""
    packed = path.with_suffix(".gz")
    with gzip.open(packed, "wb") as file:
        file.write(IMAGE)
    with gzip.open(packed) as file, fastqcow.open(file) as image:
        assert image.read() == CONTENTS
        assert image.name == str(packed)
    with gzip.open(packed) as file, fastqcow.open(io.BufferedReader(file)) as image:
        assert image.pread(CLUSTER, 2 * CLUSTER) == PLAIN


def test_other_files() -> None:
    with fastqcow.open(io.BytesIO(IMAGE)) as image:
        assert image.name == "<BytesIO>"
        assert image.read() == CONTENTS
    with tempfile.TemporaryFile() as file:
        file.write(IMAGE)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(IMAGE)
        with fastqcow.open(spooled) as image:
            assert image.read() == CONTENTS


def test_image_in_an_image() -> None:
    outer = build([data_entry((PAYLOAD + i) * CLUSTER) for i in range(len(IMAGE) // CLUSTER)], IMAGE)
    with fastqcow.open(io.BytesIO(outer)) as disk, fastqcow.open(disk) as inner:
        assert inner.read() == CONTENTS


class Odd(io.BytesIO):
    """A file whose reads go wrong from a certain place on."""

    def __init__(self, answer: Any, after: int = AT) -> None:
        super().__init__(IMAGE)
        self.answer, self.after = answer, after

    def read(self, size: int | None = -1, /) -> Any:
        if self.tell() < self.after:
            return super().read(size)
        return self.answer(super().read(size))


def test_short_reads_are_carried_on() -> None:
    with fastqcow.open(Odd(lambda data: data[:1000], after=0)) as image:
        assert image.read() == CONTENTS


class BrokenError(RuntimeError):
    pass


def fail(data: bytes) -> bytes:
    raise BrokenError("the cable is out")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (fail, BrokenError),
        (lambda data: data + b"x", ValueError),
        (lambda data: None, TypeError),
        (lambda data: bytearray(data), TypeError),
        (lambda data: "text", TypeError),
    ],
    ids=["raises", "too much", "None", "bytearray", "str"],
)
@pytest.mark.parametrize("nbytes", [3 * CLUSTER, 100], ids=["whole", "part"])
def test_what_a_file_raises_comes_out(answer: Any, error: type[Exception], nbytes: int) -> None:
    with fastqcow.open(Odd(answer)) as image:
        for _ in range(3):
            with pytest.raises(error):
                image.pread(nbytes, 0)
        assert image.pread(CLUSTER, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("nth", range(12))
def test_no_exception_of_a_file_is_lost(nth: int, threads: int) -> None:
    """A read that fails once, and would succeed if it were tried again: Ctrl-C, for one."""
    stream = deflate(TEXT)
    image = build([compressed_entry(AT, len(stream), 16)] * 8, stream.ljust(CLUSTER))

    class FailsOnce(io.BytesIO):
        reads = -1000

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            if self.reads == nth:
                raise KeyboardInterrupt
            return super().read(size)

    file = FailsOnce(image)
    with fastqcow.open(file, threads=threads) as disk:
        file.reads = -1
        try:
            disk.pread(8 * CLUSTER, 0)
        except KeyboardInterrupt:
            assert file.reads >= nth
        else:
            assert file.reads < nth


@pytest.mark.parametrize("clusters", [0, 1, 2])
def test_file_object_that_loses_its_end(clusters: int) -> None:
    """How long it is was asked at the start; what is missing since then is no zero."""
    file = io.BytesIO(build([data_entry(AT + i * CLUSTER) for i in range(3)], PLAIN * 3))
    with fastqcow.open(file) as image:
        assert image.pread(10, 0) == PLAIN[:10]
        file.truncate(AT + clusters * CLUSTER + 5000)
        assert image.pread(clusters * CLUSTER + 5000, 0) == (PLAIN * 3)[: clusters * CLUSTER + 5000]
        for nbytes in (3 * CLUSTER, clusters * CLUSTER + 5001):
            with pytest.raises(fastqcow.FormatError):
                image.pread(nbytes, 0)


def test_two_images_on_one_file_object() -> None:
    """They share its position, and so its lock."""

    class Yielding(io.BytesIO):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            done = super().seek(offset, whence)
            time.sleep(0.0005)
            return done

    file = Yielding(IMAGE)
    with fastqcow.open(file) as one, fastqcow.open(file) as other, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: (one if i % 2 else other).pread(2000, 2 * CLUSTER + i), range(100)))
    assert found == [CONTENTS[2 * CLUSTER + i : 2 * CLUSTER + i + 2000] for i in range(100)]


class Nested(io.BytesIO):
    """Calls a function in the middle of its reads, as a signal handler or a finalizer would."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.within: Callable[[], object] = int

    def read(self, size: int | None = -1, /) -> bytes:
        within, self.within = self.within, int
        within()
        return super().read(size)


class NestedRemote(Nested):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> list[bytes]:
        return [(self.seek(host_off), self.read(nbytes))[1] for host_off, nbytes in wanted]


def fails(read: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="reentrant read"):
        read()


@pytest.mark.parametrize("cache_size", [0, 1 << 20])
@pytest.mark.parametrize("kind", [Nested, NestedRemote])
def test_a_read_within_a_read_of_the_same_file_is_an_error(kind: type[Nested], cache_size: int) -> None:
    """It would wait for the cluster, or the lock, that its own thread has in hand."""
    reads: tuple[Callable[[fastqcow.Image, Nested], object], ...] = (
        lambda image, file: image.pread(100, 5),
        lambda image, file: list(image.map()),
        lambda image, file: fastqcow.open(file).close(),
        lambda image, file: fastqcow.check(file),
    )
    for read in reads:
        file = kind(IMAGE)
        with fastqcow.open(file, cache_size=cache_size, threads=1) as image:
            file.within = partial(read, image, file)
            with pytest.raises(RuntimeError, match="reentrant read"):
                image.pread(100, 5)
            file.within = partial(fails, partial(read, image, file))
            assert image.pread(100, 5) == TEXT[5:105]  # nothing has moved the file
            assert image.read() == CONTENTS


@pytest.mark.parametrize("kind", [Nested, NestedRemote])
def test_a_read_within_a_read_of_another_file(kind: type[Nested]) -> None:
    file = kind(IMAGE)
    with (
        fastqcow.open(file, threads=1) as image,
        fastqcow.open(file, threads=1) as sibling,
        fastqcow.open(kind(IMAGE), threads=1) as other,
    ):
        file.within = partial(fails, lambda: sibling.pread(100, 5))
        assert image.pread(100, 5) == TEXT[5:105]
        file.within = lambda: other.pread(100, 5)
        assert image.pread(100, 2 * CLUSTER) == PLAIN[:100]


def test_a_signal_handler_reads_at_the_position_where_a_read_is(tmp_path: Path) -> None:
    """The lock of the position does not keep the thread that holds it."""
    found = []
    file = Nested(IMAGE)
    with fastqcow.open(file, threads=1) as image:
        before = signal.signal(signal.SIGUSR1, lambda *_: found.append(image.seek(5, os.SEEK_CUR)))
        try:
            file.within = lambda: signal.raise_signal(signal.SIGUSR1)
            assert image.read(100) == TEXT[:100]
            assert image.tell() == 100
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert found == [5]


def test_opening_a_file_object_that_another_image_reads() -> None:
    class Yielding(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.0003)
            return super().read(size)

    file = Yielding(IMAGE)
    with fastqcow.open(file, cache_size=0) as image, ThreadPoolExecutor(1) as pool:
        opening = pool.submit(lambda: [fastqcow.info(file) for _ in range(40)])
        while not opening.done():
            assert image.pread(100, 2 * CLUSTER + 7) == CONTENTS[2 * CLUSTER + 7 : 2 * CLUSTER + 107]
        assert "unreadable" not in opening.result()[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(UNDER_ASAN, reason="its allocator is locked for ever in a child of threads that allocate")
def test_fork_while_a_file_object_is_read() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.05)
            return super().read(size)

    with fastqcow.open(Slow(IMAGE), cache_size=0) as image:
        image.pread(1, 0)
        reader = threading.Thread(target=lambda: [image.read(100) for _ in range(5)])
        reader.start()
        time.sleep(0.02)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            image.seek(0)
            os._exit(0 if image.read(100) == CONTENTS[:100] and image.pread(100, CLUSTER + 5) == bytes(100) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        reader.join()


@pytest.mark.parametrize("kind", [_reader.Source, _reader.Reader])
def test_objects_of_the_bridge_are_not_made_by_hand(kind: type) -> None:
    with pytest.raises(TypeError, match="is made by"):
        kind()


def test_file_that_fails_at_once() -> None:
    with pytest.raises(BrokenError):
        fastqcow.open(Odd(fail, after=0))


def test_too_little_at_the_end_is_a_truncated_file() -> None:
    with fastqcow.open(Odd(lambda data: b"")) as image, pytest.raises(fastqcow.FormatError, match="beyond the end"):
        image.read()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fastqcow.open(tmp_path / "none.qcow2")
    assert caught.value.filename == str(tmp_path / "none.qcow2")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        fastqcow.open(tmp_path)


def test_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Not a regular file"):
        fastqcow.open(tmp_path / "fifo")


@pytest.mark.parametrize("thing", [None, 3, [1], io.StringIO("text")], ids=repr)
def test_what_is_no_file(thing: Any) -> None:
    with pytest.raises(TypeError):
        fastqcow.open(thing)


def test_file_that_is_not_for_reading(tmp_path: Path) -> None:
    with (tmp_path / "new").open("wb") as file, pytest.raises(OSError, match="not open for reading"):
        fastqcow.open(file)


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = descriptors()
    for _ in range(20):
        fastqcow.open(path).close()
        with pytest.raises(fastqcow.FormatError):
            fastqcow.open(__file__)
        with pytest.raises(IsADirectoryError):
            fastqcow.open(path.parent)
    fastqcow.open(path)  # never closed, but nobody has it any more
    assert descriptors() == before


# For reading only


def chain(path: Path, base: bytes, fmt: str) -> None:
    path.write_bytes(build([0] * 3, backing=("middle", "qcow2")))
    path.with_name("middle").write_bytes(build([0] * 3, backing=("base", fmt)))
    path.with_name("base").write_bytes(base)


def with_data_file(path: Path) -> None:
    path.write_bytes(patched(build([data_entry(0)], extensions=extension(0x44415441, b"data")), 72, struct.pack(">Q", 4)))
    path.with_name("data").write_bytes(PLAIN)


LAYERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "image": (lambda path: path.write_bytes(IMAGE), {"disk"}),
    "backing files": (lambda path: chain(path, IMAGE, "qcow2"), {"disk", "middle", "base"}),
    "raw backing file": (lambda path: chain(path, PLAIN, "raw"), {"disk", "middle", "base"}),
    "data file": (with_data_file, {"disk", "data"}),
    "raw": (lambda path: path.write_bytes(PLAIN), {"disk"}),
    "AES": (lambda path: path.write_bytes(patched(IMAGE, 32, struct.pack(">I", 1))), {"disk"}),
    "LUKS": (lambda path: path.with_name("base").write_bytes(IMAGE), {"disk", "base"}),
}


@pytest.fixture(scope="module")
def luks(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("luks") / "disk"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu.img(
        "create", "-u", "-b", "base", "-F", "qcow2", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", options, path, "1M"
    )
    return path.read_bytes()


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, set[Path]]:
    """The kind of an image, where it is, and its files."""
    kind, path = request.param, tmp_path / "layers" / "disk"
    path.parent.mkdir()
    make, names = LAYERS[kind]
    make(path)
    if kind in ("AES", "LUKS"):
        pytest.importorskip("cryptography")
    if kind == "LUKS":
        path.write_bytes(request.getfixturevalue("luks"))
    return kind, path, {path.with_name(name) for name in names}


def descriptors_of(folder: Path) -> dict[Path, int]:
    """How each file of a folder that this process has open was opened: the bits of all its descriptors."""
    found: dict[Path, int] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            mode = fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            continue  # the descriptor of the list
        if path.parent == folder:
            found[path] = found.get(path, 0) | mode
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="this system does not list descriptors")
def test_layers_are_open_for_reading_only(layers: tuple[str, Path, set[Path]], tmp_path: Path) -> None:
    kind, path, files = layers
    expected = dict.fromkeys(files, os.O_RDONLY)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(descriptors_of(path.parent))

    image = fastqcow.open_raw(path) if kind == "raw" else fastqcow.open(path, password="x" if kind in ("AES", "LUKS") else None)
    with image:
        assert descriptors_of(path.parent) == expected
        image.read()
        fastqcow.convert(image, tmp_path / "out", progress=progress)
    assert seen[0] == expected
    assert descriptors_of(path.parent) == {}
    if kind != "raw":
        fastqcow.check(path, report=lambda found: seen.append(descriptors_of(path.parent)))
    assert all(set(each.values()) == {os.O_RDONLY} for each in seen)


opened: list[tuple[Any, int]] | None = None  # what is opened, and how; while somebody wants to know


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append((arguments[0], arguments[2] & os.O_ACCMODE))


@pytest.fixture(scope="module")
def audited() -> None:
    sys.addaudithook(audit)  # for ever


def test_commands_open_for_reading_only(
    audited: None, layers: tuple[str, Path, set[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what Python says of each file that it opens: the core opens none."""
    kind, path, files = layers
    (tmp_path / "password").write_text("x")
    options = ["--password-file", str(tmp_path / "password")] if kind in ("AES", "LUKS") else []
    options, second = (["-f", "raw"], ["-F", "raw"]) if kind == "raw" else (options, [])
    commands = {
        "compare": [*options, *second, str(path), str(path)],
        "convert": [*options, str(path), str(tmp_path / "out")],
        "check": [str(path)],
        "snapshot": [str(path)],
    }
    if kind != "raw":
        commands |= {name: [*options, str(path)] for name in ("info", "map", "checksum", "bitmap")}
    for command, arguments in commands.items():
        found: list[tuple[Any, int]] = []
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "opened", found)
            code = main([command, *arguments])
        of_layers = {(Path(name), mode) for name, mode in found if not isinstance(name, int) and Path(name).parent == path.parent}
        if command in ("check", "snapshot"):
            assert of_layers == {(path, os.O_RDONLY)}
        else:
            assert code == 0
            assert of_layers == {(file, os.O_RDONLY) for file in files}
