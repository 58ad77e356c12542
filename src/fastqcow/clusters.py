"""The two hot functions on their own, for other readers to call: parse a table, inflate a cluster."""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastqcow import _inflate, _l2

if TYPE_CHECKING:
    from fastqcow._types import Readable, Writable

__all__ = ["Engines", "Kind", "L2Table", "build_info", "inflate", "inflate_into", "parse_l2"]

_METHODS = {"zlib": _inflate.DEFLATE, "zstd": _inflate.ZSTD}


class Engines(NamedTuple):
    """The compression libraries that this build uses, by version; None: not built in. isal is ISA-L."""

    libdeflate: str | None
    libz: str
    libzstd: str
    isal: str | None

    @property
    def deflate(self) -> Literal["libdeflate", "libz"]:
        """The engine that inflates deflate clusters unless told otherwise."""
        return "libdeflate" if self.libdeflate else "libz"


def build_info() -> Engines:
    """The engines in use."""
    try:
        from fastqcow import _isal
    except ModuleNotFoundError:
        isal = None
    else:
        isal = _isal.version()
    versions = _inflate.versions()
    return Engines(versions["libdeflate"], versions["libz"] or "", versions["libzstd"] or "", isal)


def _method(method: str, engine: str | None) -> int:
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it can be 'zlib' or 'zstd'")
    if engine not in (None, "libdeflate", "libz"):
        raise ValueError(f"engine is {engine!r}; it can be 'libdeflate' or 'libz'")
    return _inflate.DEFLATE_LIBZ if method == "zlib" and engine == "libz" else _METHODS[method]


def inflate(
    data: Readable,
    cluster_size: int,
    method: Literal["zlib", "zstd"] = "zlib",
    *,
    engine: Literal["libdeflate", "libz"] | None = None,
) -> bytes:
    """Inflate one compressed cluster, without the GIL.

    Args:
        data: the sectors that the cluster's descriptor names; anything may follow the stream's end.
        cluster_size: bytes that the cluster has inflated.
        method: the image's compression type; "zlib" is raw deflate.
        engine: "libz" to use the reference in place of libdeflate.

    Raises:
        FormatError: the data is no valid stream, or inflates to less than a cluster (zstd: or to more).
    """
    return _inflate.inflate(data, cluster_size, _method(method, engine))


def inflate_into(
    data: Readable,
    out: Writable,
    method: Literal["zlib", "zstd"] = "zlib",
    *,
    engine: Literal["libdeflate", "libz"] | None = None,
) -> int:
    """As `inflate`, into a writable buffer of one cluster. Returns its length. After an error its contents are undefined."""
    return _inflate.inflate_into(data, out, _method(method, engine))


class Kind(IntEnum):
    """What an L2 entry, or a subcluster of it, stands for. The two with ALLOC have a place in the file which is not read."""

    UNALLOCATED = _l2.UNALLOCATED
    UNALLOCATED_ALLOC = _l2.UNALLOCATED_ALLOC
    ZERO = _l2.ZERO
    ZERO_ALLOC = _l2.ZERO_ALLOC
    DATA = _l2.DATA
    COMPRESSED = _l2.COMPRESSED
    INVALID = _l2.INVALID


class L2Table(NamedTuple):
    """The columns of an L2 table: element i is of cluster i, or with extended entries of subcluster i.

    Attributes:
        kind: of `Kind`; from Kind.INVALID on, which number it is says what is wrong (see `why_invalid`).
        host_off: of the cluster that holds it, or of the compressed stream; 0 where there is none.
        in_nbytes: of a compressed stream, up to the end of its last sector; else 0.
    """

    kind: array[int]
    host_off: array[int]
    in_nbytes: array[int]

    @staticmethod
    def why_invalid(kind: int) -> str:
        """The reason why an entry is invalid, as a sentence."""
        return _l2.sentence(kind)


def parse_l2(table: Readable, *, cluster_bits: int, extended: bool = False, version: int = 3) -> L2Table:
    """Decode an L2 table, or a part of one, as it stands in the file; without the GIL.

    Args:
        table: bytes; 8 for each entry, 16 if extended.
        cluster_bits: 9 to 21 (14 to 21 if extended).
        extended: the image has extended L2 entries.
        version: of the image's header; version 2 has no zero flag.

    Raises:
        ValueError: an argument out of its range. Invalid entries raise nothing; their kind says so.
    """
    return L2Table(*_l2.parse(table, cluster_bits, extended, version))
