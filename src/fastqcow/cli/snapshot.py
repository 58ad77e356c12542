"""`fastqcow snapshot`: the internal snapshots of an image."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import Commands, add_image, add_output, print_json, snapshot_lines
from fastqcow.describe import snapshots_info

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "snapshot",
        help="list the internal snapshots of an image",
        description="List the internal snapshots of an image. One is read by 'fastqcow convert -l NAME'.",
        epilog="example: fastqcow snapshot -l disk.qcow2",
    )
    parser.add_argument("-l", dest="list", action="store_true", help="list them, which is all that is done to snapshots here")
    add_image(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    found = snapshots_info(arguments.image)
    if arguments.output == "json":
        print_json(found)
        print()
    elif found:
        for line in snapshot_lines(found):
            print(line)
    return 0
