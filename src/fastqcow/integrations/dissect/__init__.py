"""The qcow2 reader of dissect.hypervisor, with fastqcow underneath: the same classes, arguments, attributes and errors.

`install()` puts these classes in the place of dissect's own, so that every tool that is built on dissect uses them;

    python -m fastqcow.integrations.dissect target-fs disk.qcow2 ls /etc

does so for one run of one of its commands. Where the two differ, in damaged images and in what dissect reads wrongly, is told in
docs/integrations/dissect.md.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
import weakref
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import fastqcow
from fastqcow.chain import DEPTH_MAX, Layer, make_options, open_over, open_view
from fastqcow.errors import printable
from fastqcow.header import EXT_END, EXT_FEATURE_NAMES, V2_NBYTES, V3_NBYTES_MIN, Header
from fastqcow.locks import ForkSafeLock
from fastqcow.snapshots import check, read_entry, read_table
from fastqcow.source import open_source

try:
    from dissect.hypervisor.disk import qcow2 as _theirs
    from dissect.hypervisor.disk.c_qcow2 import QCOW2_MAGIC, QCOW2_MAGIC_BYTES, c_qcow2
    from dissect.hypervisor.exceptions import Error, InvalidHeaderError
    from dissect.util.stream import AlignedStream
except ImportError as e:
    raise ImportError("fastqcow.integrations.dissect needs dissect.hypervisor: pip install fastqcow[dissect]") from e

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from fastqcow._types import Writable

__all__ = ["QCow2", "QCow2Snapshot", "QCow2Stream", "install", "uninstall"]

_HEADER_NBYTES = 112
_V2_REST = struct.pack(">QQQII8x", 0, 0, 0, 4, V2_NBYTES)  # what the fields mean that version 2 does not have


class QCow2:
    """A qcow2 image.

    Args:
        fh: a path, or an open binary file, which stays the caller's.
        data_file: the external data file, if the image has one. By default the one that the image names, if `fh` is a path and that
            file lies in the same directory or below.
        backing_file: the disk below, as an open file of its bytes, or a qcow2 image of it as an open file. By default the one that
            the image names, as for `data_file`.
        allow_no_data_file, allow_no_backing_file: do without for now. Before `open` is called, the attributes `data_file` and
            `backing_file` have to be set.

    Raises:
        InvalidHeaderError: not a qcow2 image, or one that cannot be read.
        NotImplementedError: the image is encrypted.
        Error: a file that it needs is not given and not found, or lies elsewhere.
        EOFError: the file is shorter than a header.
        OSError: a file cannot be read.
    """

    _above: tuple[Path, ...] = ()  # the images whose backing file this one is

    def __init__(
        self,
        fh: BinaryIO | Path,
        data_file: BinaryIO | None = None,
        backing_file: BinaryIO | QCow2Stream | None = None,
        *,
        allow_no_data_file: bool = False,
        allow_no_backing_file: bool = False,
    ) -> None:
        self.path = fh if isinstance(fh, Path) else None
        self.fh: Any = self._open_file(fh) if isinstance(fh, Path) else fh
        self._source = open_source(self.fh)
        self._read_header()
        self._options = make_options()
        self._disk: Layer | None = None
        self._disk_files: tuple[object, object] = None, None

        self.data_file: Any = self._open_data_file(data_file, allow_no_data_file) if self.needs_data_file else self.fh
        self.backing_file: Any = None
        if self.needs_backing_file:
            self.backing_file = self._open_backing_file(backing_file, allow_no_backing_file)

    def _read_header(self) -> None:
        head = self._source.pread(_HEADER_NBYTES, 0)
        self.header = c_qcow2.QCowHeader(head)
        if self.header.magic != QCOW2_MAGIC:
            raise InvalidHeaderError("Invalid qcow2 header magic")
        if self.header.version not in (2, 3):
            raise InvalidHeaderError(f"Unsupported qcow2 version: {self.header.version}")
        if not c_qcow2.MIN_CLUSTER_BITS <= self.header.cluster_bits <= c_qcow2.MAX_CLUSTER_BITS:
            raise InvalidHeaderError(f"Unsupported cluster size: 2**{self.header.cluster_bits}")
        # What follows a short header are extensions, and none of its fields.
        if self.header.version == 2:
            head = head[:V2_NBYTES] + _V2_REST
        else:
            head = head[: max(self.header.header_length, V3_NBYTES_MIN)].ljust(_HEADER_NBYTES, b"\0")
        self.header = c_qcow2.QCowHeader(head)
        self._set_geometry()
        if self.header.crypt_method:
            raise NotImplementedError("Encrypted qcow2 files are not supported")
        with _raising(InvalidHeaderError):
            self._header = Header.read(self._source.pread, self._source.path)
        if self._header.unsupported:
            raise InvalidHeaderError(printable(f"{self._source.path}: {self._header.unsupported}"))
        self._set_extensions()

    def _set_geometry(self) -> None:
        self.cluster_bits: int = self.header.cluster_bits
        self.cluster_size = 1 << self.cluster_bits
        self.subclusters_per_cluster: int = c_qcow2.QCOW_EXTL2_SUBCLUSTERS_PER_CLUSTER if self.has_subclusters else 1
        self.subcluster_size = self.cluster_size // self.subclusters_per_cluster
        self.subcluster_bits = self.subcluster_size.bit_length() - 1
        if self.subcluster_bits < c_qcow2.MIN_CLUSTER_BITS:
            raise InvalidHeaderError(f"Unsupported subcluster size: 0x{self.subcluster_size:x}")
        self._l2_entry_size: int = c_qcow2.L2E_SIZE_EXTENDED if self.has_subclusters else c_qcow2.L2E_SIZE_NORMAL
        self.l2_size = self.cluster_size // self._l2_entry_size
        self.l2_bits = self.l2_size.bit_length() - 1
        self.compression_type: int = self.header.compression_type
        self.csize_shift = 62 - (self.cluster_bits - 8)
        self.csize_mask = (1 << (self.cluster_bits - 8)) - 1
        self.cluster_offset_mask = (1 << self.csize_shift) - 1

    def _set_extensions(self) -> None:
        head = self._header
        self.size = head.disk_size
        self.backing_format = head.backing_format.upper() if head.backing_format else None
        self.image_backing_format = self.backing_format
        self.auto_backing_file = head.backing_name
        self.image_backing_file = head.backing_name.upper() if head.backing_name else None
        self.image_data_file = head.data_file_name
        self.crypto_header = None  # only an encrypted image has one
        self.bitmap_header = None
        if head.bitmaps:
            count, nbytes, off, reserved = head.bitmaps
            self.bitmap_header = c_qcow2.Qcow2BitmapHeaderExt(
                nb_bitmaps=count, reserved32=reserved, bitmap_directory_size=nbytes, bitmap_directory_offset=off
            )
        self.feature_table = dict(self._extensions()).get(EXT_FEATURE_NAMES)
        self.unknown_extensions = [
            (c_qcow2.QCowExtension(magic=magic, len=len(data)), data) for magic, data in head.unknown_extensions
        ]

    def _extensions(self) -> Iterator[tuple[int, bytes]]:
        """The header extensions, as (magic, data); that they are well-formed has been checked."""
        off, end = self._header.header_nbytes, self.header.backing_file_offset or self.cluster_size
        area = self._source.pread(end, 0)
        while off < end:
            magic, nbytes = struct.unpack_from(">II", area, off)
            if magic == EXT_END:
                return
            yield magic, area[off + 8 : off + 8 + nbytes]
            off += 8 + (nbytes + 7 & ~7)

    # Other files

    def _open_file(self, path: Path) -> BinaryIO:
        """Opened by the path's own method (there are paths inside of images), and closed when nobody has this image any more."""
        file = path.open("rb")
        weakref.finalize(self, file.close)
        return file

    def _open_data_file(self, data_file: BinaryIO | None, allow_no_data_file: bool = False) -> BinaryIO | None:
        if data_file is not None:
            return data_file
        path = self._path_of("data-file", "image_data_file", allow_no_data_file)
        return self._open_file(path) if path else None

    def _open_backing_file(
        self, backing_file: BinaryIO | QCow2Stream | None, allow_no_backing_file: bool = False
    ) -> BinaryIO | QCow2Stream | None:
        if backing_file is None:
            path = self._path_of("backing-file", "auto_backing_file", allow_no_backing_file)
            return self._open_backing_path(path) if path else None
        if isinstance(backing_file, QCow2Stream):
            return backing_file
        if self.backing_format != "RAW" and _starts_as_qcow2(backing_file):
            return QCow2(backing_file).open()
        backing_file.seek(0)
        return backing_file

    def _open_backing_path(self, path: Path) -> BinaryIO | QCow2Stream:
        if self.backing_format not in (None, "RAW", "QCOW2"):
            raise Error(f"backing-file {str(path)!r} is of the format {self.backing_format!r}, which is not supported")
        if self.backing_format != "QCOW2":
            file = self._open_file(path)
            if self.backing_format == "RAW" or not _starts_as_qcow2(file):
                file.seek(0)
                return file
            file.close()
        assert self.path is not None
        above = (*self._above, self.path.resolve())
        if path.resolve() in above:
            raise Error(f"backing-file {str(path)!r} is one of the images above it")
        if len(above) >= DEPTH_MAX:
            raise Error(f"backing-file {str(path)!r} lies under more than {DEPTH_MAX} images")
        below = QCow2.__new__(QCow2)
        below._above = above
        QCow2.__init__(below, path)
        return below.open()

    def _path_of(self, what: str, attribute: str, allow_none: bool) -> Path | None:
        """The path of a file that the image names; None where there is none and need not be one."""
        name = getattr(self, attribute)
        named = f"({attribute} = {name!r})"
        if self.path is None or not name:
            if allow_none:
                return None
            raise Error(f"{what} required but not provided {named}")
        path = self.path.parent.joinpath(name.removeprefix("file:"))
        if not path.exists():
            if allow_none:
                return None
            raise Error(f"{what} {str(path)!r} not found {named}")
        # Whoever made the image chose the name: it is not to make files of ours part of the disk.
        if not path.resolve().is_relative_to(self.path.resolve().parent):
            raise Error(f"{what} {str(path)!r} lies outside of the image's directory; open it and pass it as an argument {named}")
        return path

    @property
    def has_backing_file(self) -> bool:
        return self.backing_file is not None

    @property
    def needs_backing_file(self) -> bool:
        return self._header.backing_name is not None

    @property
    def has_data_file(self) -> bool:
        return self.data_file is not None and self.data_file is not self.fh

    @property
    def needs_data_file(self) -> bool:
        return bool(self.header.incompatible_features & c_qcow2.QCOW2_INCOMPAT_DATA_FILE)

    @property
    def has_subclusters(self) -> bool:
        return bool(self.header.incompatible_features & c_qcow2.QCOW2_INCOMPAT_EXTL2)

    # What is in it

    def open(self) -> QCow2Stream:
        """The disk, from its start. All streams of an image share its caches.

        Raises:
            Error: a data or backing file is still missing, or the image is damaged.
            OSError: a file cannot be read.
        """
        self._check_files()
        return QCow2Stream(self)

    @cached_property
    def snapshots(self) -> list[QCow2Snapshot]:
        """The internal snapshots, in the order of their table.

        Raises:
            Error: the table is damaged.
        """
        found, offset = [], self._header.snapshots_off
        with _raising(Error):
            entries = read_table(self._source.pread, self._header, self._source.path)
        for entry in entries:
            found.append(QCow2Snapshot(self, offset))
            offset += entry.nbytes + 7 & ~7
        return found

    @cached_property
    def l1_table(self) -> list[int]:
        return self._read_table(self._header.l1_off, self._header.l1_entries)

    def l2_table(self, l2_offset: int) -> Any:
        """An L2 table, for those who walk the tables themselves."""
        return _theirs.L2Table(self, l2_offset)

    def _read_table(self, host_off: int, entries: int) -> list[int]:
        data = self._source.pread(entries * 8, host_off)
        if len(data) < entries * 8:
            raise EOFError(f"{self._source.path}: a table ends beyond the end of the file")
        return list(struct.unpack(f">{entries}Q", data))

    def _check_files(self) -> None:
        if self.needs_data_file and not self.has_data_file:
            raise Error(f"data-file required but not provided (image_data_file = {self.image_data_file!r})")
        if self.needs_backing_file and not self.has_backing_file:
            raise Error(f"backing-file required but not provided (auto_backing_file = {self.auto_backing_file!r})")

    def _open_disk(self) -> Layer:
        """The disk over the files that are set now."""
        files = self.data_file, self.backing_file
        if self._disk is None or any(now is not then for now, then in zip(files, self._disk_files, strict=True)):
            data = open_source(self.data_file) if self.needs_data_file else None
            below = self.backing_file
            if isinstance(below, QCow2Stream):
                below = below._disk
            elif below is not None:
                below = open_source(below)
            with _raising(Error):
                self._disk = open_over(self._source, self._header, data, below, self._options)
            self._disk_files = files
        return self._disk


class QCow2Snapshot:
    """An entry of the snapshot table, at a host offset."""

    def __init__(self, qcow2: QCow2, offset: int) -> None:
        source = qcow2._source
        self.qcow2 = qcow2
        self.offset = offset
        with _raising(Error):
            self._entry = read_entry(source.pread, offset, qcow2._header, source.path)
        self.header = c_qcow2.QCowSnapshotHeader(source.pread(len(c_qcow2.QCowSnapshotHeader), offset))
        extra = source.pread(self.header.extra_data_size, offset + len(c_qcow2.QCowSnapshotHeader))
        known = len(c_qcow2.QCowSnapshotExtraData)
        self.extra = c_qcow2.QCowSnapshotExtraData(extra[:known].ljust(known, b"\0"))
        self.unknown_extra = extra[known:] or None
        self.id = self._entry.id
        self.name = self._entry.name
        self.entry_size = self._entry.nbytes

    def open(self) -> QCow2Stream:
        """The disk as it was, of the size that it had. Errors as of `QCow2.open`."""
        self.qcow2._check_files()
        return QCow2Stream(self.qcow2, self)

    def _open_disk(self) -> Layer:
        with _raising(Error):
            check(self._entry, self.qcow2._header, self.qcow2._source.path)
            return open_view(
                self.qcow2._open_disk(),
                self.qcow2._options,
                size=self._entry.disk_size & ~511,
                l1_off=self._entry.l1_off,
                l1_entries=self._entry.l1_entries,
                with_backing=True,
            )

    @cached_property
    def l1_table(self) -> list[int]:
        with _raising(Error):
            check(self._entry, self.qcow2._header, self.qcow2._source.path)
        return self.qcow2._read_table(self.header.l1_table_offset, self.header.l1_size)


class QCow2Stream(AlignedStream):  # type: ignore[misc]
    """The disk as a seekable file, for any number of threads, which share its position.

    It is an AlignedStream for those who ask, but reads nothing that was not asked for, and keeps nothing: fastqcow's caches do.
    Damage raises fastqcow.FormatError, which tells the place.

    Args:
        l1_table: a snapshot of the image, or its L1 table as it is in its attribute; by default the disk as it is now.
    """

    def __init__(self, qcow2: QCow2, l1_table: QCow2Snapshot | list[int] | None = None) -> None:
        self.qcow2 = qcow2
        self._snapshot = l1_table if isinstance(l1_table, QCow2Snapshot) else _snapshot_with(qcow2, l1_table)
        self._disk = (self._snapshot or qcow2)._open_disk()
        reader = self._disk.reader
        super().__init__(reader.size, align=qcow2.cluster_size)
        self._pread, self._preadv = reader.pread, reader.preadv
        self._position = 0
        self._position_lock = ForkSafeLock(threading.RLock)  # as that of a DiskFile

    @property
    def l1_table(self) -> list[int]:
        return (self._snapshot or self.qcow2).l1_table

    def seek(self, pos: int, whence: int = io.SEEK_SET) -> int:
        with self._position_lock.lock:
            if whence == io.SEEK_SET:
                if pos < 0:
                    raise ValueError(f"negative seek position {pos}")
            elif whence == io.SEEK_CUR:
                pos = max(0, self._position + pos)
            elif whence == io.SEEK_END:
                pos = max(0, self._disk.reader.size + pos)
            else:
                raise OSError("invalid whence value")
            self._position = pos
            return pos

    def tell(self) -> int:
        return self._position

    def read(self, n: int | None = -1) -> bytes:
        with self._position_lock.lock:
            start = self._position
            data = self._pread(self._nbytes(n), start)
            self._position = start + len(data)
            return data

    def readinto(self, b: Writable) -> int:
        with self._position_lock.lock:
            start = self._position
            count = self._preadv((b,), start)
            self._position = start + count
            return count

    def readall(self) -> bytes:
        return self.read()

    def readoffset(self, offset: int, length: int) -> bytes:
        self.seek(offset)
        return self.read(length)

    def peek(self, n: int) -> bytes:
        with self._position_lock.lock:
            return self._pread(self._nbytes(n), self._position)

    def _nbytes(self, n: int | None) -> int:
        left = max(self._disk.reader.size - self._position, 0)
        if n is None or n == -1:
            return left
        if n < 0:
            raise ValueError("invalid number of bytes to read")
        return min(n, left)

    def _read(self, offset: int, length: int) -> bytes:
        return self._pread(length, offset)


def _snapshot_with(qcow2: QCow2, l1_table: list[int] | None) -> QCow2Snapshot | None:
    if not l1_table or l1_table is qcow2.l1_table:
        return None
    for snapshot in qcow2.snapshots:
        if snapshot.l1_table is l1_table:
            return snapshot
    raise ValueError("the L1 table is neither the image's nor that of one of its snapshots")


@contextmanager
def _raising(kind: type[Exception]) -> Iterator[None]:
    """Turns errors of fastqcow into those that dissect's callers expect."""
    try:
        yield
    except fastqcow.Error as e:
        raise kind(str(e)) from e


def _starts_as_qcow2(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == bytes(QCOW2_MAGIC_BYTES)


_OURS: dict[str, type] = {"QCow2": QCow2, "QCow2Stream": QCow2Stream, "QCow2Snapshot": QCow2Snapshot}
_originals: dict[str, type] = {}
_replaced: list[tuple[ModuleType, str]] = []


def install() -> None:
    """Let everybody who uses dissect's qcow2 reader use this one: whoever imports it from now on, and every module that has.

    What was opened before stays as it is.
    """
    if _originals:
        return
    _originals.update({name: getattr(_theirs, name) for name in _OURS})
    ours = {id(theirs): _OURS[name] for name, theirs in _originals.items()}
    _replaced.extend(_replace(ours, list(sys.modules.values())))


def uninstall() -> None:
    """Undo `install`: in the modules where it replaced something, and in those of dissect.

    Other modules that were imported in between, and took a class from dissect's by name, keep what they have.
    """
    theirs = {id(_OURS[name]): original for name, original in _originals.items()}
    for module, name in _replaced:
        original = theirs.get(id(vars(module).get(name)))
        if original is not None:
            setattr(module, name, original)
    _replace(theirs, [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "dissect"])
    _replaced.clear()
    _originals.clear()


def _replace(by_id: dict[int, type], modules: list[ModuleType]) -> list[tuple[ModuleType, str]]:
    """Replace the values of global names; returns which."""
    found = []
    for module in modules:
        if issubclass(type(module), ModuleType):  # some objects there only say that they are one
            # Not by vars(): that would import modules which wait for their first use.
            names = object.__getattribute__(module, "__dict__").items()
            found += [(module, name, by_id[id(value)]) for name, value in list(names) if id(value) in by_id]
    for module, name, value in found:
        setattr(module, name, value)
    return [(module, name) for module, name, _ in found]
