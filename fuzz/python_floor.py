#!/usr/bin/env python3
"""The Python floor on hostile images: header, extensions, snapshot table, bitmap directory, LUKS header, and what is said of them.

`python_floor.py FOLDER [OPTIONS]` fuzzes with atheris, whose options are libFuzzer's; `try_image` takes one input. Nothing but
fastqcow.Error and OSError may come out, a command ends in an exit code and a line, and no file is opened beside the image.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import seeds

if __name__ == "__main__":
    import atheris

    instrumented = atheris.instrument_imports(include=["fastqcow"])
else:
    instrumented = contextlib.nullcontext()
with instrumented:
    import fastqcow
    from fastqcow import checking, cli, crypt, describe, header, luks
INPUT_NBYTES_MAX = 1 << 20
HASHINGS_MAX = 2000  # a minute's, which the limit is, would be taken for a hang
ITEMS_MAX = 200
PASSWORD = "password"
COMMANDS = ("info", "info --output=json", "snapshot -l", "check", "map", "bitmap", "bitmap --output=json", "bitmap {} marks")
CGROUPS = ("/proc/self/cgroup/", "/sys/fs/cgroup/")  # which say how many processors there are to use


class Opened:
    """Sees to it that all files that are opened lie in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder) + os.sep
        self.watching = False
        self.strangers: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if not (os.path.realpath(path) + os.sep).startswith((self.folder, *CGROUPS)):
                self.strangers.append(path)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.watching, self.strangers = True, []
        try:
            yield
        finally:
            self.watching = False
        assert not self.strangers, f"a file outside of the image's folder was opened: {self.strangers}"


class Target:
    """Where images are put, and what there is beside them for their names to lead to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "image" / "disk.qcow2"
        self.path.parent.mkdir()
        (self.path.parent / "base.raw").write_bytes(b"base" * 999)
        (self.path.parent / "link").symlink_to(folder / "secret")
        (folder / "secret").write_bytes(b"QFI\xfb")
        crypt._nettle()
        self.opened = Opened(self.path.parent)
        for seed in seeds.with_extensions():  # what is imported only then is no finding
            for i in range(len(COMMANDS)):
                self.try_image(seed + bytes([i]), watch=False)

    def try_image(self, data: bytes, *, watch: bool = True) -> None:
        if len(data) > INPUT_NBYTES_MAX:
            return
        self.path.write_bytes(data)
        with warnings.catch_warnings(), self.opened.watched() if watch else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            for look in (look_inside, look_at_tables):
                attempt(look, self.path)
            attempt(describe.info, io.BytesIO(data))
            run(COMMANDS[zlib.crc32(data) % len(COMMANDS)], self.path)  # each costs more than all of the rest


def attempt(look: Callable[[Path], object], image: object) -> None:
    with contextlib.suppress(fastqcow.Error, OSError):
        look(image)  # type: ignore[arg-type]


def look_inside(path: Path) -> None:
    describe.info(path)
    with fastqcow.open(path, password=PASSWORD, threads=1) as image:
        attempt(lambda _: image.bitmaps, path)
        if image.header.bitmaps:
            attempt(lambda _: [list(itertools.islice(image.bitmap(b.name), ITEMS_MAX)) for b in image.bitmaps], path)
        attempt(lambda _: list(itertools.islice(image.map(), ITEMS_MAX)), path)
        attempt(lambda _: image.pread(5000, 0), path)
        for entry in image.snapshots[:ITEMS_MAX]:
            attempt(lambda _, entry=entry: image.snapshot_of(entry).pread(700, 0), path)  # type: ignore[misc]


def look_at_tables(path: Path) -> None:
    """Also of an image that cannot be opened."""
    data = path.read_bytes()

    def pread(nbytes: int, host_off: int) -> bytes:
        return data[host_off : host_off + nbytes]

    head = header.Header.read(pread, "image")
    assert head.cluster_size in (1 << bits for bits in range(9, 22))
    if head.crypto:
        found = luks.LuksHeader.read(pread, head, "image")
        attempt(lambda _: found.unlock(lambda nbytes, off: pread(nbytes, off).ljust(nbytes, b"\0"), b"password"), path)
    attempt(lambda _: checking.check(path, report=str), path)


def run(command: str, path: Path) -> None:
    arguments = [word.format(path) for word in command.split()] + ([] if "{}" in command else [str(path)])
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert code in (0, 1, 2, 3), code
    said = err.getvalue().splitlines()
    assert all(line.startswith("fastqcow: ") and line.isprintable() for line in said), said
    assert code != 1 or said


if __name__ == "__main__":
    luks.HASHINGS_MAX = HASHINGS_MAX
    cli.gc.freeze = lambda: None  # type: ignore[attr-defined]  # it would keep what each command leaves behind
    with tempfile.TemporaryDirectory() as name:
        atheris.Setup(sys.argv, Target(Path(name)).try_image)
        atheris.Fuzz()
