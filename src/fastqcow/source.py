"""From what a caller names to a source of the core: a path, a URL, or an open binary file."""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
from typing import TYPE_CHECKING

from fastqcow._reader import Source
from fastqcow.errors import UnsupportedError

if TYPE_CHECKING:
    from fastqcow._types import BinaryFile, Path

__all__ = ["is_url", "open_path", "open_source", "scheme_of"]

_NO_PUNCTUATION = str.maketrans("", "", "+.-")


def open_source(source: Path | BinaryFile) -> Source:
    """Open a path or a URL, or wrap an open binary file. The file stays the caller's, and stays open.

    A plain file of Python (`open(..., "rb")`) is read by its descriptor, a duplicate of it, so that closing the file does not
    pull it away. Everything else (`gzip.open`, `io.BytesIO`, ...) is read by its methods: that such a file has a `fileno()`
    does not mean that its bytes are those of the descriptor. A URL is opened by fsspec.

    Raises:
        OSError: as from `os.open`; IsADirectoryError for a directory.
        TypeError: neither a path nor a binary file.
        UnsupportedError: a URL, and a package that it needs is not installed.
    """
    if is_url(source):
        return _open_url(str(source))
    if isinstance(source, (str, bytes, os.PathLike)):
        path = os.fsdecode(source)
        return open_path(path, path)
    if not (hasattr(source, "read") and hasattr(source, "seek")):
        raise TypeError(f"a path or an open binary file is needed, not {type(source).__name__}")
    if isinstance(source, io.TextIOBase):
        raise TypeError("the file is open in text mode; open it with mode 'rb'")
    if not getattr(source, "readable", lambda: True)():
        raise io.UnsupportedOperation("the file is not open for reading")
    path, has_path = _name_of(source)
    plain = source.raw if isinstance(source, (io.BufferedReader, io.BufferedRandom)) else source
    if type(plain) is io.FileIO:
        if isinstance(source, io.BufferedRandom):
            source.flush()
        return _from_fd(os.dup(plain.fileno()), path, has_path=has_path, own=False)
    return Source.from_file(source, path, has_path)


def is_url(source: object) -> bool:
    """Whether a text is a URL (`scheme://...`, or a chain of them as fsspec has it) and not the path of something that is there."""
    if not isinstance(source, str) or "://" not in source:
        return False
    scheme = scheme_of(source)
    return source[len(scheme) :].startswith(("://", "::")) and scheme != "" and not os.path.lexists(source)


def scheme_of(name: str) -> str:
    """What a name begins with, as a URL does: letters, digits, `+`, `.` and `-` before a colon, a letter first. Else nothing."""
    scheme, colon, _ = name.partition(":")
    is_one = colon and scheme[:1].isalpha() and scheme.isascii() and scheme.translate(_NO_PUNCTUATION).isalnum()
    return scheme if is_one else ""


def _open_url(url: str) -> Source:
    try:
        module = importlib.import_module("fastqcow.integrations.fsspec")
    except ModuleNotFoundError as e:
        if e.name != "fsspec":
            raise
        raise UnsupportedError("to open a URL needs the package fsspec; install it, or fastqcow[fsspec]", path=url) from None
    file = module.open_url(url)
    if type(file) is not io.FileIO:
        return Source.from_file(file, url, False)
    with file:  # a local file, or a local copy
        return _from_fd(os.dup(file.fileno()), url, has_path=False, own=False)


def open_path(name: str, path: str) -> Source:
    """Open a path under a name, from which errors and the names of other files start."""
    # O_NONBLOCK: a FIFO that nobody writes to is to be refused below, not waited for.
    return _from_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), name, has_path=True, own=True)


def _from_fd(fd: int, path: str, *, has_path: bool, own: bool) -> Source:
    """own: nobody else uses the descriptor's position, so it may be moved to look for holes."""
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.ESPIPE, "Not a regular file or a block device", path)
    except BaseException:
        os.close(fd)
        raise
    return Source.from_fd(fd, path, has_path, own)


def _name_of(file: object) -> tuple[str, bool]:
    """What to call a file object, and whether that is the path of a file. Some are called what they like, or a number."""
    name = getattr(file, "name", None)
    if isinstance(url := getattr(file, "url", None), str):
        return url, False
    if not isinstance(name, (str, bytes, os.PathLike)):
        return f"<{type(file).__name__}>", False
    return os.fsdecode(name), os.path.exists(name)
