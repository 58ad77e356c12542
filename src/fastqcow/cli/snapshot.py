"""`fastqcow snapshot`: the internal snapshots of an image."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import Commands, add_image, add_output, snapshot_lines
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
        import json

        print(json.dumps(found, indent=4))
    elif found:
        print("\n".join(snapshot_lines(found)))
    return 0
