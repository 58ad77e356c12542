"""What several commands share: arguments, and numbers as qemu-img writes them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastqcow.diskfile import DiskFile
from fastqcow.errors import FormatError, UnsupportedError, printable
from fastqcow.image import Image, open_raw
from fastqcow.image import open as open_image
from fastqcow.source import open_source

__all__ = [
    "FORMATS",
    "Commands",
    "add_image",
    "add_opening",
    "add_output",
    "at_snapshot",
    "bar",
    "open_disk",
    "opening",
    "print_json",
    "size_argument",
    "size_text",
    "snapshot_lines",
]

FORMATS = ["qcow2", "raw"]
PASSWORD_NBYTES_MAX = 8 << 20  # as much as cryptsetup takes
# What other formats start with: to be refused by name, and not to be taken for raw.
_OTHERS = {
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"LUKS\xba\xbe": "luks",
    b"QED\0": "qed",
    b"QFI\xfb\0\0\0\1": "qcow",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
}

Commands = Any  # argparse keeps the type of add_subparsers() to itself

_UNITS = "BKMGTPE"


def add_image(parser: argparse.ArgumentParser, formats: Sequence[str] = ("qcow2",)) -> None:
    names = " or ".join(formats)
    parser.add_argument("image", metavar="IMAGE", help=f"the image, {names}")
    parser.add_argument("-f", dest="source_format", metavar="FMT", choices=formats, help=f"format of the image: {names}")
    parser.add_argument("-U", "--force-share", action="store_true", help="accepted for qemu-img's sake: images are never locked")


def add_opening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backing",
        metavar="PATH",
        help="the backing file to use in place of the one that the image names; 'follow' to open that one wherever it lies, "
        "'none' to do without. By default it is opened if it lies in the image's directory or below",
    )
    parser.add_argument("--data-file", metavar="PATH", help="the same for an external data file")
    parser.add_argument(
        "--password-file",
        metavar="PATH",
        help="the password of an encrypted image: all that is in this file, a line break too, as for QEMU's secrets",
    )


def opening(arguments: argparse.Namespace) -> dict[str, Any]:
    """How to open an image and its other files, as keyword arguments of `fastqcow.open`."""
    return {
        "backing": False if arguments.backing == "none" else arguments.backing,
        "data_file": arguments.data_file,
        "password": _password(arguments.password_file),
    }


def _password(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as f:
        return f.read(PASSWORD_NBYTES_MAX)


def open_disk(
    path: str, fmt: str | None, *, guess_raw: bool = True, whole_sectors: bool = False, threads: int | None = None, **options: Any
) -> DiskFile:
    """Open an image of a format, or of the one that it looks like: qcow2 by its first bytes, raw if it looks like nothing else.

    guess_raw: if False, what looks like nothing else is refused: raw has to be said.
    whole_sectors: a raw file that ends within a sector of 512 bytes is followed by zeroes to its end, as for QEMU.
    """
    if fmt is None:
        head = open_source(path).pread(24, 0)
        fmt = next(
            (name for magic, name in _OTHERS.items() if head.startswith(magic)), "qcow2" if head[:4] == b"QFI\xfb" else "raw"
        )
        if fmt == "raw" and not guess_raw:
            what = "not a qcow2 image" if head else "the file is empty"
            raise FormatError(f"{what}; if this is a raw image, say so with -f raw", path=path)
    if fmt == "qcow2":
        return open_image(path, threads=threads, **options)
    if fmt == "raw":
        return open_raw(path, whole_sectors=whole_sectors, threads=threads)
    raise UnsupportedError(f"the format {fmt} is not supported; qcow2 and raw are", path=path)


def at_snapshot(disk: DiskFile, name_or_id: str | None) -> DiskFile:
    """The disk as it was at a snapshot, if one is named."""
    if name_or_id is None:
        return disk
    if not isinstance(disk, Image):
        raise ValueError(f"{disk.name}: a raw image has no snapshots")
    return disk.snapshot(name_or_id)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=["human", "json"], default="human", help="for people (the default), or JSON")


def size_argument(text: str) -> int:
    """A size with qemu-img's suffixes: 4096, 4k, 64K, 1M, ..."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "B")
    if not digits.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or a number with k, M, G, T, P or E")
    nbytes = int(digits) << 10 * _UNITS.index(unit)
    if nbytes >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any file can have")
    return nbytes


def print_json(value: Any, indent: str = "") -> None:
    """Piece by piece: what an image's tables hold can be long, and all of it in one text several times as long.

    indent: what each line but the first begins with.
    """
    import json

    for piece in json.JSONEncoder(indent=4).iterencode(value):
        sys.stdout.write(piece.replace("\n", "\n" + indent) if indent else piece)


def snapshot_lines(snapshots: list[dict[str, Any]]) -> Iterator[str]:
    """The list of an image's snapshots, from the entries of its info, as qemu-img prints it."""
    import datetime

    yield "Snapshot list:"
    yield f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for s in snapshots:
        date = datetime.datetime.fromtimestamp(s["date-sec"]).strftime("%Y-%m-%d %H:%M:%S")
        minutes, seconds = divmod(s["vm-clock-sec"], 60)
        clock = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{s['vm-clock-nsec'] // 1_000_000:03}"
        size = size_text(s["vm-state-size"])
        yield printable(f"{s['id']:<9} {s['name']:<16} {size:>8}{date:>20}{clock:>13}{s.get('icount', ''):>11}")


def size_text(nbytes: int) -> str:
    """As qemu-img: three significant digits and a binary unit."""
    power = min(max(nbytes.bit_length() - 1, 0) // 10, 6)
    if nbytes / (1 << 10 * power) >= 999.5 and power < 6:
        power += 1
    return f"{nbytes / (1 << 10 * power):0.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"


@contextlib.contextmanager
def bar(wanted: bool) -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on a terminal, where tqdm is installed to draw it."""
    if not (wanted and os.isatty(sys.stderr.fileno())):
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print("fastqcow: no progress is shown: install tqdm, or fastqcow[progress]", file=sys.stderr)
        yield None
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024) as drawn:

        def report(done: int, total: int) -> None:
            drawn.total = total or None
            drawn.update(done - drawn.n)

        yield report
