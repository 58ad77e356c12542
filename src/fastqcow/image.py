"""The image that users hold: a virtual disk that is read by position, or as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastqcow import _reader
from fastqcow.bitmaps import BitmapEntry, Range, dirty_ranges, read_directory
from fastqcow.chain import Layer, Options, is_encrypted, layers, make_options, open_chain, open_view, reopened
from fastqcow.describe import layer_info, read_luks
from fastqcow.diskfile import DiskFile, Extent
from fastqcow.errors import FormatError
from fastqcow.origin import Origin, lasting
from fastqcow.snapshots import SnapshotEntry, check, find, read_table
from fastqcow.source import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastqcow._types import BinaryFile, Path
    from fastqcow.crypt import Password
    from fastqcow.header import Header
    from fastqcow.policy import Rule

__all__ = ["Extent", "Image", "Snapshot", "VmState", "open", "open_raw"]


class Image(DiskFile):
    """A virtual disk, open for reading. Made by `fastqcow.open`.

    `pread` and `preadv` may be called from many threads at once and never move the file position. `read`, `readinto`, `seek` and
    `tell` share one position, as those of any file. Closing the image lets reads that are under way in other threads finish.

    An image pickles as what it was opened by and with; unpickling opens it again, at position 0. So what `open` raises, unpickling
    does. What does not pickle is a closed image (ValueError), and (TypeError) one with a password, unless that was a function, or
    from a file object that does not pickle itself.
    """

    def __init__(self, chain: Layer, options: Options, origin: Origin) -> None:
        assert chain.header is not None
        source = chain.reader.source
        self._snapshots = read_table(source.pread, chain.header, source.path)
        self._header: Header = chain.header
        self._chain: Layer | None = chain
        self._options = options
        super().__init__(chain.reader, origin)

    @property
    def header(self) -> Header:
        return self._header

    def close(self) -> None:
        self._chain = None
        super().close()

    def reopened(self) -> Image:
        """The same disk, read by the same files, with caches of its own that are empty; both are closed on their own.

        Raises:
            ValueError: the image is closed.
        """
        self._open_reader()
        assert self._chain is not None
        return Image(reopened(self._chain, self._options), self._options, self._origin)

    def info(self) -> dict[str, Any]:
        """What `qemu-img info --output=json` says of the image's file, field for field."""
        source = self._open_reader().source
        return layer_info(source, self._header, self._snapshots, self.bitmaps, read_luks(source, self._header))

    @property
    def snapshots(self) -> tuple[SnapshotEntry, ...]:
        """The image's internal snapshots, in the order of their table."""
        return self._snapshots

    def snapshot(self, name_or_id: str) -> Snapshot:
        """The disk as it was when an internal snapshot was taken, by the snapshot's id or, if none has that, its name.

        It has the size that the disk had, shares this image's caches, and stays open when this image is closed.

        Raises:
            KeyError: there is no such snapshot.
            FormatError: its tables are damaged.
        """
        self._open_reader()
        entry = find(self._snapshots, name_or_id)
        if entry is None:
            raise KeyError(f"{self.name}: no snapshot has the id or name {name_or_id!r}")
        return self.snapshot_of(entry)

    def snapshot_of(self, entry: SnapshotEntry) -> Snapshot:
        """As `snapshot`, by its entry in `snapshots`: ids and names may be those of several.

        Raises:
            FormatError: its tables are damaged.
        """
        self._open_reader()
        assert self._chain is not None
        return Snapshot(self._chain, self._options, entry, self._origin)

    @property
    def bitmaps(self) -> tuple[BitmapEntry, ...]:
        """The image's persistent dirty bitmaps.

        Raises:
            FormatError: their directory is damaged.
        """
        source = self._open_reader().source
        return read_directory(source.pread, self._header, source.path)

    def bitmap(self, name: str) -> Iterator[Range]:
        """The ranges of the disk that a bitmap marks as written to, in order, as (start, length) in bytes.

        Raises:
            KeyError: there is no such bitmap.
            FormatError: it was not saved when the image was last closed, or is damaged.
        """
        source = self._open_reader().source
        for entry in self.bitmaps:
            if entry.name == name:
                return dirty_ranges(source.pread, entry, self._header, source.path)
        raise KeyError(f"{self.name}: no bitmap has the name {name!r}")

    def _qcow2_sources(self) -> list[_reader.Source]:
        """The qcow2 files that it is read from."""
        self._open_reader()
        assert self._chain is not None
        return [layer.reader.source for layer in layers(self._chain) if layer.header]

    def stats(self) -> _reader.Stats:
        """Counts since the image was opened, over all layers.

        clusters_inflated, cache_hits (reads of a compressed cluster that found it inflated), bytes_fetched (from the files) and
        bytes_returned (to callers).
        """
        return self._open_reader().stats()


class Snapshot(Image):
    """The disk of a moment, open for reading. Made by `Image.snapshot`.

    It pickles as its image does, and unpickling raises KeyError where the image does not have this snapshot any more.
    """

    def __init__(self, image: Layer, options: Options, entry: SnapshotEntry, origin: Origin) -> None:
        assert image.header is not None
        check(entry, image.header, image.reader.source.path)
        self._image: Layer | None = image
        self._entry = entry
        table = {"l1_off": entry.l1_off, "l1_entries": entry.l1_entries}
        super().__init__(open_view(image, options, size=entry.disk_size & ~511, with_backing=True, **table), options, origin)

    @property
    def entry(self) -> SnapshotEntry:
        """What the snapshot table says of it."""
        return self._entry

    @property
    def vm_state(self) -> VmState:
        """The saved state of the machine, as a file of `entry.vm_state_size` bytes.

        Raises:
            FormatError: it is larger than any can be.
        """
        self._open_reader()
        assert self._image is not None
        return VmState(self._image, self._options, self._entry, self._origin)

    def reopened(self) -> Snapshot:
        self._open_reader()
        assert self._image is not None
        return Snapshot(reopened(self._image, self._options), self._options, self._entry, self._origin)

    def _reopening(self) -> tuple[Any, ...]:
        return _open_snapshot, (self._origin.checked(), self._entry)

    def close(self) -> None:
        self._image = None
        super().close()


class VmState(DiskFile):
    """The machine state of a snapshot: it is stored behind the end of the disk, from the next L2 table on."""

    def __init__(self, image: Layer, options: Options, entry: SnapshotEntry, origin: Origin) -> None:
        assert image.header is not None
        self._entry = entry
        covers = image.header.l1_covers_bits
        start = -(-entry.disk_size >> covers) << covers
        if entry.vm_state_size >= 1 << 62:
            raise FormatError(
                "the snapshot's machine state is larger than any can be", path=image.reader.source.path, value=entry.vm_state_size
            )
        size = start + entry.vm_state_size
        table = {"l1_off": entry.l1_off, "l1_entries": entry.l1_entries}
        super().__init__(open_view(image, options, size=size, with_backing=False, **table).reader, origin, start)

    def _reopening(self) -> tuple[Any, ...]:
        return _open_vm_state, (self._origin.checked(), self._entry)


def _open_snapshot(origin: Origin, entry: SnapshotEntry) -> Snapshot:
    """Unpickle a snapshot. It is the same one only if all that the table says of it is the same."""
    with origin.open() as image:
        if entry not in image.snapshots:
            raise KeyError(f"{image.name}: the snapshot {entry.name!r} (id {entry.id!r}) is not there any more")
        return Snapshot(image._chain, image._options, entry, origin)


def _open_vm_state(origin: Origin, entry: SnapshotEntry) -> VmState:
    with _open_snapshot(origin, entry) as snapshot:
        return snapshot.vm_state


def open(  # noqa: A001 - called as fastqcow.open
    source: Path | BinaryFile,
    *,
    backing: Rule = None,
    data_file: Rule = None,
    password: Password = None,
    threads: int | None = None,
    cache_size: int | None = None,
    engine: Literal["libdeflate", "libz"] | None = None,
) -> Image:
    """Open a qcow2 image for reading.

    Args:
        source: a path; a URL (`https://`, `s3://` and whatever else fsspec knows; the extra `fsspec`), unless there is a file of
            that name; or an open, seekable binary file, which stays the caller's.
        backing: what to do about a backing file that the image names. None: open it if it lies in the image's own directory or
            below. "follow": open it wherever it is. False: do without, unallocated clusters read as zeroes. A path, a URL or an
            open file: that one instead (a path named "follow" is written "./follow"). A function: it is called for each file of the
            chain with the name in the image, the format (None where the image does not say it) and the path of the image that
            names it, and returns one of the others, or raises. What an image at a URL names is opened by no rule but these last.
        data_file: the same for an external data file, without which there is nothing to read. A given file counts for the image
            itself, the other rules for its backing files too.
        password: of an encrypted image, and of its encrypted backing files: text, which stands for UTF-8, or bytes of a key file.
            A function: it is called with the path of each encrypted file, and returns its password. An image with a password
            pickles only if that was a function: no pickle holds a password.
        threads: at most so many threads work on one read, the calling one included, and ahead of it where small reads follow each
            other; by default one for each CPU that the process may use, by its affinity and the quota of its control group.
        cache_size: bound on inflated clusters kept, in bytes; 32 MiB by default. A quarter of it is for those that are read ahead.
        engine: what inflates deflate clusters: "libdeflate" (where it is built in, see `build_info`) or "libz", the reference. By
            default the environment variable FASTQCOW_ENGINE, or libdeflate.

    Raises:
        FormatError: not a qcow2 image, or a damaged one.
        UnsupportedError: an image that needs a feature which fastqcow does not have.
        PolicyError: the image names a file that `backing` or `data_file` does not allow.
        PasswordError: the image is encrypted, and the password is missing or wrong. (Nothing tells that the one of a legacy AES
            encryption is wrong: then the bytes are.)
        OSError: a file cannot be opened or read.

    Warns:
        CorruptWarning: the image is marked as corrupt.
    """
    options = make_options(backing, data_file, password, threads, cache_size, engine)
    chain = open_chain(source, options)
    given = {
        "backing": lasting(backing),
        "data_file": lasting(data_file),
        "password": password if callable(password) else None,
        "threads": threads,
        "cache_size": cache_size,
        "engine": engine,
    }
    secret = is_encrypted(chain) and not callable(password)
    # The keys are made, and nobody needs the password any more.
    return Image(chain, options._replace(password=None), Origin(open, lasting(source), given, secret))


def open_raw(source: Path | BinaryFile, *, whole_sectors: bool = False, threads: int | None = None) -> DiskFile:
    """Open a raw image, a file or a block device, as a disk: to convert it, to compare it, to see where it has holes.

    Args:
        source: as for `open`.
        whole_sectors: a file that ends within a sector of 512 bytes is followed by zeroes to the sector's end, as for QEMU.
        threads: as for `open`.

    Raises:
        OSError: the file cannot be opened.
    """
    opened = open_source(source)
    size = opened.size + 511 & ~511 if whole_sectors else opened.size
    reader = _reader.Reader.raw(opened, size, **make_options(threads=threads).sizes(largest_cluster=0, layers=1))
    return DiskFile(reader, Origin(open_raw, lasting(source), {"whole_sectors": whole_sectors, "threads": threads}))
