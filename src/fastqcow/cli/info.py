"""`fastqcow info`: what an image is, and whether it can be read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from fastqcow.cli.common import Commands, add_image, add_opening, add_output, opening, print_json, size_text, snapshot_lines
from fastqcow.describe import chain_info, info
from fastqcow.errors import printable

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="say what an image is",
        description="Say what an image is: its size, format, features and backing file, and if it can be read; not what is in it.",
        epilog="example: fastqcow info --output=json disk.qcow2",
    )
    add_image(parser)
    parser.add_argument("--backing-chain", action="store_true", help="and its backing files, and theirs")
    add_opening(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    options = opening(arguments)
    chain = chain_info(arguments.image, options["backing"]) if arguments.backing_chain else [info(arguments.image, **options)]
    before = ""
    if arguments.output == "human":
        for found in chain:
            print(before, end="")
            for line in human(found):
                print(printable(line))
            before = "\n"
        return 0
    if not arguments.backing_chain:
        print_json(next(iter(chain)))
        print()
        return 0
    for found in chain:
        print(before or "[", end="\n    ")
        print_json(found, "    ")
        before = ","
    print("\n]")
    return 0


def human(found: dict[str, Any]) -> Iterator[str]:
    yield f"image: {found['filename']}"
    yield f"file format: {found['format']}"
    yield f"virtual size: {size_text(found['virtual-size'])} ({found['virtual-size']} bytes)"
    yield f"disk size: {size_text(found['actual-size'])}"
    if found.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in found:
        yield f"cluster_size: {found['cluster-size']}"
    if found["dirty-flag"]:
        yield "cleanly shut down: no"
    if "backing-filename" in found:
        full = found["full-backing-filename"]
        actual = f" (actual path: {full})" if full != found["backing-filename"] else ""
        yield f"backing file: {found['backing-filename']}{actual}"
    if "backing-filename-format" in found:
        yield f"backing file format: {found['backing-filename-format']}"
    if "snapshots" in found:
        yield from snapshot_lines(found["snapshots"])
    if "format-specific" in found:
        yield "Format specific information:"
        yield from value_lines(found["format-specific"]["data"], "    ")
    for each in found.get("unknown-extensions", ()):
        yield f"unknown header extension: {each['magic']} ({each['length']} bytes)"
    if "unreadable" in found:
        yield f"cannot be read: {found['unreadable']}"


def value_lines(values: dict[str, Any] | list[Any], indent: str) -> Iterator[str]:
    """A tree of values as qemu-img prints it."""
    named = values.items() if isinstance(values, dict) else ((f"[{i}]", value) for i, value in enumerate(values))
    for name, value in named:
        text = str(value).lower() if isinstance(value, bool) else value
        if isinstance(value, (dict, list)):
            yield f"{indent}{name.replace('-', ' ')}:"
            yield from value_lines(value, indent + "    ")
        else:
            yield f"{indent}{name.replace('-', ' ')}: {text}"
