"""`fastqcow map`: where the bytes of an image are."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from fastqcow._reader import Reader
from fastqcow.cli.common import Commands, add_image, add_opening, add_output, opening, size_argument
from fastqcow.errors import printable
from fastqcow.image import Extent
from fastqcow.image import open as open_image

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "map",
        help="list where the bytes of an image are",
        description="List the ranges of the disk: which file of the backing chain holds them, where, and if they are compressed.",
        epilog="example: fastqcow map --output=json disk.qcow2",
    )
    add_image(parser)
    add_opening(parser)
    add_output(parser)
    parser.add_argument("-s", "--start-offset", type=size_argument, default=0, metavar="OFFSET", help="start there")
    parser.add_argument("-l", "--max-length", type=size_argument, metavar="LENGTH", help="look at so many bytes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with open_image(arguments.image, **opening(arguments)) as image:
        extents = image.map(arguments.start_offset, arguments.max_length)
        if arguments.output == "json":
            print_json(extents)
        else:
            print_human(extents, [reader.data.path for reader in readers(image._open_reader())])
    return 0


def readers(top: Reader | None) -> Iterable[Reader]:
    while top is not None:
        yield top
        top = top.backing


def print_json(extents: Iterable[Extent]) -> None:
    """One extent a line, as they are found: maps of large images are long."""
    import json

    before = "["
    for extent in extents:
        fields = extent._asdict()
        if extent.offset is None:
            del fields["offset"]
        print(before + json.dumps(fields), end="")
        before = ",\n"
    print("]" if before != "[" else "[]")


def print_human(extents: Iterable[Extent], paths: list[str]) -> None:
    """qemu-img lists data only, and gives up at the first compressed cluster; here its place is a word."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in extents:
        if extent.data:
            place = "compressed" if extent.offset is None else f"{extent.offset:#x}"
            print(f"{extent.start:<#16x}{extent.length:<#16x}{place:<16}{printable(paths[extent.depth])}")
