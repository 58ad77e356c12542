"""From an image's file to a reader of all its layers: which files may be opened, and how deep.

A file that an image names is opened only by a rule (`backing=`), since whoever wrote the image chose the name. Safe by
default: inside the image's own directory, or below it, links followed. A name with a protocol (`json:`, `nbd:`, ...) is never
opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastqcow import _inflate, header
from fastqcow._reader import Reader, Source
from fastqcow.errors import FormatError, PolicyError, UnsupportedError
from fastqcow.header import Header
from fastqcow.source import open_path, open_source

if TYPE_CHECKING:
    from fastqcow._types import BinaryFile, Path

__all__ = ["Layer", "Options", "open_chain"]

DEPTH_MAX = 200
L1_NBYTES_MAX = 256 << 20  # of all layers together; each may have 32 MiB
TABLE_CACHE_NBYTES = 8 << 20
if TYPE_CHECKING:
    BackingRule: TypeAlias = Literal[False] | Path | BinaryFile | None

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Options:
    """How to open an image; see `fastqcow.open`."""

    backing: BackingRule
    threads: int
    cache_size: int
    engine: Literal["libdeflate", "libz"]

    def codec(self, compression_type: str) -> int:
        if compression_type == "zstd":
            return _inflate.ZSTD
        return _inflate.DEFLATE if self.engine == "libdeflate" else _inflate.DEFLATE_LIBZ


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a chain; header is None for a raw file."""

    reader: Reader
    header: Header | None
    backing: Layer | None


def open_chain(source: Path | BinaryFile, options: Options) -> Layer:
    """Open an image and every file below it.

    Raises:
        FormatError, UnsupportedError: of any layer.
        PolicyError: a layer names a file that the rule does not allow.
        OSError: a layer's file cannot be opened or read.
    """
    files: list[tuple[Source, Header | None]] = []
    seen: set[object] = set()
    opened: Source | None = open_source(source)
    fmt: str | None = "qcow2"
    rule = options.backing
    while opened is not None:
        identity = opened.identity()
        if identity in seen:
            raise FormatError("the backing chain comes back to this file", path=opened.path)
        if len(seen) == DEPTH_MAX:
            raise FormatError(f"the backing chain is deeper than {DEPTH_MAX} files", path=opened.path)
        seen.add(identity)
        head = _read_header(opened, fmt)
        files.append((opened, head))
        opened, rule = _open_backing(opened, head, rule)
        fmt = head.backing_format if head else None
    headers = [head for _, head in files if head]
    if sum(head.l1_entries * 8 for head in headers) > L1_NBYTES_MAX:
        raise FormatError(f"the L1 tables of the backing chain are larger than {L1_NBYTES_MAX >> 20} MiB", path=files[0][0].path)
    sizes = {
        "threads": options.threads,
        "largest_cluster": max(head.cluster_size for head in headers),
        "cluster_cache_nbytes": options.cache_size,
        "table_cache_nbytes": TABLE_CACHE_NBYTES,
    }
    layer = None
    for opened, head in reversed(files):
        layer = _open_layer(opened, head, layer, options, sizes)
    assert layer is not None
    return layer


def _read_header(source: Source, fmt: str | None) -> Header | None:
    """The header of a layer that is said to be of a format; None if that is raw."""
    if fmt == "raw":
        return None
    if fmt is None and source.pread(4, 0) != header.MAGIC:
        raise FormatError(
            "the image above does not say what format this backing file has, and it is not qcow2; its format is not guessed",
            path=source.path,
        )
    if fmt not in (None, "qcow2"):
        raise UnsupportedError(f"the format {fmt!r} of this backing file is not supported; raw and qcow2 are", path=source.path)
    head = Header.read(source.pread, source.path)
    if head.encrypted:
        raise UnsupportedError("encrypted images are not supported yet", path=source.path)
    if head.has_data_file:
        raise UnsupportedError("images with an external data file are not supported yet", path=source.path)
    return head


def _open_layer(source: Source, head: Header | None, below: Layer | None, options: Options, sizes: dict[str, int]) -> Layer:
    if head is None:
        return Layer(Reader.raw(source, **sizes), None, None)
    reader = Reader.qcow2(
        source,
        below.reader if below else None,
        version=head.version,
        cluster_bits=head.cluster_bits,
        extended_l2=head.extended_l2,
        codec=options.codec(head.compression_type),
        size=head.disk_size,
        l1_off=head.l1_off,
        l1_entries=head.l1_entries,
        **sizes,
    )
    return Layer(reader, head, below)


def _open_backing(source: Source, head: Header | None, rule: BackingRule) -> tuple[Source | None, BackingRule]:
    """The backing file, and the rule for the one below it."""
    if head is None or head.backing_name is None or rule is False:
        return None, rule
    if rule is None or rule == "follow":
        path = backing_path(source, head.backing_name)
        return open_path(path, _inside(source, path) if rule is None else path), rule
    # The caller's file stands for this image's backing file; what that one names is under the safe rule again.
    return open_source(rule), None


def backing_path(image: Source, name: str) -> str:
    """The path that an image's backing file name stands for: relative names count from the image's directory.

    Raises:
        PolicyError: the name is not a path, or is relative to a directory that is not known.
    """
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif _PROTOCOL.match(name):
        raise PolicyError(
            f"the backing file {name!r} is not a plain path, and is not opened; give the file with backing=", path=image.path
        )
    if not image.has_path and not os.path.isabs(name):
        raise PolicyError(
            f"the backing file {name!r} lies beside the image, which was opened from a file object without a path; "
            "give the file with backing=",
            path=image.path,
        )
    return os.path.join(os.path.dirname(image.path), name) if image.has_path else name


def _inside(image: Source, path: str) -> str:
    """The path without links, if it lies in the image's directory or below: that is what is checked, and what is opened."""
    directory, real = os.path.dirname(os.path.realpath(image.path)), os.path.realpath(path)
    if not image.has_path or os.path.commonpath((directory, real)) != directory:
        raise PolicyError(
            f"the backing file {path!r} lies outside of the image's directory, and is not opened; "
            "allow it with backing='follow', or give the file with backing=",
            path=image.path,
        )
    return real
