"""What makes a conversion one to rely on: a check of the image before it, a digest of the disk while it runs, and the target read
back after it.

A check reads tables only. The digest is that of the bytes that are written, taken on their way (digest.c): nothing is read twice.
To verify reads both sides once more: the source, as what was wrong in memory the first time would be in a digest, too; and the
target from where it is stored, as far as the system lets go of what it has in memory.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastqcow._reader import Reader, Source
from fastqcow.chain import make_options
from fastqcow.diskfile import DiskFile
from fastqcow.errors import CheckWarning, FormatError, VerifyError, naming
from fastqcow.image import Image
from fastqcow.image import open as open_image
from fastqcow.origin import Origin

if TYPE_CHECKING:
    from fastqcow._types import Digest
    from fastqcow.checking import Finding

__all__ = ["check_before", "make_digest", "verify_qcow2", "verify_raw"]


def make_digest(algorithm: str | None) -> Digest | None:
    """What takes the bytes of the disk.

    Raises:
        ValueError: there is no such algorithm, or its digest has no length of its own.
    """
    if algorithm is None:
        return None
    import hashlib

    digest = hashlib.new(algorithm)
    if digest.digest_size == 0:
        raise ValueError(f"the digest {algorithm} has no length of its own")
    return digest


def check_before(disk: DiskFile) -> None:
    """Check the tables and refcounts of every qcow2 file that a disk is read from.

    Raises:
        FormatError: one of them is corrupt, or could not be checked.
        ValueError: a raw image, which has nothing to be checked.

    Warns:
        CheckWarning: something is not as it should be, and does no harm to the bytes: space that is lost, or that has two uses.
    """
    from fastqcow.checking import check_source

    if not isinstance(disk, Image):
        raise ValueError(f"{disk.name}: a raw image has no tables to check")
    for source in disk._qcow2_sources():
        findings: list[Finding] = []
        found = check_source(source, lambda finding, to=findings: to.append(finding) if not to else None)  # type: ignore[misc]
        said = f" ({findings[0]})" if findings else ""
        if found.check_errors:
            raise FormatError(f"the check could not be completed{said}", path=source.path)
        if found.corruptions:
            raise FormatError(
                f"the check found {found.corruptions} errors{said}; 'fastqcow check' lists them, and nothing was written",
                path=source.path,
            )
        if found.leaks or found.overlaps:
            warnings.warn(
                f"{source.path}: the check found {found.leaks} leaked clusters, and {found.overlaps} in use for different things",
                CheckWarning,
                stacklevel=3,
            )


def _settle(fd: int, target: str) -> None:
    """Have all bytes stored, and those in memory dropped where the system does that."""
    with naming(target):
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(fd: int, target: str) -> int:
    """A descriptor to read the target by."""
    with naming(target):
        return os.dup(fd)


def verify_raw(disk: DiskFile, fd: int, target: str, *, is_new: bool, progress: Callable[[int, int], object] | None) -> None:
    """Read a raw target back.

    Raises:
        VerifyError: it does not hold what the disk does.
        OSError: it could not be stored, or cannot be read.
    """
    _settle(fd, target)
    if is_new and os.fstat(fd).st_size != disk.size:
        raise VerifyError(f"what was written has another length than the disk, which has {disk.size} bytes", path=target)
    source = Source.from_fd(_copy(fd, target), target, True, True)
    sizes = make_options(threads=disk._open_reader().threads).sizes(largest_cluster=0, layers=1)
    with DiskFile(Reader.raw(source, disk.size, **sizes), Origin(DiskFile, target, {})) as written:
        _compare(disk, written, target, progress)


def verify_qcow2(
    disk: DiskFile, fd: int, target: str, *, backing: str | None, progress: Callable[[int, int], object] | None
) -> None:
    """Read a qcow2 target back, through its backing file if it has one.

    Raises:
        VerifyError: it does not hold what the disk does.
        Error: it cannot be read.
        OSError: it could not be stored, or cannot be read.
    """
    _settle(fd, target)
    file = io.FileIO(_copy(fd, target))
    try:
        file.name = target  # what errors say, in place of a number
        with open_image(file, backing=backing, threads=disk._open_reader().threads) as written:
            if written.size != disk.size + 511 & ~511:
                raise VerifyError(f"what was written has a disk of {written.size} bytes, and not of {disk.size}", path=target)
            _compare(disk, written, target, progress)
    finally:
        with naming(target):
            file.close()


def _compare(disk: DiskFile, written: DiskFile, target: str, progress: Callable[[int, int], object] | None) -> None:
    from fastqcow.comparison import compare

    found = compare(disk, written, progress=progress)
    if found is not None:
        raise VerifyError("what was read back is not what was written", path=target, guest_off=found.guest_off)
