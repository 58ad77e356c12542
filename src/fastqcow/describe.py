"""What there is to say about an image without reading its contents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastqcow import header as h
from fastqcow.chain import backing_path
from fastqcow.errors import PolicyError
from fastqcow.header import Header
from fastqcow.source import open_source

if TYPE_CHECKING:
    from fastqcow._reader import Source
    from fastqcow._types import BinaryFile, Path

__all__ = ["info", "layer_info"]


def info(source: Path | BinaryFile) -> dict[str, Any]:
    """What `qemu-img info --output=json` says of an image. Only its header is read, so this works where the image cannot be opened.

    Raises:
        FormatError, UnsupportedError, OSError: as `fastqcow.open`.
    """
    opened = open_source(source)
    return layer_info(opened, Header.read(opened.pread, opened.path))


def layer_info(source: Source, header: Header) -> dict[str, Any]:
    """The fields of qemu-img's ImageInfo (qapi/block-core.json)."""
    result: dict[str, Any] = {
        "virtual-size": header.disk_size,
        "filename": source.path,
        "cluster-size": header.cluster_size,
        "format": "qcow2",
        "actual-size": _actual_size(source),
        "format-specific": {"type": "qcow2", "data": _format_specific(header)},
        "dirty-flag": bool(header.incompatible & h.DIRTY),
    }
    if header.encrypted:
        result["encrypted"] = True
    if header.backing_name is not None:
        result["backing-filename"] = header.backing_name
        result["full-backing-filename"] = _full_backing_name(source, header.backing_name)
        if header.backing_format is not None:
            result["backing-filename-format"] = header.backing_format
    return result


def _actual_size(source: Source) -> int:
    """Bytes that the file takes on its disk; for a file object, its length."""
    return os.stat(source.path).st_blocks * 512 if source.has_path else source.size


def _full_backing_name(image: Source, name: str) -> str:
    try:
        return backing_path(image, name)
    except PolicyError:
        return name


def _format_specific(header: Header) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": "1.1" if header.version == 3 else "0.10",
        "compression-type": header.compression_type,
    }
    if header.version == 3:
        data["lazy-refcounts"] = bool(header.compatible & h.LAZY_REFCOUNTS)
    data["refcount-bits"] = 1 << header.refcount_order
    if header.version == 3:
        data["corrupt"] = bool(header.incompatible & h.CORRUPT)
        data["extended-l2"] = header.extended_l2
    if header.has_data_file:
        data["data-file"] = header.data_file_name
        data["data-file-raw"] = bool(header.autoclear & h.DATA_FILE_RAW)
    return data
