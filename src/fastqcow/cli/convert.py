"""`fastqcow convert`: an image to a raw file."""

from __future__ import annotations

import argparse
from typing import get_args

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

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write an image to a raw file or a block device",
        description="Write the contents of an image to a raw file or a block device, on all cores. A file appears under its name "
        "when it is complete; a block device is written in place. A raw image is copied with -f raw: that is not guessed.",
        epilog="example: fastqcow convert -p disk.qcow2 disk.raw",
    )
    add_image(parser, FORMATS)
    parser.add_argument("target", metavar="OUTPUT", help="the file or block device to write")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="an internal snapshot, by id or name, in place of the disk")
    add_opening(parser)
    parser.add_argument("-O", dest="target_format", metavar="FMT", choices=["raw"], default="raw", help="format of the output: raw")
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
        dest="preallocation",
        type=_preallocation,
        default="preallocation=off",
        metavar="preallocation=off|falloc|full",
        help="reserve the output's space first, or also write all of it",
    )
    parser.add_argument(
        "-C",
        dest="copy_offload",
        action="store_true",
        help="let the kernel copy plain clusters, which some file systems do by sharing them; zeroes in them are not looked for",
    )
    parser.add_argument(
        "-n", dest="in_place", action="store_true", help="write into an existing output, which must be large enough"
    )
    parser.add_argument("-W", action="store_true", help="accepted for qemu-img's sake: writes are never in order")
    add_output(parser)
    parser.set_defaults(run=run)


def _preallocation(text: str) -> str:
    name, _, mode = text.partition("=")
    if name != "preallocation":
        raise argparse.ArgumentTypeError(f"{name!r} is not an option of the format raw; preallocation is")
    if mode not in get_args(Preallocation):
        raise argparse.ArgumentTypeError(f"preallocation is {mode!r}; it can be off, falloc or full")
    return mode


def run(arguments: argparse.Namespace) -> int:
    """A format is not guessed to be raw: a broken download would be copied, and called a disk."""
    if arguments.copy_offload and arguments.sparse_size is not None:
        raise ValueError("-C does not look for zeroes, so it cannot be used with -S")
    sparse_size = SPARSE_SIZE if arguments.sparse_size is None else arguments.sparse_size
    options = {**opening(arguments), "threads": arguments.threads}
    with (
        open_disk(arguments.image, arguments.source_format, guess_raw=False, whole_sectors=True, **options) as image,
        bar(arguments.progress) as report,
    ):
        disk = at_snapshot(image, arguments.snapshot)
        done = convert(
            disk,
            arguments.target,
            sparse_size=sparse_size,
            preallocation=arguments.preallocation,
            copy_offload=arguments.copy_offload,
            in_place=arguments.in_place,
            progress=report,
        )
    if arguments.output == "json":
        import json

        print(json.dumps({k.replace("_", "-"): v for k, v in done._asdict().items()}, indent=4))
    return 0
