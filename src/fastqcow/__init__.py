"""fastqcow: read qcow2 disk images, above all compressed ones, fast and right.

>>> import fastqcow
>>> with fastqcow.open("disk.qcow2") as image:
...     boot_sector = image.pread(512, 0)
"""

from fastqcow.bitmaps import BitmapEntry, Range
from fastqcow.checking import CheckResult, Finding, check
from fastqcow.clusters import Engines, Kind, L2Table, build_info, inflate, inflate_into, parse_l2
from fastqcow.comparison import Difference, checksum, compare
from fastqcow.conversion import Conversion, convert
from fastqcow.describe import info
from fastqcow.errors import CorruptWarning, Error, FormatError, PasswordError, PolicyError, UnsupportedError
from fastqcow.header import Header
from fastqcow.image import Extent, Image, Snapshot, open, open_raw  # noqa: A004 - that is its name: fastqcow.open
from fastqcow.snapshots import SnapshotEntry

__version__ = "0.1.0"

__all__ = [
    "BitmapEntry",
    "CheckResult",
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
    "Range",
    "Snapshot",
    "SnapshotEntry",
    "UnsupportedError",
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
