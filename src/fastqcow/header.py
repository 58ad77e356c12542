"""The qcow2 header and its extensions, as named tuples.

Offsets and limits follow the specification ("Header", "Header extensions") and, where that is silent, QEMU's qcow2.c. Every
number is checked here, once, before anything is allocated, read or looped over by it: what leaves `Header.read` is safe to use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from fastqcow.errors import FormatError, UnsupportedError

__all__ = ["BitmapsExtension", "CryptoHeader", "Feature", "Header", "UnknownExtension"]

MAGIC = b"QFI\xfb"
L1_NBYTES_MAX = 32 << 20
REFCOUNT_TABLE_NBYTES_MAX = 8 << 20
BACKING_NAME_NBYTES_MAX = 1023
BACKING_FORMAT_NBYTES_MAX = 15
SNAPSHOTS_MAX = 65536
EXTENSIONS_MAX = 1024  # QEMU knows five, and has no limit
V2_NBYTES = 72
V3_NBYTES_MIN = 104

DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
LAZY_REFCOUNTS = 1 << 0
DATA_FILE_RAW = 1 << 1

COMPRESSION_TYPES = ("zlib", "zstd")
AES, LUKS = 1, 2  # crypt_method

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


class Feature(NamedTuple):
    """A row of the feature name table. kind: 0 incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int
    name: str


class BitmapsExtension(NamedTuple):
    """Where the directory of persistent dirty bitmaps lies, in bytes."""

    bitmap_count: int
    directory_nbytes: int
    directory_off: int
    reserved: int = 0


class CryptoHeader(NamedTuple):
    """Where the encryption header (LUKS) lies in the file, in bytes."""

    host_off: int
    nbytes: int


class UnknownExtension(NamedTuple):
    """A header extension that this library does not know, kept as it is."""

    magic: int
    data: bytes


class Header(NamedTuple):
    """All of the header. Offsets are places in the file; counts are entries; sizes are bytes.

    unsupported: why the image cannot be read although its header can; None if it can.
    """

    version: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_off: int
    refcount_table_off: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_off: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_nbytes: int
    compression_type: str
    backing_name: str | None
    backing_format: str | None
    data_file_name: str | None
    features: tuple[Feature, ...]
    bitmaps: BitmapsExtension | None
    crypto: CryptoHeader | None
    unknown_extensions: tuple[UnknownExtension, ...]
    unsupported: str | None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """Bytes of the disk: whole sectors of 512 bytes, as QEMU counts them, where `size` is no multiple."""
        return self.size & ~511

    @property
    def l1_covers_bits(self) -> int:
        """log2 of the bytes of disk that an L1 entry stands for: an L2 table's entries times a cluster."""
        return 2 * self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def encrypted(self) -> bool:
        return self.crypt_method != 0

    @property
    def corrupt(self) -> bool:
        """Whoever wrote to the image last found it damaged, and said so."""
        return bool(self.incompatible & CORRUPT)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & DATA_FILE)

    @classmethod
    def read(cls, pread: Callable[[int, int], bytes], path: str) -> Header:
        """Read and check the header.

        Args:
            pread: (number of bytes, host offset) -> bytes, short only at the end of the file.
            path: the name to put into errors.

        Raises:
            FormatError: not a qcow2 image, or one whose header is damaged.
            UnsupportedError: a version of the format that this library does not know. Features that it does not know raise nothing
                here: they are named in `unsupported`.
        """
        return _Parser(pread, path).parse()


class _Parser:
    def __init__(self, pread: Callable[[int, int], bytes], path: str) -> None:
        self.pread = pread
        self.path = path

    def bad(self, reason: str, host_off: int | None = None, value: int | None = None) -> FormatError:
        return FormatError(reason, path=self.path, host_off=host_off, value=value)

    def parse(self) -> Header:
        head = self.pread(V3_NBYTES_MIN + 8, 0)
        if not head:
            raise self.bad("the file is empty")
        if head[:4] != MAGIC:
            raise self.bad("not a qcow2 image: it does not start with the bytes 'QFI\\xfb'")
        if len(head) < V2_NBYTES:
            raise self.bad(f"the file ends within the header, after {len(head)} bytes")
        (
            _,
            version,
            backing_off,
            backing_nbytes,
            cluster_bits,
            size,
            crypt_method,
            l1_entries,
            l1_off,
            refcount_table_off,
            refcount_table_clusters,
            snapshot_count,
            snapshots_off,
        ) = _V2.unpack_from(head)
        if version not in (2, 3):
            raise UnsupportedError(
                f"qcow version {version} is not supported; 2 and 3 are", path=self.path, host_off=4, value=version
            )
        if not 9 <= cluster_bits <= 21:
            raise self.bad("cluster_bits is not within 9 to 21", 20, cluster_bits)
        cluster_size = 1 << cluster_bits

        incompatible = compatible = autoclear = 0
        refcount_order, header_nbytes, compression = 4, V2_NBYTES, 0
        if version == 3:
            if len(head) < V3_NBYTES_MIN:
                raise self.bad(f"the file ends within the header, after {len(head)} bytes")
            incompatible, compatible, autoclear, refcount_order, header_nbytes = _V3.unpack_from(head, V2_NBYTES)
            if header_nbytes < V3_NBYTES_MIN:
                raise self.bad("header_length is less than 104", 100, header_nbytes)
            if header_nbytes > cluster_size:
                raise self.bad("header_length is more than a cluster", 100, header_nbytes)
            if header_nbytes > V3_NBYTES_MIN and len(head) > V3_NBYTES_MIN:
                compression = head[V3_NBYTES_MIN]
        if backing_off > cluster_size:
            raise self.bad("the backing file name starts beyond the first cluster", 8, backing_off)

        extensions_end = backing_off or cluster_size
        header = self.pread(cluster_size, 0)
        found = self.extensions(header, header_nbytes, extensions_end)
        unsupported = self.unsupported(incompatible, compression, crypt_method, found.features)
        if bool(incompatible & COMPRESSION_TYPE) != bool(compression):
            raise self.bad("the compression type and its feature bit contradict each other", V3_NBYTES_MIN, compression)
        if found.crypto and crypt_method != LUKS:
            raise self.bad("there is an encryption header, and the encryption method is not LUKS", 32, crypt_method)
        if crypt_method == LUKS and not found.crypto:
            raise self.bad("the encryption method is LUKS, and nothing points to its header", 32, crypt_method)
        if found.crypto and found.crypto.host_off % cluster_size:
            raise self.bad("the encryption header is not aligned to a cluster", value=found.crypto.host_off)
        if incompatible & EXTENDED_L2 and cluster_bits < 14:
            raise self.bad("cluster_bits is less than 14, with extended L2 entries", 20, cluster_bits)
        if refcount_order > 6:
            raise self.bad("refcount_order is more than 6", 96, refcount_order)

        self.check_size(size, cluster_bits, bool(incompatible & EXTENDED_L2), l1_entries)
        if refcount_table_clusters == 0:
            raise self.bad("there is no refcount table", 56, 0)
        if snapshot_count > SNAPSHOTS_MAX:
            raise self.bad(f"there are more than {SNAPSHOTS_MAX} snapshots", 60, snapshot_count)
        # An entry of the snapshot table has 40 bytes and more. Where it lies counts also where it is empty, for QEMU does.
        for name, count_at, count, entry_nbytes, limit, off_at, off in (
            ("L1", 36, l1_entries, 8, L1_NBYTES_MAX, 40, l1_off),
            ("refcount", 56, refcount_table_clusters, cluster_size, REFCOUNT_TABLE_NBYTES_MAX, 48, refcount_table_off),
            ("snapshot", 60, snapshot_count, 40, SNAPSHOTS_MAX * 40, 64, snapshots_off),
        ):
            if count * entry_nbytes > limit:
                raise self.bad(f"the {name} table is larger than {limit >> 20} MiB", count_at, count)
            if off % cluster_size:
                raise self.bad(f"the {name} table is not aligned to a cluster", off_at, off)
            if off > (1 << 63) - 1 - count * entry_nbytes:
                raise self.bad(f"the {name} table lies beyond any file's end", off_at, off)
        return Header(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=crypt_method,
            l1_entries=l1_entries,
            l1_off=l1_off,
            refcount_table_off=refcount_table_off,
            refcount_table_clusters=refcount_table_clusters,
            snapshot_count=snapshot_count,
            snapshots_off=snapshots_off,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=refcount_order,
            header_nbytes=header_nbytes,
            compression_type=COMPRESSION_TYPES[compression] if compression < len(COMPRESSION_TYPES) else str(compression),
            backing_name=self.backing_name(header, backing_off, backing_nbytes) if backing_off else None,
            backing_format=found.backing_format,
            data_file_name=found.data_file_name,
            features=tuple(found.features),
            bitmaps=found.bitmaps,
            crypto=found.crypto,
            unknown_extensions=tuple(found.unknown),
            unsupported=unsupported,
        )

    def unsupported(self, incompatible: int, compression: int, crypt_method: int, features: list[Feature]) -> str | None:
        unknown = incompatible & ~KNOWN_INCOMPATIBLE
        if unknown:
            names = {f.bit: f.name for f in features if f.kind == 0}
            listed = ", ".join(names.get(bit) or f"bit {bit}" for bit in range(64) if unknown >> bit & 1)
            return f"the image needs features that are not known: {listed}"
        if compression >= len(COMPRESSION_TYPES):
            return f"the compression type {compression} is not known"
        if crypt_method > LUKS:
            return f"the encryption method {crypt_method} is not known"
        return None

    def check_size(self, size: int, cluster_bits: int, extended_l2: bool, l1_entries: int) -> None:
        if size > (1 << 63) - 1:
            raise self.bad("the virtual size is more than 2^63 - 1", 24, size)
        l2_covers_bits = cluster_bits + cluster_bits - (4 if extended_l2 else 3)
        if l1_entries < -(-size >> l2_covers_bits):
            raise self.bad("the L1 table is too small for the virtual size", 36, l1_entries)

    def backing_name(self, header: bytes, off: int, nbytes: int) -> str | None:
        if nbytes > BACKING_NAME_NBYTES_MAX:
            raise self.bad(f"the backing file name is longer than {BACKING_NAME_NBYTES_MAX} bytes", 16, nbytes)
        name = header[off : off + nbytes]
        if len(name) < nbytes:
            raise self.bad("the backing file name runs past the first cluster, or the file's end", off, nbytes)
        return c_string(name) or None

    def extensions(self, header: bytes, off: int, end: int) -> _Extensions:
        """Walk the extensions. Each step moves on by at least 8 bytes, and none leaves the first cluster."""
        found = _Extensions()
        count = 0
        while off < end:
            count += 1
            if count > EXTENSIONS_MAX:
                raise self.bad(f"there are more than {EXTENSIONS_MAX} header extensions", off)
            if off + 8 > end:
                raise self.bad("there is no space for a header extension", off)
            if off + 8 > len(header):
                raise self.bad("the file ends within the header extensions", off)
            magic, nbytes = struct.unpack_from(">II", header, off)
            if nbytes > end - off - 8:
                raise self.bad("a header extension is longer than the space for it", off, nbytes)
            if magic == EXT_END:
                break
            data = header[off + 8 : off + 8 + nbytes]
            if len(data) < nbytes:
                raise self.bad("the file ends within a header extension", off, nbytes)
            self.extension(found, magic, data, off)
            off += 8 + (nbytes + 7 & ~7)
        return found

    def extension(self, found: _Extensions, magic: int, data: bytes, off: int) -> None:
        if magic == EXT_BACKING_FORMAT:
            if len(data) > BACKING_FORMAT_NBYTES_MAX:
                raise self.bad(f"the backing file's format is longer than {BACKING_FORMAT_NBYTES_MAX} bytes", off, len(data))
            found.backing_format = c_string(data) or None
        elif magic == EXT_DATA_FILE:
            found.data_file_name = c_string(data)
        elif magic == EXT_FEATURE_NAMES:
            rows = (data[i : i + 48] for i in range(0, len(data) - 47, 48))
            # There is a bit for 192 rows: a table can have many times more, and say nothing by them.
            named = {(r[0], r[1]): r for r in rows if r[0] <= 2 and r[1] < 64}
            found.features = [Feature(r[0], r[1], c_string(r[2:])) for r in named.values()]
        elif magic == EXT_BITMAPS:
            if len(data) != 24:
                raise self.bad("the bitmaps extension has not 24 bytes", off, len(data))
            count, reserved, directory_nbytes, directory_off = struct.unpack(">IIQQ", data)
            found.bitmaps = BitmapsExtension(count, directory_nbytes, directory_off, reserved)
        elif magic == EXT_CRYPTO:
            if len(data) != 16:
                raise self.bad("the encryption header pointer has not 16 bytes", off, len(data))
            found.crypto = CryptoHeader(*struct.unpack(">QQ", data))
        else:
            found.unknown.append(UnknownExtension(magic, data))


def c_string(data: bytes) -> str:
    """A string ends at its first zero byte, if it has one; bytes that are no UTF-8 come through, as in file names."""
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


class _Extensions:
    def __init__(self) -> None:
        self.backing_format: str | None = None
        self.data_file_name: str | None = None
        self.features: list[Feature] = []
        self.bitmaps: BitmapsExtension | None = None
        self.crypto: CryptoHeader | None = None
        self.unknown: list[UnknownExtension] = []
