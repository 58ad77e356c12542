"""`fastqcow info`: what an image is, from its header alone."""

from __future__ import annotations

import argparse
from typing import Any

from fastqcow.cli.common import Commands, add_image, add_output, size_text, snapshot_lines
from fastqcow.describe import info
from fastqcow.errors import printable

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="say what an image is",
        description="Say what an image is: its size, format, features and backing file. Its contents are not read.",
        epilog="example: fastqcow info --output=json disk.qcow2",
    )
    add_image(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    found = info(arguments.image)
    if arguments.output == "json":
        import json

        print(json.dumps(found, indent=4))
    else:
        print(human(found))
    return 0


def human(found: dict[str, Any]) -> str:
    lines = [
        f"image: {found['filename']}",
        f"file format: {found['format']}",
        f"virtual size: {size_text(found['virtual-size'])} ({found['virtual-size']} bytes)",
        f"disk size: {size_text(found['actual-size'])}",
    ]
    if found.get("encrypted"):
        lines.append("encrypted: yes")
    lines.append(f"cluster_size: {found['cluster-size']}")
    if found["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in found:
        full = found["full-backing-filename"]
        actual = f" (actual path: {full})" if full != found["backing-filename"] else ""
        lines.append(f"backing file: {found['backing-filename']}{actual}")
    if "backing-filename-format" in found:
        lines.append(f"backing file format: {found['backing-filename-format']}")
    if "snapshots" in found:
        lines += snapshot_lines(found["snapshots"])
    lines.append("Format specific information:")
    for name, value in found["format-specific"]["data"].items():
        lines.append(f"    {name.replace('-', ' ')}: {str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(printable(line) for line in lines)
