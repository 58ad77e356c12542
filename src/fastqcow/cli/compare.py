"""`fastqcow compare`: whether two images hold the same bytes."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import FORMATS, Commands, add_opening, bar, open_disk, opening

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="tell whether two images hold the same bytes",
        description="Compare the contents of two images, qcow2 or raw. Exit code 0: the same, 1: not, 2: one cannot be read.",
        epilog="example: fastqcow compare disk.qcow2 disk.raw",
    )
    parser.add_argument("first", metavar="IMAGE1")
    parser.add_argument("second", metavar="IMAGE2")
    parser.add_argument("-f", dest="first_format", metavar="FMT", choices=FORMATS, help="format of the first: qcow2 or raw")
    parser.add_argument("-F", dest="second_format", metavar="FMT", choices=FORMATS, help="format of the second")
    parser.add_argument(
        "-s", dest="strict", action="store_true", help="sizes have to be the same, and what is stored as zeroes or not at all"
    )
    parser.add_argument("-p", dest="progress", action="store_true", help="show progress, if standard error is a terminal")
    parser.add_argument("-q", dest="quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("-U", "--force-share", action="store_true", help="accepted for qemu-img's sake: images are never locked")
    add_opening(parser)
    parser.set_defaults(run=run, failure=2)


def run(arguments: argparse.Namespace) -> int:
    from fastqcow.comparison import compare

    def say(text: str) -> None:
        if not arguments.quiet:
            print(text)

    options = {**opening(arguments), "whole_sectors": True}
    with (
        open_disk(arguments.first, arguments.first_format, **options) as first,
        open_disk(arguments.second, arguments.second_format, **options) as second,
        bar(arguments.progress) as report,
    ):
        if first.size != second.size and not arguments.strict:
            say("Warning: Image size mismatch!")
        found = compare(first, second, strict=arguments.strict, progress=report)
    if found is None:
        say("Images are identical.")
        return 0
    say(
        {
            "size": "Strict mode: Image size mismatch!",
            "status": f"Strict mode: Offset {found.guest_off} block status mismatch!",
            "content": f"Content mismatch at offset {found.guest_off}!",
        }[found.kind]
    )
    return 1
