"""`fastqcow checksum`: the digest of an image's contents."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import FORMATS, Commands, add_image, add_opening, add_output, at_snapshot, bar, open_disk, opening
from fastqcow.errors import printable

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "checksum",
        help="print the SHA-256 of an image's contents",
        description="Print the digest of an image's contents, as sha256sum prints that of the raw file which it would convert to; "
        "or as blksum prints it, which takes less time where there are zeroes.",
        epilog="example: fastqcow checksum disk.qcow2",
    )
    add_image(parser, FORMATS)
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="an internal snapshot, by id or name, in place of the disk")
    parser.add_argument("-a", "--algorithm", default="sha256", help="another digest that Python's hashlib knows")
    parser.add_argument("--blkhash", action="store_true", help="the digest that blksum prints, of digests of 64 KiB blocks")
    parser.add_argument("-p", dest="progress", action="store_true", help="show progress, if standard error is a terminal")
    add_opening(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastqcow.comparison import checksum

    # blksum reads through QEMU, for which a raw file ends with its last sector; sha256sum does not.
    options = {**opening(arguments), "whole_sectors": arguments.blkhash}
    with open_disk(arguments.image, arguments.source_format, **options) as image, bar(arguments.progress) as report:
        disk = at_snapshot(image, arguments.snapshot)
        digest, size = checksum(disk, arguments.algorithm, blkhash=arguments.blkhash, progress=report), disk.size
    if arguments.output == "json":
        import json

        found = {"filename": arguments.image, "virtual-size": size, "algorithm": arguments.algorithm, "blkhash": arguments.blkhash}
        print(json.dumps({**found, "digest": digest}, indent=4))
    else:
        print(f"{digest}  {printable(arguments.image)}")
    return 0
