"""From an image's file to a reader of all its layers.

The chain is walked down first, opening files and reading headers, and then built up from its end: a reader needs the one below it.
What files are opened on the way is up to policy.py.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastqcow import _inflate, header
from fastqcow._reader import Crypt, Reader, Source
from fastqcow.cpus import available_cpus
from fastqcow.errors import CorruptWarning, FormatError, UnsupportedError, printable
from fastqcow.header import Header
from fastqcow.policy import check_data_file, open_backing, open_data_file
from fastqcow.source import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastqcow._types import BinaryFile, Path
    from fastqcow.crypt import Password
    from fastqcow.policy import Rule

__all__ = ["Layer", "Options", "is_encrypted", "layers", "make_options", "open_chain", "open_over", "open_view", "reopened", "walk"]

DEPTH_MAX = 200
L1_NBYTES_MAX = 256 << 20  # of all layers together; each may have 32 MiB
TABLE_CACHE_NBYTES = 8 << 20
TABLE_SLICE_NBYTES = 64 << 10  # as the core reads them
CACHE_SIZE = 32 << 20


class Options(NamedTuple):
    """How to open an image; see `fastqcow.open`."""

    backing: Rule
    data_file: Rule
    password: Password
    threads: int
    cache_size: int
    engine: Literal["libdeflate", "libz"]

    def __repr__(self) -> str:
        """Without the password: it would be told by every traceback that shows variables."""
        return f"<Options threads={self.threads} cache_size={self.cache_size} engine={self.engine!r}>"

    def sizes(self, largest_cluster: int, layers: int) -> dict[str, int]:
        """What every reader of a chain is given. A look-up may go through the tables of all layers: they are not to push out each
        other, or each would be read for every cluster."""
        return {
            "threads": self.threads,
            "largest_cluster": largest_cluster,
            "cluster_cache_nbytes": self.cache_size,
            "table_cache_nbytes": max(TABLE_CACHE_NBYTES, 2 * layers * TABLE_SLICE_NBYTES),
        }

    def codec(self, compression_type: str) -> int:
        if compression_type == "zstd":
            return _inflate.ZSTD
        return _inflate.DEFLATE if self.engine == "libdeflate" else _inflate.DEFLATE_LIBZ


def make_options(
    backing: Rule = None,
    data_file: Rule = None,
    password: Password = None,
    threads: int | None = None,
    cache_size: int | None = None,
    engine: str | None = None,
) -> Options:
    """Check and fill in the options of `open`."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least one is needed")
    if cache_size is not None and not 0 <= cache_size <= sys.maxsize:
        raise ValueError(f"cache_size is {cache_size}; it is a number of bytes")
    engine = engine or os.environ.get("FASTQCOW_ENGINE") or "libdeflate"
    if engine not in ("libdeflate", "libz"):
        raise ValueError(f"engine is {engine!r}; it can be 'libdeflate' or 'libz'")
    return Options(
        backing=backing,
        data_file=data_file,
        password=password,
        threads=min(threads or available_cpus(), 256),
        cache_size=CACHE_SIZE if cache_size is None else cache_size,
        engine="libz" if engine == "libz" else "libdeflate",
    )


class Layer(NamedTuple):
    """One file of a chain, with its external data file if it has one; header is None for a raw file."""

    reader: Reader
    header: Header | None
    data: Source | None
    crypt: Crypt | None
    backing: Layer | None


def open_chain(source: Path | BinaryFile, options: Options, *, warn: bool = True) -> Layer:
    """Open an image and every file below it. `warn` of images that are marked as corrupt.

    Raises:
        FormatError, UnsupportedError: of any layer.
        PolicyError: a layer names a file that the rule does not allow.
        PasswordError: a layer is encrypted, and the password is missing or wrong.
        OSError: a layer's file cannot be opened or read.
    """
    files: list[tuple[Source, Header | None, Source | None, Crypt | None]] = []
    data_rule, hashings = options.data_file, 0
    for opened, head in walk(source, options.backing):
        data = crypt = None
        if head:
            _check_readable(opened, head, warn=warn)
            data, data_rule = open_data_file(opened, head, data_rule)
            if head.encrypted:
                from fastqcow.crypt import open_crypt  # what it imports takes longer than opening most images

                crypt, hashings = open_crypt(opened, head, options.password, hashings)
            if files:  # nobody asks for what may be 2 MiB in each file
                head = head._replace(unknown_extensions=())
        files.append((opened, head, data, crypt))
    headers = [head for _, head, _, _ in files if head]
    _check_l1_tables(headers, files[0][0].path)
    largest = max(head.cluster_size for head in headers)
    layer = None
    for opened, head, data, crypt in reversed(files):
        layer = _open_layer(opened, head, data, crypt, layer, options, largest, len(files))
    assert layer is not None
    return layer


def open_over(source: Source, head: Header, data: Source | None, below: Layer | Source | None, options: Options) -> Layer:
    """Open an image over what is open already, whatever the image says of its backing file: over a layer, or over raw bytes.

    The image is one that is not encrypted. Over a layer it shares that one's caches.

    Raises:
        FormatError, UnsupportedError: the image cannot be read, or not so many layers.
    """
    _check_readable(source, head, warn=True)
    check_data_file(source, head)
    if isinstance(below, Source):
        below = _open_layer(below, None, None, None, None, options, head.cluster_size, 2)
    chain = layers(below) if below else []
    if len(chain) >= DEPTH_MAX:
        raise FormatError(f"the backing chain is deeper than {DEPTH_MAX} files", path=source.path)
    _check_l1_tables([head, *(each.header for each in chain if each.header)], source.path)
    return _open_layer(source, head, data, None, below, options, head.cluster_size, len(chain) + 1)


def walk(source: Path | BinaryFile, rule: Rule) -> Iterator[tuple[Source, Header | None]]:
    """The files of a chain from the top down, with their headers, None for a raw file. The next one is opened when it is asked for.

    Raises:
        FormatError: a damaged header, a chain that comes back or is too deep, or a backing file whose format is not said.
        UnsupportedError: a backing file of another format.
        PolicyError, OSError: a backing file is not, or cannot be, opened.
    """
    seen: set[object] = set()
    opened: Source | None = open_source(source)
    fmt: str | None = "qcow2"
    while opened is not None:
        identity = opened.identity()
        if identity in seen:
            raise FormatError("the backing chain comes back to this file", path=opened.path)
        if len(seen) == DEPTH_MAX:
            raise FormatError(f"the backing chain is deeper than {DEPTH_MAX} files", path=opened.path)
        seen.add(identity)
        head = _read_header(opened, fmt)
        yield opened, head
        if head is None:
            return
        fmt = head.backing_format
        opened, rule = open_backing(opened, head, rule)


def open_view(image: Layer, options: Options, *, size: int, l1_off: int, l1_entries: int, with_backing: bool) -> Layer:
    """The same file with another L1 table and size, as of a snapshot; it shares the caches. Bounds are the caller's to check."""
    head, below = image.header, image.backing if with_backing else None
    assert head is not None
    source, crypt = image.reader.source, image.crypt
    reader = _open_reader(source, head, image.data, crypt, below, image.reader, options, 0, 0, size, l1_off, l1_entries)
    return Layer(reader, head, image.data, crypt, below)


def is_encrypted(layer: Layer) -> bool:
    """Whether some file of the chain needed a password."""
    return any(each.crypt is not None for each in layers(layer))


def reopened(layer: Layer, options: Options) -> Layer:
    """The same files and keys, with caches of their own: nothing of what was read is in them."""
    chain = layers(layer)
    largest = max(each.header.cluster_size for each in chain if each.header)
    below = None
    for each in reversed(chain):
        below = _open_layer(each.reader.source, each.header, each.data, each.crypt, below, options, largest, len(chain))
    assert below is not None
    return below


def layers(top: Layer) -> list[Layer]:
    """A layer and those below it."""
    found, layer = [top], top.backing
    while layer is not None:
        found.append(layer)
        layer = layer.backing
    return found


def _check_readable(source: Source, head: Header, *, warn: bool) -> None:
    if head.unsupported:
        raise UnsupportedError(head.unsupported, path=source.path)
    if head.corrupt and warn:
        warnings.warn(f"{printable(source.path)}: the image is marked as corrupt", CorruptWarning, stacklevel=4)


def _check_l1_tables(headers: list[Header], path: str) -> None:
    if sum(head.l1_entries * 8 for head in headers) > L1_NBYTES_MAX:
        raise FormatError(f"the L1 tables of the backing chain are larger than {L1_NBYTES_MAX >> 20} MiB", path=path)


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
    return Header.read(source.pread, source.path)


def _open_layer(
    source: Source,
    head: Header | None,
    data: Source | None,
    crypt: Crypt | None,
    below: Layer | None,
    options: Options,
    largest_cluster: int,
    layers: int,
) -> Layer:
    if head is None:
        reader = Reader.raw(source, source.size + 511 & ~511, **options.sizes(largest_cluster, layers))
        return Layer(reader, None, None, None, None)
    table = head.disk_size, head.l1_off, head.l1_entries
    reader = _open_reader(source, head, data, crypt, below, None, options, largest_cluster, layers, *table)
    return Layer(reader, head, data, crypt, below)


def _open_reader(
    source: Source,
    head: Header,
    data: Source | None,
    crypt: Crypt | None,
    below: Layer | None,
    sibling: Reader | None,
    options: Options,
    largest_cluster: int,
    layers: int,
    size: int,
    l1_off: int,
    l1_entries: int,
) -> Reader:
    return Reader.qcow2(
        source,
        data,
        below.reader if below else None,
        sibling,
        crypt,
        version=head.version,
        cluster_bits=head.cluster_bits,
        extended_l2=head.extended_l2,
        codec=options.codec(head.compression_type),
        size=size,
        l1_off=l1_off,
        l1_entries=l1_entries,
        **options.sizes(largest_cluster, layers),
    )
