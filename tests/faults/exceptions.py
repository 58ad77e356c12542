"""Each way that an exception takes through the bridge is taken hundreds of times, and leaves nothing.

By this table. A line of the bridge that raises, turns a status into an exception, catches one, or calls what may raise (a function
of Python's, or one that was handed in), and that no row reaches, fails it. (What callbacks do when there is no interpreter any more
is in ending.py.)
"""

from __future__ import annotations

import errno
import functools
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

try:
    import _testcapi  # type: ignore[import-not-found]
except ImportError:  # Debian has it in a package of its own
    _testcapi = None

import fastqcow
from capabilities import descriptors
from fastqcow import _check, _inflate, _l2, _reader, _write
from faults import UNDER_ASAN, Fault, allocated_by_c
from images import PAYLOAD, build, compressed_entry, data_entry

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
IMAGE = build([compressed_entry(AT, 3000, 16), data_entry(AT), data_entry(AT + 512)], bytes(CLUSTER))
SOUND = Path("sound.qcow2")  # half a gigabyte: zeroes, a cluster of data, and so on
SOUND.write_bytes(build([0, data_entry(AT)] * 4096, b"x" * CLUSTER))
SOURCES = Path(__file__).parents[2] / "src" / "fastqcow"
BRIDGE = (".pyx", ".pxi")
SIZES: dict[str, Any] = {"threads": 1, "largest_cluster": CLUSTER, "cluster_cache_nbytes": 1 << 20, "table_cache_nbytes": 1 << 20}
WARM_UP, LOOPS = 40, 500


class Odd(io.BytesIO):
    def __init__(self, answer: Callable[[Any], Any] | None = None, after: int = 0) -> None:
        super().__init__(IMAGE)
        self.answer, self.after = answer, after

    def read(self, size: int | None = -1, /) -> Any:
        at, right = self.tell(), super().read(size)
        return right if self.answer is None or at < self.after else self.answer(right)


class Stuck(Odd):
    def seek(self, offset: int, whence: int = 0, /) -> int:
        return super().seek(offset, whence) if whence == os.SEEK_END else fail()


class OddRemote(Odd):
    def read_ranges(self, wanted: list[tuple[int, int]], stopped: Callable[[], bool]) -> Any:
        right = [IMAGE[host_off : host_off + nbytes] for host_off, nbytes in wanted]
        return self.answer(right) if self.answer else right


def fail(*_: object) -> Any:
    raise ConnectionError("the cable is out")


def source(file: Any = None) -> _reader.Source:
    return _reader.Source.from_file(file or Odd(), "odd", False)


def reader(file: Any = None, crypt: Any = None, **options: Any) -> _reader.Reader:
    table: dict[str, Any] = {
        "version": 3,
        "cluster_bits": 16,
        "extended_l2": False,
        "codec": _inflate.DEFLATE_LIBZ,
        "size": 3 * CLUSTER,
    }
    table |= {"l1_off": 2 * CLUSTER, "l1_entries": 1, **SIZES, **options}
    return _reader.Reader.qcow2(source(file), None, None, None, crypt, **table)


def nested() -> _reader.Reader:
    """Reads itself while it reads clusters."""
    made: list[_reader.Reader] = []
    made.append(reader(Odd(lambda right: made[0].pread(9, 0), AT)))
    return made[0]


def sound_source() -> _reader.Source:
    return _reader.Source.from_fd(os.open(SOUND, os.O_RDONLY), str(SOUND), True, True)


def sound() -> _reader.Reader:
    return _reader.Reader.qcow2(
        sound_source(), None, None, None, None, version=3, cluster_bits=16, extended_l2=False, codec=_inflate.DEFLATE_LIBZ,
        size=8192 * CLUSTER, l1_off=2 * CLUSTER, l1_entries=1, **SIZES,
    )  # fmt: skip


def raw() -> _reader.Reader:
    return _reader.Reader.raw(source(), CLUSTER, **SIZES)


def checker(file: Any = None, report: Any = lambda *_: None, entries: int = 1, of: Any = None) -> _check.Checker:
    return _check.Checker(
        of or source(file), report, version=3, cluster_bits=16, extended_l2=False, external_data=False, refcount_order=4,
        refcount_table_off=CLUSTER, refcount_table_entries=entries,
    )  # fmt: skip


def crypt(answer: Callable[[bytes], Any]) -> _reader.Crypt:
    functions = {"data": answer, "counters": answer, "tweaks": answer, "vector_keys": answer}
    return _reader.Crypt("ecb", "plain", 16, by_guest_off=False, **functions)


def write(of: Any, fd: int, progress: Any = None, digest: Any = None, encoder: Any = None) -> None:
    _write.write(
        of, -1, "", None, fd, "target", progress, digest, version=3, cluster_bits=16, extended_l2=False, refcount_order=4,
        encoder=encoder, level=0, grain=4096, threads=1, tables_nbytes=0,
    )  # fmt: skip


def without_memory(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with Fault("memory", -1, errno.ENOMEM):
            return function()

    call.needs_shim = True  # type: ignore[attr-defined]
    return call


def without_room_for_one_object(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        _testcapi.set_nomemory(0, 1)
        try:
            return function()
        finally:
            _testcapi.remove_mem_hooks()

    return call


def in_a_hurry(function: Callable[[], object]) -> object:
    """Each time that the core looks whether it is time to poll, it is."""
    with Fault("clock", 1 << 30, 0):
        return function()


def with_a_signal(function: Callable[[], object]) -> object:
    """One comes while the core works, and waits until it polls."""
    with Fault("clock", 2, -signal.SIGUSR1):
        return function()


def with_a_signal_at_a_read(function: Callable[[], object]) -> object:
    with Fault("pread", 1, -signal.SIGUSR1, SOUND.name):
        return function()


def digest(update: Callable[[memoryview], object]) -> Any:
    return SimpleNamespace(update=update)


def made_once(function: Callable[[Any], object], make: Callable[[], Any]) -> Callable[[], object]:
    """What is made before is not what is looked at; and the failures of one object follow each other."""
    made: list[Any] = []

    def call() -> object:
        if not made:
            made.append(make())
        return function(made[0])

    return call


NONE: Any = None  # no buffer, no file
FULL = os.open("/dev/full", os.O_WRONLY)
OUT = os.open("out", os.O_RDWR | os.O_CREAT)
# The first row has to come first: there is no decoder yet, and so none can be taken that was kept.
ROWS: dict[str, tuple[Callable[[], object], type[Exception]]] = {
    "inflate without memory": (without_memory(lambda: _inflate.inflate(b"", 512, _inflate.ZSTD)), MemoryError),
    "inflate by no codec": (lambda: _inflate.inflate(b"", 512, 99), ValueError),
    "inflate what is none": (lambda: _inflate.inflate(b"\xff" * 9, 512, _inflate.DEFLATE), fastqcow.FormatError),
    "inflate into what cannot be written": (lambda: _inflate.inflate_into(b"", b"", _inflate.DEFLATE), BufferError),
    "inflate what is no buffer": (lambda: _inflate.inflate_into(NONE, bytearray(9), _inflate.DEFLATE), TypeError),
    "inflate to less than nothing": (lambda: _inflate.inflate(b"", -1, _inflate.DEFLATE), ValueError),
    "parse with bad cluster_bits": (lambda: _l2.parse(b"", 8, False, 3), ValueError),
    "parse with a bad version": (lambda: _l2.parse(b"", 16, False, 4), ValueError),
    "parse half an entry": (lambda: _l2.parse(bytes(12), 16, False, 3), ValueError),
    "parse what is no buffer": (lambda: _l2.parse(NONE, 16, False, 3), TypeError),
    "a Source by hand": (_reader.Source, TypeError),
    "a Reader by hand": (_reader.Reader, TypeError),
    "a source without memory": (
        without_memory(lambda: _reader.Source.from_fd(os.open("/dev/null", os.O_RDONLY), "x", False, False)), MemoryError
    ),
    "a file without memory": (without_memory(source), MemoryError),
    "a file without a seek": (lambda: source(object()), AttributeError),
    "a file without a lasting identity": (lambda: _reader.Source.from_file(NONE, "x", False), AttributeError),
    "read returns text": (made_once(lambda s: s.pread(9, 0), lambda: source(Odd(lambda right: "text"))), TypeError),
    "read returns too much": (made_once(lambda s: s.pread(9, 0), lambda: source(Odd(lambda right: right + b"x"))), ValueError),
    "read raises": (made_once(lambda s: s.pread(9, 0), lambda: source(Odd(fail))), ConnectionError),
    "seek raises": (made_once(lambda s: s.pread(9, 0), lambda: source(Stuck())), ConnectionError),
    "read_ranges returns too few": (made_once(lambda s: s.pread(9, 0), lambda: source(OddRemote(lambda right: []))), ValueError),
    "read_ranges raises": (made_once(lambda s: s.pread(9, 0), lambda: source(OddRemote(fail))), ConnectionError),
    "an L1 table that is cut": (lambda: reader(l1_off=len(IMAGE) - 4), fastqcow.FormatError),
    "an L1 table that cannot be read": (lambda: reader(Odd(fail)), ConnectionError),
    "a geometry that is none": (lambda: reader(cluster_bits=30), ValueError),
    "a raw reader without memory": (
        made_once(lambda s: without_memory(lambda: _reader.Reader.raw(s, 9, **SIZES))(), source), MemoryError
    ),
    "a damaged cluster": (made_once(lambda r: r.pread(9, 0), reader), fastqcow.FormatError),
    "a damaged entry": (made_once(lambda r: r.pread(9, 2 * CLUSTER), reader), fastqcow.FormatError),
    "all of the disk": (made_once(lambda r: r.pread(3 * CLUSTER, 0), reader), fastqcow.FormatError),
    "a source that fails": (made_once(lambda r: r.pread(9, CLUSTER), lambda: reader(Odd(fail, AT))), ConnectionError),
    "a read within a read": (made_once(lambda r: r.pread(9, CLUSTER), nested), RuntimeError),
    "a negative count": (made_once(lambda r: r.pread(-1, 0), raw), ValueError),
    "a negative offset": (made_once(lambda r: r.pread(9, -1), raw), ValueError),
    "an offset that is no number": (made_once(lambda r: r.pread(9, "x"), raw), TypeError),
    "buffers without memory": (
        made_once(lambda r: without_memory(lambda: r.preadv([bytearray(9)], 0))(), raw), MemoryError
    ),
    "the last of the buffers is read-only": (made_once(lambda r: r.preadv([bytearray(9), b"x"], 0), raw), BufferError),
    "buffers of a damaged disk": (made_once(lambda r: r.preadv([bytearray(9), bytearray(9)], 0), reader), fastqcow.FormatError),
    "buffers that are none": (made_once(lambda r: r.preadv(7, 0), raw), TypeError),
    "a map without memory": (made_once(lambda r: without_memory(lambda: r.extents(0, 9, 10))(), raw), MemoryError),
    "a map of a damaged disk": (made_once(lambda r: r.extents(0, 3 * CLUSTER, 10), reader), fastqcow.FormatError),
    "a map of what is not there": (made_once(lambda r: r.extents(0, 1 << 40, 10), reader), ValueError),
    "an export to a full device": (made_once(lambda r: r.export(FULL, "full", 0, True, False, None, None), raw), OSError),
    "an export to nowhere": (made_once(lambda r: r.export(-1, "none", 0, True, False, None, None), raw), OSError),
    "a written image on a full device": (made_once(lambda r: write(r, FULL), raw), OSError),
    "a written image of a damaged one": (made_once(lambda r: write(r, FULL), reader), fastqcow.FormatError),
    "an encoder that is none": (made_once(lambda r: write(r, OUT, encoder=object()), raw), ValueError),
    "a progress of an export that raises": (
        made_once(lambda r: in_a_hurry(lambda: r.export(OUT, "out", 0, False, False, fail, None)), sound), ConnectionError
    ),
    "a progress of what is written that raises": (
        made_once(lambda r: in_a_hurry(lambda: write(r, OUT, progress=fail)), sound), ConnectionError
    ),
    "a digest of an export that raises at zeroes": (
        made_once(lambda r: r.export(OUT, "out", 0, True, False, None, digest(fail)), sound), ConnectionError
    ),
    "a digest of an export that raises at data": (
        made_once(lambda r: r.export(OUT, "out", 0, True, False, None, digest(lambda data: data[0] and fail())), sound),
        ConnectionError,
    ),
    "a digest of what is written that raises": (made_once(lambda r: write(r, OUT, digest=digest(fail)), sound), ConnectionError),
    "what is no digest": (made_once(lambda r: r.export(OUT, "out", 0, True, False, None, 7), sound), AttributeError),
    "a signal in a read": (made_once(lambda r: with_a_signal(lambda: r.pread(3 << 20, 0)), sound), InterruptedError),
    "a signal in a map": (made_once(lambda r: with_a_signal(lambda: r.extents(0, r.size, 9000)), sound), InterruptedError),
    "a signal in an export": (
        made_once(lambda r: with_a_signal(lambda: r.export(OUT, "out", 0, True, False, None, None)), sound), InterruptedError
    ),
    "a signal in an export with progress and digest": (
        made_once(lambda r: with_a_signal(lambda: r.export(OUT, "out", 0, True, False, fail, digest(bytes))), sound),
        InterruptedError,
    ),
    "a signal in what is written": (made_once(lambda r: with_a_signal(lambda: write(r, OUT)), sound), InterruptedError),
    "a signal in a check": (
        made_once(lambda c: with_a_signal_at_a_read(lambda: c.bitmap(CLUSTER, 8, 1)), lambda: checker(of=sound_source())),
        InterruptedError,
    ),
    "a cipher that raises": (made_once(lambda c: c.decrypt(bytes(512), 0), lambda: crypt(fail)), ConnectionError),
    "a cipher that returns too little": (made_once(lambda c: c.decrypt(bytes(512), 0), lambda: crypt(lambda b: b[1:])), ValueError),
    "half a sector": (made_once(lambda c: c.decrypt(bytes(100), 0), lambda: crypt(bytes)), ValueError),
    "an unknown mode": (
        lambda: _reader.Crypt("x", "plain", 16, by_guest_off=False, data=fail, counters=fail, tweaks=fail, vector_keys=fail),
        KeyError,
    ),
    "an encrypted disk whose cipher raises": (
        made_once(lambda r: r.pread(9, CLUSTER), lambda: reader(crypt=crypt(fail))), ConnectionError
    ),
    "a Checker that was not made": (lambda: _check.Checker.__new__(_check.Checker).finish(), ValueError),
    "a Checker that is made twice": (made_once(lambda c: c.__init__(source(), None, version=3, cluster_bits=16, extended_l2=False,
        external_data=False, refcount_order=4, refcount_table_off=0, refcount_table_entries=0), checker), ValueError),
    "a refcount table that cannot be read": (lambda: checker(Odd(fail)), ConnectionError),
    "a report that raises": (made_once(lambda c: c.use(_check.DATA, 1 << 40, 9, 1), lambda: checker(report=fail)), ConnectionError),
    "an L1 table to be checked that cannot be read": (
        made_once(lambda c: c.l1(2 * CLUSTER, 1, 0, 1, 0), lambda: checker(Odd(fail, 2 * CLUSTER), entries=0)), ConnectionError
    ),
    "a bad entry of a bitmap": (made_once(lambda c: c.bitmap(AT - CLUSTER, 1, 1), checker), fastqcow.FormatError),
    "a check of what cannot be read": (lambda: unreadable().finish(), ConnectionError),
}  # fmt: skip
if _testcapi:
    NULL = os.open("/dev/null", os.O_RDONLY)
    ROWS["a Source that there is no room for"] = (
        lambda: without_room_for_one_object(functools.partial(_reader.Source.from_fd, os.dup(NULL), "x", False, False))(),
        MemoryError,
    )
    ROWS["a map that there is no room for"] = (
        made_once(lambda r: without_room_for_one_object(lambda: r.extents(0, 9, 10))(), raw),
        MemoryError,
    )


def interrupt(number: int, frame: object) -> None:
    raise InterruptedError("a signal")


def unreadable() -> _check.Checker:
    file = Odd(fail, 3 * CLUSTER)  # the L2 table
    made = checker(file, entries=0)
    made.l1(2 * CLUSTER, 1, 0, 1, 0)
    return made


COMMON = (None, True, False, b"", "", (), 0, 1, fail, Odd, IMAGE)


def left() -> dict[str, int]:
    gc.collect()
    return {
        "blocks": sys.getallocatedblocks(),
        "bytes": allocated_by_c() // 256,
        "objects": len(gc.get_objects()),
        "descriptors": descriptors(),
        **{f"references to {each!r:.20}": sys.getrefcount(each) for each in COMMON},
    }


def try_it(name: str, reached: set[tuple[str, int]] | None = None) -> None:
    function, expected = ROWS[name]
    try:
        function()
    except expected as e:
        at = e.__traceback__
        while reached is not None and at is not None:
            file = at.tb_frame.f_code.co_filename
            if file.endswith(BRIDGE):
                reached.add((os.path.basename(file), at.tb_lineno))
            at = at.tb_next
        return
    raise AssertionError(f"{name}: nothing was raised")


def ways_out() -> dict[tuple[str, int], str]:
    own = r"\s*(raise\b|check\(|except\b)"
    of_python = r"PyErr_\w+|PyObject_GetBuffer|PyCapsule_GetPointer"
    of_users = r"request\.progress|digest\.update|checker\.report|file\.\w+|crypt\.ciphers\[.*\]"
    pattern = re.compile(rf"{own}|[^#]*\b({of_python}|{of_users})\(")
    return {
        (path.name, number): line.strip()
        for path in SOURCES.iterdir()
        if path.suffix in BRIDGE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.match(line)
    }


def tried(place: tuple[str, int]) -> set[tuple[str, int]]:
    """The lines from which an exception comes to a line: to `except` those between it and its `try`, to others themselves."""
    name, last = place
    lines = (SOURCES / name).read_text().splitlines()
    indentation, word = re.match(r"(\s*)(\w*)", lines[last - 1]).groups()  # type: ignore[union-attr]
    first = last
    while word == "except" and lines[first - 1] != f"{indentation}try:":
        first -= 1
    return {(name, number) for number in range(first, last + 1)}


def main() -> None:
    reached: set[tuple[str, int]] = set()
    signal.signal(signal.SIGUSR1, interrupt)
    for name in ROWS:
        if UNDER_ASAN and "memory" in name:
            continue  # its allocator comes before the shim's
        for _ in range(WARM_UP):
            try_it(name)
        try_it(name, reached)
        before = left()
        for _ in range(LOOPS):
            try_it(name)
        after = left()
        grown = {what: after[what] - before[what] for what in before if after[what] - before[what] > LOOPS // 5}
        assert not grown, f"{name}: {grown} in {LOOPS} times"
        assert after["descriptors"] == before["descriptors"], name
    missing = {place: line for place, line in ways_out().items() if not tried(place) & reached}
    if UNDER_ASAN:
        unreached = ("raise MemoryError", "check(_core.fq_reader_open_raw(")
        missing = {place: line for place, line in missing.items() if not line.startswith(unreached)}
    if not _testcapi:
        missing = {place: line for place, line in missing.items() if line not in ("except MemoryError:", "raise")}
    assert not missing, f"no row of the table reaches: {missing}"
    print(len(ROWS), len(reached))


if __name__ == "__main__":
    main()
