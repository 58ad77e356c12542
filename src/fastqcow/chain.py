"""From an image's file to a reader of all its layers: which files may be opened, and how deep.

A file that an image names is opened only by a rule (`backing=`), since whoever wrote the image chose the name. Safe by
default: inside the image's own directory, or below it, links followed. A name with a protocol (`json:`, `nbd:`, ...) is never
opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fastqcow import _inflate, header
from fastqcow._reader import Reader, Source
from fastqcow.errors import FormatError, PolicyError, UnsupportedError
from fastqcow.header import Header
from fastqcow.source import open_source

if TYPE_CHECKING:
    from fastqcow._types import BinaryFile, Path

__all__ = ["Layer", "Options", "open_chain"]

DEPTH_MAX = 200
TABLE_CACHE_NBYTES = 8 << 20
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Options:
    """How to open an image; see `fastqcow.open`."""

    backing: Literal[False] | Path | BinaryFile | None
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
    return _open_layer(open_source(source), "qcow2", options, ())


def _identity(source: Source) -> object:
    """What tells that two layers are the same file."""
    try:
        st = os.stat(source.path)
    except (OSError, ValueError):
        return source
    return st.st_dev, st.st_ino


def _open_layer(source: Source, fmt: str | None, options: Options, above: tuple[object, ...]) -> Layer:
    """`above` holds the identities of the layers that led here."""
    identity = _identity(source)
    if identity in above:
        raise FormatError("the backing chain comes back to this file", path=source.path)
    if len(above) >= DEPTH_MAX:
        raise FormatError(f"the backing chain is deeper than {DEPTH_MAX} files", path=source.path)
    sizes = {"threads": options.threads, "cluster_cache_nbytes": options.cache_size, "table_cache_nbytes": TABLE_CACHE_NBYTES}
    if fmt == "raw":
        return Layer(Reader.raw(source, **sizes), None, None)
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
    below = _open_backing(source, head, options, (*above, identity))
    reader = Reader.qcow2(
        source,
        below.reader if below else None,
        version=head.version,
        cluster_bits=head.cluster_bits,
        extended_l2=head.extended_l2,
        codec=options.codec(head.compression_type),
        size=head.size,
        l1_off=head.l1_off,
        l1_entries=head.l1_entries,
        **sizes,
    )
    return Layer(reader, head, below)


def _open_backing(source: Source, head: Header, options: Options, above: tuple[object, ...]) -> Layer | None:
    rule = options.backing
    if head.backing_name is None or rule is False:
        return None
    if rule is None or rule == "follow":
        path = backing_path(source.path, head.backing_name)
        if rule is None:
            _refuse_outside(source.path, path)
        return _open_layer(open_source(path), head.backing_format, options, above)
    # The caller's file stands for this image's backing file; what that one names is under the safe rule again.
    return _open_layer(open_source(rule), head.backing_format, replace(options, backing=None), above)


def backing_path(image: str, name: str) -> str:
    """The path that an image's backing file name stands for: relative names count from the image's directory.

    Raises:
        PolicyError: the name is not a path.
    """
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif _PROTOCOL.match(name):
        raise PolicyError(
            f"the backing file {name!r} is not a plain path, and is not opened; give the file with backing=", path=image
        )
    return os.path.join(os.path.dirname(image), name)


def _refuse_outside(image: str, path: str) -> None:
    directory = os.path.dirname(os.path.realpath(image))
    if os.path.commonpath((directory, os.path.realpath(path))) != directory:
        raise PolicyError(
            f"the backing file {path!r} lies outside of the image's directory, and is not opened; "
            "allow it with backing='follow', or give the file with backing=",
            path=image,
        )
