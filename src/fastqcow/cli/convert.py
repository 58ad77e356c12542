"""`fastqcow convert`: an image to a raw file, or to a new qcow2 image."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

from fastqcow.cli.common import (
    FORMATS,
    Commands,
    add_image,
    add_opening,
    add_output,
    at_snapshot,
    bar,
    open_disk,
    opening,
    size_argument,
)
from fastqcow.conversion import SPARSE_SIZE, Preallocation, convert
from fastqcow.errors import printable
from fastqcow.image import open_raw

if TYPE_CHECKING:
    from fastqcow.creation import RawStream
    from fastqcow.diskfile import DiskFile

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write an image to a raw file, a new qcow2 image or a block device",
        description="Write the contents of an image to a raw file, or with -O qcow2 to a new image, which -c compresses, on all "
        "cores. A file appears under its name when it is complete; a block device is written in place. A raw image is read with "
        "-f raw: that is not guessed. The image - is standard input.",
        epilog="example: fastqcow convert -p -c -f raw -O qcow2 disk.raw disk.qcow2",
    )
    add_image(parser, FORMATS)
    parser.add_argument("target", metavar="OUTPUT", help="the file or block device to write")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="an internal snapshot, by id or name, in place of the disk")
    add_opening(parser)
    parser.add_argument(
        "-O",
        dest="target_format",
        metavar="FMT",
        choices=["raw", "qcow2"],
        default="raw",
        help="format of the output: raw or qcow2",
    )
    parser.add_argument("-c", dest="compress", action="store_true", help="compress the clusters of a qcow2 image")
    parser.add_argument("-p", dest="progress", action="store_true", help="show progress, if standard error is a terminal")
    parser.add_argument("-m", dest="threads", type=int, metavar="N", help="threads to use; by default one for each CPU")
    parser.add_argument(
        "-S",
        dest="sparse_size",
        type=size_argument,
        metavar="SIZE",
        help="zeroes of so many bytes become holes (4k); 0 allocates the whole output",
    )
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="raw: preallocation=off, falloc or full. qcow2: cluster_size, compat (0.10 or 1.1), compression_type (zlib or zstd), "
        "compression_level (a number, or fast), refcount_bits, extended_l2 (on or off), backing_file, backing_fmt",
    )
    parser.add_argument("-B", dest="backing_file", metavar="NAME", help="backing file of the output: only what differs is written")
    parser.add_argument("-F", dest="backing_format", metavar="FMT", choices=FORMATS, help="its format: qcow2 or raw")
    parser.add_argument(
        "-C",
        dest="copy_offload",
        action="store_true",
        help="let the kernel copy plain clusters, which some file systems do by sharing them; zeroes in them are not looked for",
    )
    parser.add_argument(
        "-n", dest="in_place", action="store_true", help="write into an existing output, which must be large enough"
    )
    parser.add_argument("--check", action="store_true", help="check the image first, and do not convert it if it is corrupt")
    parser.add_argument(
        "--verify", action="store_true", help="read the output back and compare it with the image; if it differs, it gets no name"
    )
    parser.add_argument(
        "--checksum", action="store_true", help="print the SHA-256 of the disk's bytes, as 'fastqcow checksum' does"
    )
    parser.add_argument("-W", action="store_true", help="accepted for qemu-img's sake: writes are never in order")
    add_output(parser)
    parser.set_defaults(run=run, refuse=parser.error)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """The names and values of an -o; a comma in a value is written twice. A name without a value is switched on."""
    for part in re.findall(r"(?:[^,]|,,)+", text):
        name, equals, value = part.replace(",,", ",").partition("=")
        yield name, value if equals else "on"


def _target_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What -o, -B and -F say, as keyword arguments of `convert`.

    Raises:
        ValueError: an option that the format does not have, or a value that it cannot have, by its name.
    """
    known = _QCOW2 if arguments.target_format == "qcow2" else _RAW
    found: dict[str, Any] = {}
    for name, value in (each for text in arguments.options for each in _split(text)):
        if name not in known:
            raise ValueError(f"{name!r} is not an option of the format {arguments.target_format}; it has {', '.join(known)}")
        to, read = known[name]
        try:
            found[to] = read(value)
        except (ValueError, KeyError, argparse.ArgumentTypeError):
            raise ValueError(f"{name} cannot be {value!r}") from None
    for to, given in (("backing_file", arguments.backing_file), ("backing_format", arguments.backing_format)):
        if given is not None:
            found[to] = given
    return found


def _preallocation(text: str) -> str:
    if text not in get_args(Preallocation):
        raise ValueError(f"preallocation is {text!r}; it can be off, falloc or full")
    return text


def _switch(text: str) -> bool:
    return {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}[text]


def _level(text: str) -> int | str:
    return text if text == "fast" else int(text)


_RAW: dict[str, tuple[str, Callable[[str], Any]]] = {"preallocation": ("preallocation", _preallocation)}
_QCOW2: dict[str, tuple[str, Callable[[str], Any]]] = {
    "cluster_size": ("cluster_size", size_argument),
    "compat": ("compat", str),
    "compression_type": ("compression_type", str),
    "compression_level": ("compression_level", _level),
    "refcount_bits": ("refcount_bits", int),
    "extended_l2": ("extended_l2", _switch),
    "backing_file": ("backing_file", str),
    "backing_fmt": ("backing_format", str),
}


@contextlib.contextmanager
def _source(arguments: argparse.Namespace) -> Iterator[DiskFile | RawStream]:
    """The disk to write. A format is not guessed to be raw: a broken download would be copied, and called a disk."""
    if arguments.image == "-":
        with _standard_input(arguments) as disk:
            yield disk
        return
    options = {**opening(arguments), "threads": arguments.threads}
    with open_disk(arguments.image, arguments.source_format, guess_raw=False, whole_sectors=True, **options) as image:
        yield at_snapshot(image, arguments.snapshot)


@contextlib.contextmanager
def _standard_input(arguments: argparse.Namespace) -> Iterator[DiskFile | RawStream]:
    """Read by position where it is a file, else as it comes."""
    if arguments.source_format != "raw":
        raise ValueError("standard input is read as a raw disk; say so with -f raw")
    if arguments.snapshot is not None:
        raise ValueError("standard input: a raw image has no snapshots")
    stdin = io.FileIO(sys.stdin.fileno(), closefd=False)
    mode = os.fstat(stdin.fileno()).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        with open_raw(stdin, whole_sectors=True, threads=arguments.threads) as disk:
            yield disk
        return
    from fastqcow.creation import RawStream

    yield RawStream(stdin)


def run(arguments: argparse.Namespace) -> int:
    if arguments.copy_offload and arguments.sparse_size is not None:
        raise ValueError("-C does not look for zeroes, so it cannot be used with -S")
    try:
        options = _target_options(arguments)
    except ValueError as e:
        arguments.refuse(str(e))
    with _source(arguments) as disk, bar(arguments.progress) as report:
        done = convert(
            disk,
            arguments.target,
            format=arguments.target_format,
            compress=arguments.compress,
            sparse_size=SPARSE_SIZE if arguments.sparse_size is None else arguments.sparse_size,
            copy_offload=arguments.copy_offload,
            in_place=arguments.in_place,
            threads=arguments.threads,
            check=arguments.check,
            verify=arguments.verify,
            checksum="sha256" if arguments.checksum else None,
            progress=report,
            **options,
        )
    if arguments.output == "json":
        import json

        print(json.dumps({k.replace("_", "-"): v for k, v in done._asdict().items()}, indent=4))
    elif done.checksum:
        print(f"{done.checksum}  {printable(arguments.target)}")
    return 0
