"""`fastqcow bitmap`: the persistent dirty bitmaps of an image, and the ranges that one marks."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import Commands, add_image, add_opening, add_output, opening
from fastqcow.errors import printable
from fastqcow.image import open as open_image

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bitmap",
        help="list the dirty bitmaps of an image, or the ranges that one marks",
        description="List the persistent dirty bitmaps of an image; with a NAME, the ranges of the disk that this one marks.",
        epilog="example: fastqcow bitmap disk.qcow2 since-backup",
    )
    add_image(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a bitmap, whose ranges to list")
    add_opening(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import json

    with open_image(arguments.image, **opening(arguments)) as image:
        if arguments.name is None:
            if arguments.output == "json":
                listed = [{"name": b.name, "granularity": b.granularity, "in-use": b.in_use, "auto": b.auto} for b in image.bitmaps]
                print(json.dumps(listed, indent=4))
            for b in image.bitmaps if arguments.output == "human" else ():
                flags = "".join(f", {flag}" for flag, is_set in (("in use", b.in_use), ("auto", b.auto)) if is_set)
                print(printable(f"{b.name}: granularity {b.granularity}{flags}"))
            return 0
        before = "["
        for found in image.bitmap(arguments.name):
            if arguments.output == "json":
                print(before + json.dumps(found._asdict()), end="")
                before = ",\n"
            else:
                print(f"{found.start:<#16x}{found.length:#x}")
        if arguments.output == "json":
            print("]" if before != "[" else "[]")
    return 0
