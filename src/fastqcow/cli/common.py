"""What several commands share: arguments, and numbers as qemu-img writes them."""

from __future__ import annotations

import argparse
from typing import Any, Literal

__all__ = ["Commands", "add_image", "add_output", "size_argument", "size_text"]

Commands = Any  # argparse keeps the type of add_subparsers() to itself

_UNITS = "BKMGTPE"


def add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the qcow2 image")
    parser.add_argument(
        "-f", dest="source_format", metavar="FMT", choices=["qcow2"], default="qcow2", help="format of the image: qcow2"
    )
    parser.add_argument("-U", "--force-share", action="store_true", help="accepted for qemu-img's sake: images are never locked")


def add_backing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backing",
        metavar="PATH",
        help="the backing file to use in place of the one that the image names; 'follow' to open that one wherever it lies, "
        "'none' to do without. By default it is opened if it lies in the image's directory or below",
    )
    parser.add_argument("--data-file", metavar="PATH", help="the same for an external data file")


def backing_of(arguments: argparse.Namespace) -> str | Literal[False] | None:
    given: str | None = arguments.backing
    return False if given == "none" else given


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=["human", "json"], default="human", help="for people (the default), or JSON")


def size_argument(text: str) -> int:
    """A size with qemu-img's suffixes: 4096, 4k, 64K, 1M, ..."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "B")
    if not digits.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or a number with k, M, G, T, P or E")
    nbytes = int(digits) << 10 * _UNITS.index(unit)
    if nbytes >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any file can have")
    return nbytes


def size_text(nbytes: int) -> str:
    """As qemu-img: three significant digits and a binary unit."""
    power = min(max(nbytes.bit_length() - 1, 0) // 10, 6)
    if nbytes / (1 << 10 * power) >= 999.5 and power < 6:
        power += 1
    return f"{nbytes / (1 << 10 * power):0.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"
