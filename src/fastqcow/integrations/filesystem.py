"""What is in an image as a file system of fsspec: the protocol `qcow2`, which also chains (extra `fsspec`)."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Container
from typing import Any, NoReturn
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem

import fastqcow
from fastqcow.diskfile import DiskFile
from fastqcow.integrations.fsspec import open_file

__all__ = ["Qcow2FileSystem"]

BUFFER_NBYTES = 128 << 10
DISK = "disk.raw"
FOLDER = "snapshots"


class Qcow2FileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The disk of an image and those of its internal snapshots, as files that can be read: `disk.raw` and `snapshots/NAME.raw`.

    For fsspec this is the protocol `qcow2`: `fsspec.open("qcow2://disk.raw::https://host/disk.qcow2")`.

    A snapshot's file has the snapshot's name, in which all but letters, digits and ` ._-+=@(),~` stand as %XX; where several have
    the same, `~2` and so on is put behind the others. `info` says what its id and name are.

    It pickles as file systems of fsspec do, which is with all of its options: a password is among them.

    Args:
        fo: the image: a path on the file system of `target_protocol`, a URL, or an open binary file.
        target_protocol, target_options: of the file system that the image is on, as in all chains of fsspec.
        backing, data_file, password, threads, cache_size, engine: as for `fastqcow.open`.

    Raises:
        What `fastqcow.open` raises.
    """

    protocol = "qcow2"
    root_marker = ""
    cachable = False  # each has a file open

    def __init__(
        self,
        fo: Any = "",
        mode: str = "r",
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        backing: Any = None,
        data_file: Any = None,
        password: Any = None,
        threads: int | None = None,
        cache_size: int | None = None,
        engine: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mode != "r":
            raise ValueError(f"mode is {mode!r}; images are read-only")
        options = {"backing": backing, "data_file": data_file, "password": password}
        options |= {"threads": threads, "cache_size": cache_size, "engine": engine}
        file = _image_file(fo, target_protocol, target_options or {})
        # A local copy is read by a duplicate of its descriptor, and need not stay open.
        with file if type(file) is io.FileIO and file is not fo else contextlib.nullcontext():
            image = fastqcow.open(file, **options)
        self._opened: dict[str, fastqcow.Image] = {DISK: image}
        self._snapshots: dict[str, fastqcow.SnapshotEntry] = {}
        for entry in image.snapshots:
            self._snapshots[f"{FOLDER}/{_file_name(entry.name, self._snapshots)}"] = entry

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return stripped.lstrip("/") if isinstance(stripped, str) else stripped

    def close(self) -> None:
        """Close the image. Files that are open go on."""
        for image in self._opened.values():
            image.close()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path == "" or (path == FOLDER and self._snapshots):
            return {"name": path, "size": 0, "type": "directory"}
        if path == DISK:
            return {"name": path, "size": self._opened[DISK].size, "type": "file"}
        entry = self._snapshots.get(path)
        if entry is None:
            raise FileNotFoundError(path)
        size = entry.disk_size & ~511
        return {"name": path, "size": size, "type": "file", "snapshot_id": entry.id, "snapshot_name": entry.name}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = self.info(path)
        path = found["name"]
        names = [path]
        if path == FOLDER:
            names = sorted(self._snapshots)
        elif path == "":
            names = [DISK, FOLDER] if self._snapshots else [DISK]
        return [self.info(name) for name in names] if detail else names

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        image = self._image_of(path)
        first, last, _ = slice(start, end).indices(image.size)
        return image.pread(max(last - first, 0), first)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> io.BufferedReader:
        if mode != "rb":
            raise NotImplementedError(f"mode is {mode!r}; images are read-only")
        return io.BufferedReader(_View(self._image_of(path)), block_size or BUFFER_NBYTES)

    def _image_of(self, path: str) -> fastqcow.Image:
        path = self._strip_protocol(path)
        if self.info(path)["type"] == "directory":
            raise IsADirectoryError(path)
        if path not in self._opened:
            disk, entry = self._opened[DISK], self._snapshots[path]
            self._opened[path] = disk.snapshot_of(entry)
        return self._opened[path]


class _View(DiskFile):
    """The bytes of an image with a position of its own."""

    def __init__(self, image: fastqcow.Image) -> None:
        super().__init__(image._open_reader(), image._origin)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a file of a qcow2 file system does not pickle; the file system does, and images do")


def _image_file(fo: Any, protocol: str | None, options: dict[str, Any]) -> Any:
    """What `fastqcow.open` is given. A local image is given by its path, as other files may lie beside it."""
    if isinstance(fo, fsspec.core.OpenFile):
        fs, path = fo.fs, fo.path
    elif not isinstance(fo, (str, os.PathLike)):
        return fo
    elif protocol is None:
        fs, path = fsspec.core.url_to_fs(fo, **options)
    else:
        fs = fsspec.filesystem(protocol, **options)
        path = fs._strip_protocol(os.fspath(fo))
    return path if isinstance(fs, LocalFileSystem) else open_file(fs, path)


def _file_name(name: str, taken: Container[str]) -> str:
    safe = "".join(c if c.isalnum() or c in " ._-+=@(),~" else quote(c, safe="", errors="surrogateescape") for c in name)
    found, number = f"{safe}.raw", 1
    while f"{FOLDER}/{found}" in taken:
        number += 1
        found = f"{safe}~{number}.raw"
    return found
