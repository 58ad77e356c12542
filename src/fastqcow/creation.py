"""New qcow2 images: what they can be asked to be, and their headers. Clusters and tables are the core's.

The names of the options are those of `qemu-img convert -o`, and so are their defaults.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from fastqcow import _reader, header
from fastqcow.image import open as open_image
from fastqcow.image import open_raw
from fastqcow.source import scheme_of

if TYPE_CHECKING:
    from fastqcow._write import Written
    from fastqcow.diskfile import DiskFile

__all__ = ["Plan", "Qcow2Options", "RawStream", "check_header", "header_of", "make_plan", "open_backing_of"]

_LEVELS = {"zlib": (6, range(1, 10)), "zstd": (3, range(1, 20))}
_COMPAT = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_ISAL_LEVEL = 1
# What QEMU calls the features; a reader that does not know one can name it.
_FEATURES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)


class Qcow2Options(TypedDict, total=False):
    """What a new image can be asked to be.

    Attributes:
        cluster_size: bytes, a power of two from 512 to 2 MiB; 64 KiB by default.
        compat: "1.1" for version 3 of the format (the default), "0.10" for version 2.
        compression_type: "zlib" (the default) or "zstd", which is of version 3.
        compression_level: 1 to 9 for zlib (6), 1 to 19 for zstd (3); or "fast": by ISA-L for zlib, if that is built in, and 1 for
            zstd.
        refcount_bits: 1, 2, 4, ... 64; 16 by default.
        extended_l2: entries with 32 subclusters; for clusters of 16 KiB and more, in version 3.
        backing_file: its name, as it is to stand in the image: a path that counts from the image's directory. What does not
            differ from it is not written.
        backing_format: "qcow2" or "raw"; is never guessed.
    """

    cluster_size: int
    compat: str
    compression_type: str
    compression_level: int | Literal["fast"]
    refcount_bits: int
    extended_l2: bool
    backing_file: str
    backing_format: str


class Plan(NamedTuple):
    """A new image, with nothing left to check."""

    version: int
    cluster_bits: int
    extended_l2: bool
    refcount_order: int
    compression_type: str
    encoder: object
    level: int
    backing_file: str | None
    backing_format: str | None

    @property
    def size_max(self) -> int:
        """Bytes of the largest disk that an L1 table of 32 MiB can map."""
        return header.L1_NBYTES_MAX // 8 << 2 * self.cluster_bits - (4 if self.extended_l2 else 3)


class RawStream:
    """The bytes of a raw disk as they come from a pipe, once and in order: a source for `convert` to qcow2.

    Args:
        file: an open binary file with a descriptor, which stays the caller's; what was read from it before is not part of the disk.
    """

    def __init__(self, file: object) -> None:
        self.fd: int = file.fileno()  # type: ignore[attr-defined]
        self.file = file
        self.name = str(getattr(file, "name", self.fd))


def make_plan(options: Qcow2Options, *, compress: bool) -> Plan:
    """Check and fill in the options.

    Raises:
        ValueError: an option that there is not, or a value that makes no sense, by its name.
    """
    for name in options:
        if name not in Qcow2Options.__annotations__:
            raise ValueError(f"the option {name!r} is not supported; for qcow2 there are {', '.join(Qcow2Options.__annotations__)}")
    cluster_size = options.get("cluster_size", 65536)
    if cluster_size not in [1 << bits for bits in range(9, 22)]:
        raise ValueError(f"cluster_size is {cluster_size}; it can be a power of two from 512 to 2097152")
    compat = options.get("compat", "1.1")
    if compat not in _COMPAT:
        raise ValueError(f"compat is {compat!r}; it can be '0.10' or '1.1'")
    method = options.get("compression_type", "zlib")
    if method not in _LEVELS:
        raise ValueError(f"compression_type is {method!r}; it can be 'zlib' or 'zstd'")
    refcount_bits = options.get("refcount_bits", 16)
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"refcount_bits is {refcount_bits}; it can be a power of two from 1 to 64")
    extended_l2 = options.get("extended_l2", False)
    if extended_l2 and cluster_size < 16384:
        raise ValueError(f"extended_l2 needs clusters of 16384 bytes and more, and cluster_size is {cluster_size}")
    if _COMPAT[compat] == 2:
        for name, wanted in (
            ("compression_type=zstd", method == "zstd"),
            ("extended_l2", extended_l2),
            ("refcount_bits", refcount_bits != 16),
        ):
            if wanted:
                raise ValueError(f"{name} needs compat='1.1'")
    backing_file, backing_format = options.get("backing_file"), options.get("backing_format")
    if (backing_file is None) != (backing_format is None):
        raise ValueError("backing_file and backing_format go together: a format is never guessed")
    if backing_format not in (None, "qcow2", "raw"):
        raise ValueError(f"backing_format is {backing_format!r}; it can be 'qcow2' or 'raw'")
    encoder, level = _encoder(method, options.get("compression_level"))
    return Plan(
        version=_COMPAT[compat],
        cluster_bits=cluster_size.bit_length() - 1,
        extended_l2=extended_l2,
        refcount_order=refcount_bits.bit_length() - 1,
        compression_type=method,
        encoder=encoder if compress else None,
        level=level if compress else 0,
        backing_file=backing_file,
        backing_format=backing_format,
    )


def _encoder(method: str, level: int | Literal["fast"] | None) -> tuple[object, int]:
    usual, levels = _LEVELS[method]
    if level == "fast" and method == "zlib":
        try:
            from fastqcow import _isal
        except ModuleNotFoundError:
            raise ValueError(
                "compression_level is 'fast', which for zlib needs ISA-L, and this build of fastqcow is without it"
            ) from None
        return _isal.ENCODER, _ISAL_LEVEL
    level = usual if level is None else 1 if level == "fast" else level
    if level not in levels:
        raise ValueError(f"compression_level is {level}; for {method} it can be {levels[0]} to {levels[-1]}, or 'fast'")
    return _reader.ZSTD if method == "zstd" else _reader.LIBZ, level


def open_backing_of(target: str, plan: Plan, threads: int) -> DiskFile:
    """Open the backing file of an image that is to be at `target`.

    Raises:
        ValueError: its name is not a plain path.
        Error, OSError: as `fastqcow.open`.
    """
    assert plan.backing_file is not None
    if scheme_of(plan.backing_file) or not plan.backing_file:
        raise ValueError(f"backing_file is {plan.backing_file!r}; it has to be a plain path")
    path = os.path.join(os.path.dirname(target), plan.backing_file)
    return (
        open_image(path, threads=threads) if plan.backing_format == "qcow2" else open_raw(path, whole_sectors=True, threads=threads)
    )


def header_of(plan: Plan, written: Written) -> bytes:
    """The header with its extensions and the backing file's name, as it stands at the start of the file."""
    zstd = plan.compression_type == "zstd"
    incompatible = (header.COMPRESSION_TYPE if zstd else 0) | (header.EXTENDED_L2 if plan.extended_l2 else 0)
    extensions, name = _extensions(plan), os.fsencode(plan.backing_file or "")
    nbytes = header.V2_NBYTES if plan.version == 2 else header.V3_NBYTES_MIN + 8
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        header.MAGIC,
        plan.version,
        nbytes + len(extensions) if name else 0,
        len(name),
        plan.cluster_bits,
        written["size"],
        0,
        written["l1_entries"],
        written["l1_off"],
        written["refcount_table_off"],
        written["refcount_table_clusters"],
        0,
        0,
    )
    if plan.version == 3:
        head += struct.pack(">QQQIIB7x", incompatible, 0, 0, plan.refcount_order, nbytes, int(zstd))
    return head + extensions + name


def check_header(plan: Plan) -> None:
    """Whether the header has room in its cluster.

    Raises:
        ValueError: the backing file's name is too long for it, or for the format.
    """
    name = os.fsencode(plan.backing_file or "")
    room = (1 << plan.cluster_bits) - (header.V3_NBYTES_MIN + 8) - len(_extensions(plan))
    longest = min(header.BACKING_NAME_NBYTES_MAX, room)
    if len(name) > longest:
        raise ValueError(f"backing_file has a name of {len(name)} bytes; with these clusters there is room for {longest}")


def _extensions(plan: Plan) -> bytes:
    """The table of feature names is left out where clusters are too small for all that may come."""
    found = b""
    if plan.backing_format is not None:
        found += _extension(header.EXT_BACKING_FORMAT, plan.backing_format.encode())
    if plan.version == 3 and plan.cluster_bits >= 12:
        rows = b"".join(struct.pack(">BB46s", kind, bit, name) for kind, bit, name in _FEATURES)
        found += _extension(header.EXT_FEATURE_NAMES, rows)
    return found + _extension(header.EXT_END, b"")


def _extension(magic: int, data: bytes) -> bytes:
    return struct.pack(">II", magic, len(data)) + data.ljust(len(data) + 7 & ~7, b"\0")
