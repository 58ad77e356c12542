"""What there is to say about an image without reading its contents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastqcow import header as h
from fastqcow.errors import PolicyError
from fastqcow.header import Header
from fastqcow.policy import named_path
from fastqcow.snapshots import SnapshotEntry, read_table
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
    header = Header.read(opened.pread, opened.path)
    return layer_info(opened, header, read_table(opened.pread, header, opened.path))


def layer_info(source: Source, header: Header, snapshots: tuple[SnapshotEntry, ...]) -> dict[str, Any]:
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
    if snapshots:
        result["snapshots"] = [_snapshot_info(entry) for entry in snapshots]
    if header.backing_name is not None:
        result["backing-filename"] = header.backing_name
        result["full-backing-filename"] = _full_backing_name(source, header.backing_name)
        if header.backing_format is not None:
            result["backing-filename-format"] = header.backing_format
    return result


def _snapshot_info(entry: SnapshotEntry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": entry.id,
        "name": entry.name,
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": entry.vm_clock_nsec % 1_000_000_000,
    }
    if entry.icount is not None:
        found["icount"] = entry.icount
    return found


def _actual_size(source: Source) -> int:
    """Bytes that the file takes on its disk; for a file object, its length."""
    return os.stat(source.path).st_blocks * 512 if source.has_path else source.size


def _full_backing_name(image: Source, name: str) -> str:
    try:
        return named_path(image, name, "backing file", "backing")
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
    if header.has_data_file:
        data["data-file"] = header.data_file_name
        data["data-file-raw"] = bool(header.autoclear & h.DATA_FILE_RAW)
    if header.version == 3:
        data["corrupt"] = header.corrupt
        data["extended-l2"] = header.extended_l2
    return data
