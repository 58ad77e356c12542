"""fastqcow: read qcow2 disk images, above all compressed ones, fast and right.

>>> import fastqcow
>>> with fastqcow.open("disk.qcow2") as image:
...     boot_sector = image.pread(512, 0)
"""

import importlib
from typing import TYPE_CHECKING

from fastqcow.bitmaps import BitmapEntry, Range
from fastqcow.describe import info
from fastqcow.errors import (
    CheckWarning,
    CorruptWarning,
    Error,
    FormatError,
    PasswordError,
    PolicyError,
    UnsupportedError,
    VerifyError,
)
from fastqcow.header import Header
from fastqcow.image import Extent, Image, Snapshot, open, open_raw  # noqa: A004 - that is its name: fastqcow.open
from fastqcow.snapshots import SnapshotEntry

if TYPE_CHECKING:
    from fastqcow.checking import CheckResult, Finding, check
    from fastqcow.clusters import Engines, Kind, L2Table, build_info, inflate, inflate_into, parse_l2
    from fastqcow.comparison import Difference, checksum, compare
    from fastqcow.conversion import Conversion, convert
    from fastqcow.creation import Qcow2Options, RawStream

__version__ = "0.1.0"

__all__ = [
    "BitmapEntry",
    "CheckResult",
    "CheckWarning",
    "Conversion",
    "CorruptWarning",
    "Difference",
    "Engines",
    "Error",
    "Extent",
    "Finding",
    "FormatError",
    "Header",
    "Image",
    "Kind",
    "L2Table",
    "PasswordError",
    "PolicyError",
    "Qcow2Options",
    "Range",
    "RawStream",
    "Snapshot",
    "SnapshotEntry",
    "UnsupportedError",
    "VerifyError",
    "build_info",
    "check",
    "checksum",
    "compare",
    "convert",
    "inflate",
    "inflate_into",
    "info",
    "open",
    "open_raw",
    "parse_l2",
]

# What opening and reading an image does not need is imported when it is asked for: that is a third of the time.
_LATER = {
    "checking": ("CheckResult", "Finding", "check"),
    "clusters": ("Engines", "Kind", "L2Table", "build_info", "inflate", "inflate_into", "parse_l2"),
    "comparison": ("Difference", "checksum", "compare"),
    "conversion": ("Conversion", "convert"),
    "creation": ("Qcow2Options", "RawStream"),
}


if not TYPE_CHECKING:  # or every name would be one of ours for a type checker

    def __getattr__(name: str) -> object:
        if name in _LATER:
            return importlib.import_module(f"fastqcow.{name}")
        for module, names in _LATER.items():
            if name in names:
                found: object = getattr(importlib.import_module(f"fastqcow.{module}"), name)
                globals()[name] = found
                return found
        raise AttributeError(f"module 'fastqcow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
