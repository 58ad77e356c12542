"""Whole images to other files.

The output is written to a file of another name beside the target, and takes the target's name when it is complete; so that
name never stands for half an image, whatever happens to the process. (What is left after a power failure is up to the file system:
nothing is synchronised.) A target that cannot be replaced (a block device), or must not be (in_place), is written in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, Unpack

from fastqcow.cpus import available_cpus
from fastqcow.diskfile import DiskFile
from fastqcow.errors import naming
from fastqcow.image import VmState
from fastqcow.image import open as open_image
from fastqcow.verification import check_before, make_digest, verify_qcow2, verify_raw

if TYPE_CHECKING:
    from fastqcow._reader import Reader
    from fastqcow._types import BinaryFile, Digest, Path
    from fastqcow.creation import Qcow2Options, RawStream

__all__ = ["Conversion", "convert", "refuse_source"]

SPARSE_SIZE = 4096
_SPARSE_SIZE_MAX = 16 << 20  # of qcow2 images; as for QEMU
Preallocation: TypeAlias = Literal["off", "falloc", "full"]


class Conversion(NamedTuple):
    """What a conversion did. Sizes are bytes."""

    source: str
    target: str
    virtual_size: int
    bytes_written: int
    clusters_inflated: int
    seconds: float
    checksum: str | None = None  # in hexadecimal, if it was asked for


def convert(
    src: Path | BinaryFile | DiskFile | RawStream,
    dst: Path,
    *,
    format: str = "raw",  # noqa: A002 - the word everybody uses
    compress: bool = False,
    sparse_size: int = SPARSE_SIZE,
    preallocation: Preallocation = "off",
    copy_offload: bool = False,
    in_place: bool = False,
    threads: int | None = None,
    check: bool = False,
    verify: bool = False,
    checksum: str | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Unpack[Qcow2Options],
) -> Conversion:
    """Write the contents of an image to a raw or qcow2 file, or to a block device.

    Args:
        src: an open image, a snapshot, or a raw image of `fastqcow.open_raw`; or what `fastqcow.open` takes: no format is guessed.
            To qcow2 also a `fastqcow.RawStream`.
        dst: the path to write. An existing file is replaced when everything is written; a block device is written in place.
        format: "raw" or "qcow2".
        compress: the clusters of a qcow2 image, each that gets smaller by it.
        options: of a qcow2 image, see `fastqcow.Qcow2Options`. The same disk and options make the same file, byte for byte, on any
            number of threads.
        sparse_size: runs of zeroes of so many bytes (a multiple of 512) become holes; 0 allocates the whole target. In a qcow2
            image it is clusters of zeroes that are left out, and with 0 none is. If it is more than a cluster, and nothing is
            compressed, only those are that lie in a block of zeroes: so many bytes (rounded down to a power of two; at most 16 MiB)
            from a multiple of them on.
        preallocation: of the target's space, as for QEMU: "off"; "falloc" reserves all of it; "full" also writes all of it.
        copy_offload: plain clusters are copied by the kernel where it can (at no cost, where the file system shares blocks between
            files), and not searched for zeroes.
        in_place: write into the existing target, which must be large enough, and leave its length as it is.
        threads: as for `fastqcow.open`; for an open image its own number counts.
        check: first check the tables and refcounts of the image and its backing files, as `fastqcow.check`; refuse corrupt ones.
        verify: have the target stored, read it back and compare it with the image, before it takes its name. What was written in
            place (a block device) stays as it is where that fails.
        checksum: a digest that `hashlib` knows, "sha256" for example, of the disk's bytes: taken while they are written.
        progress: called some 20 times a second and at the end with (bytes done, bytes in all); of a stream, how many there are in
            all is known at the end only, and is 0 until then. To verify counts as much again.

    Raises:
        FormatError, OSError and so on: as `fastqcow.open`, `Image.pread` and writing to a file do. The target then is what it was,
            unless it was being written in place. FormatError also for `check`.
        VerifyError: what was read back for `verify` is something else. So is the target then.
        ValueError: an argument that makes no sense.

    Warns:
        CheckWarning: for `check`, that space is lost.
    """
    if format not in ("raw", "qcow2"):
        raise ValueError(f"the output format is {format!r}; it can be 'raw' or 'qcow2'")
    if sparse_size < 0 or sparse_size % 512:
        raise ValueError(f"sparse_size is {sparse_size}; it is a multiple of 512 bytes, or 0")
    digest = make_digest(checksum)
    if not isinstance(src, DiskFile) and hasattr(src, "fd") and (check or verify):
        raise ValueError("a stream can neither be checked nor read again to verify it")
    if preallocation not in ("off", "falloc", "full"):
        raise ValueError(f"preallocation is {preallocation!r}; it can be 'off', 'falloc' or 'full'")
    if format == "qcow2":
        for name, given in (("preallocation", preallocation != "off"), ("copy_offload", copy_offload), ("in_place", in_place)):
            if given:
                raise ValueError(f"{name} is for raw targets; a qcow2 image is always written anew, and grows as it is written")
        return _to_qcow2(src, dst, options, compress, sparse_size, threads, progress, check, verify, digest)
    if compress or options:
        name = "compress" if compress else next(iter(options))
        raise ValueError(f"{name} is for qcow2 targets; with format='qcow2' there is one")
    if not isinstance(src, DiskFile) and hasattr(src, "fd"):
        raise ValueError("a stream can be written to a qcow2 image only")
    if preallocation == "full":
        sparse_size = 0
    target = os.path.realpath(os.fsdecode(dst))
    if preallocation != "off" and _keep(target, in_place):
        raise ValueError(f"{target}: this target is written in place, and its space cannot be preallocated")
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        image = _opened(src, threads, stack)
        reader = image._open_reader()
        if check:
            check_before(image)
        if os.path.exists(target):
            refuse_source(reader, target)
        inflated_before = reader.stats()["clusters_inflated"]
        fd, reads_zero = stack.enter_context(_in_place(target, image.size) if _keep(target, in_place) else _replaced(target))
        if reads_zero:
            with naming(target):
                os.truncate(fd, image.size)
                if (sparse_size == 0 or preallocation != "off") and image.size:
                    reads_zero = _allocate(fd, image.size)
                    sparse_size = sparse_size if reads_zero else 0
        reads_zero = reads_zero and preallocation != "full"

        again = image.size if verify else 0

        def report(done: int) -> None:
            if progress is not None:
                progress(done, image.size + again)

        polled = report if progress is not None else None
        written = reader.export(fd, target, sparse_size, reads_zero, copy_offload, polled, digest)
        report(image.size)
        if verify:
            is_new = not _keep(target, in_place)
            verify_raw(image, fd, target, is_new=is_new, progress=lambda done, size: report(size + done))
        inflated = reader.stats()["clusters_inflated"] - inflated_before
        return Conversion(image.name, os.fsdecode(dst), image.size, written, inflated, time.perf_counter() - started, _hex(digest))


def _hex(digest: Digest | None) -> str | None:
    return digest.hexdigest() if digest else None


def _opened(src: Path | BinaryFile | DiskFile, threads: int | None, stack: contextlib.ExitStack) -> DiskFile:
    # A machine's state is not a disk, but a file like any other.
    if isinstance(src, DiskFile) and not isinstance(src, VmState):
        return src
    return stack.enter_context(open_image(src, threads=threads))


def _to_qcow2(
    src: Path | BinaryFile | DiskFile | RawStream,
    dst: Path,
    options: Qcow2Options,
    compress: bool,
    sparse_size: int,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
    check: bool,
    verify: bool,
    digest: Digest | None,
) -> Conversion:
    """The header is written last: what lies under a device's name until then is no image."""
    from fastqcow import _write
    from fastqcow.creation import RawStream, check_header, header_of, make_plan, open_backing_of

    if sparse_size > _SPARSE_SIZE_MAX:
        raise ValueError(f"sparse_size is {sparse_size}; for a qcow2 image it can be up to {_SPARSE_SIZE_MAX}")
    plan = make_plan(options, compress=compress)
    check_header(plan)
    started = time.perf_counter()
    target = os.path.realpath(os.fsdecode(dst))
    with contextlib.ExitStack() as stack:
        reader = backing = image = None
        if isinstance(src, RawStream):
            name, size, stream = src.name, 0, src.fd
        else:
            image = _opened(src, threads, stack)
            reader, name, size, stream = image._open_reader(), image.name, image.size, -1
            if size > plan.size_max:
                raise ValueError(f"the disk has {size} bytes; with these clusters an image can have {plan.size_max}")
            if check:
                check_before(image)
        threads = reader.threads if reader else threads or available_cpus()
        if plan.backing_file is not None:
            backing = stack.enter_context(open_backing_of(os.fsdecode(dst), plan, threads))._open_reader()
        for each in (reader, backing):
            if each and os.path.exists(target):
                refuse_source(each, target)
        inflated_before = reader.stats()["clusters_inflated"] if reader else 0
        fd, is_new = stack.enter_context(_in_place(target, 0) if _keep(target, False) else _replaced(target))
        if not is_new:
            _put(fd, bytes(512), target)

        again = size if verify else 0

        def report(done: int) -> None:
            if progress is not None:
                progress(done, size + again)

        written = _write.write(
            *(reader, stream, name, backing, fd, target, report if progress is not None else None, digest),
            version=plan.version,
            cluster_bits=plan.cluster_bits,
            extended_l2=plan.extended_l2,
            refcount_order=plan.refcount_order,
            encoder=plan.encoder,
            level=plan.level,
            grain=1 << sparse_size.bit_length() - 1 if sparse_size else 0,
            threads=threads,
            tables_nbytes=0,
        )
        _put(fd, header_of(plan, written), target)
        size = size or written["size"]
        report(size)
        if verify and image:
            below = plan.backing_file and os.path.join(os.path.dirname(os.fsdecode(dst)), plan.backing_file)
            verify_qcow2(image, fd, target, backing=below, progress=lambda done, size: report(size + done))
        inflated = reader.stats()["clusters_inflated"] - inflated_before if reader else 0
        return Conversion(
            name, os.fsdecode(dst), size, written["data_nbytes"], inflated, time.perf_counter() - started, _hex(digest)
        )


def _put(fd: int, data: bytes, target: str) -> None:
    """Write to the start of the target."""
    with naming(target):
        done = 0
        while done < len(data):
            count = os.pwrite(fd, data[done:], done)
            if count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count


def refuse_source(reader: Reader, target: str) -> None:
    """No file of the chain can be the target: it would be destroyed while, or after, it is read."""
    st = os.stat(target)
    layer: Reader | None = reader
    while layer is not None:
        for source in (layer.source, layer.data):
            if source.identity() == (st.st_dev, st.st_ino):
                raise ValueError(f"{source.path}: the image is read from this file, so it cannot be the target")
        layer = layer.backing


def _keep(target: str, in_place: bool) -> bool:
    """Whether the target itself is to be written: told so, or it is not a file that another can replace."""
    if in_place:
        return True
    try:
        return not stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _in_place(target: str, nbytes: int) -> Iterator[tuple[int, bool]]:
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            room = os.lseek(fd, 0, os.SEEK_END)
            if room < nbytes:
                raise ValueError(f"{target}: the target has {room} bytes, and the image {nbytes}")
        yield fd, False
    finally:
        with naming(target):
            os.close(fd)


@contextlib.contextmanager
def _replaced(target: str) -> Iterator[tuple[int, bool]]:
    directory, name = os.path.split(target)
    # Not by tempfile: its imports take longer than a small conversion. O_EXCL is what makes it safe, there as here.
    temporary = os.path.join(directory, f".{os.fsdecode(os.fsencode(name)[:200])}.{os.urandom(6).hex()}.part")
    try:
        mode: int | None = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        mode = None
    fd = -1
    try:
        with naming(target):
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else 0o600)
        try:
            if mode is not None:
                with naming(target):
                    os.fchmod(fd, mode)
            yield fd, True
        finally:
            with naming(target):
                os.close(fd)  # some file systems say only now that there was no room
        with naming(target):
            os.replace(temporary, target)
    except BaseException as e:
        if fd >= 0 or not isinstance(e, OSError):  # a signal can come between the file's making and anything else
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise


def _allocate(fd: int, nbytes: int) -> bool:
    """Reserve the whole file. False where the system cannot: then every byte has to be written."""
    if not hasattr(os, "posix_fallocate"):
        return False
    os.posix_fallocate(fd, 0, nbytes)
    return True
