"""What there is to say about an image without reading its contents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastqcow import header as h
from fastqcow.bitmaps import BitmapEntry, read_directory
from fastqcow.chain import make_options, open_chain, walk
from fastqcow.errors import Error, PolicyError, explain
from fastqcow.header import Header
from fastqcow.policy import named_path
from fastqcow.snapshots import SnapshotEntry, read_table
from fastqcow.source import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastqcow._reader import Source
    from fastqcow._types import BinaryFile, Path
    from fastqcow.crypt import Password
    from fastqcow.luks import LuksHeader
    from fastqcow.policy import Rule

__all__ = ["chain_info", "info", "layer_info", "snapshots_info"]


def info(source: Path | BinaryFile, *, backing: Rule = None, data_file: Rule = None, password: Password = None) -> dict[str, Any]:
    """What `qemu-img info --output=json` says of an image, without reading its contents.

    This works for images that cannot be read, too: then "unreadable" says why. To know that, all of its files are opened, by the
    rules that `fastqcow.open` has, and the password is tried.

    Raises:
        FormatError, UnsupportedError: not a qcow2 image, a damaged header, or an unknown version.
        OSError: the file cannot be opened or read.
    """
    opened = open_source(source)
    header = Header.read(opened.pread, opened.path)
    found = layer_info(opened, header, (), (), None)
    try:
        found = _qcow2_info(opened, header)
        open_chain(source, make_options(backing, data_file, password), warn=False)
    except (Error, OSError) as e:
        found["unreadable"] = explain(e)
    return found


def chain_info(source: Path | BinaryFile, rule: Rule = None) -> Iterator[dict[str, Any]]:
    """As `info`, of the image and its backing files in turn, which are opened by a rule as `fastqcow.open` has it. One at a time:
    each may have 65,536 snapshots.

    Raises:
        FormatError, UnsupportedError, PolicyError, OSError: of any of the files.
    """
    for opened, header in walk(source, rule):
        yield _qcow2_info(opened, header) if header else _raw_info(opened)


def snapshots_info(source: Path | BinaryFile) -> list[dict[str, Any]]:
    """The entries of the snapshot table as `info` has them.

    Raises:
        FormatError, UnsupportedError, OSError: the header or the table cannot be read.
    """
    opened = open_source(source)
    header = Header.read(opened.pread, opened.path)
    return [_snapshot_info(entry) for entry in read_table(opened.pread, header, opened.path)]


def _raw_info(source: Source) -> dict[str, Any]:
    return {
        "virtual-size": source.size + 511 & ~511,
        "filename": source.path,
        "format": "raw",
        "actual-size": _actual_size(source),
        "dirty-flag": False,
    }


def _qcow2_info(source: Source, header: Header) -> dict[str, Any]:
    snapshots = read_table(source.pread, header, source.path)
    bitmaps = read_directory(source.pread, header, source.path)
    return layer_info(source, header, snapshots, bitmaps, read_luks(source, header))


def read_luks(source: Source, header: Header) -> LuksHeader | None:
    """The LUKS header, if there is one.

    Raises:
        FormatError, UnsupportedError: it is damaged, or of a version or with a cipher that is not known.
    """
    if header.crypt_method != h.LUKS:
        return None
    from fastqcow.luks import LuksHeader

    return LuksHeader.read(source.pread, header, source.path)


def layer_info(
    source: Source,
    header: Header,
    snapshots: tuple[SnapshotEntry, ...],
    bitmaps: tuple[BitmapEntry, ...],
    luks: LuksHeader | None,
) -> dict[str, Any]:
    """The fields of qemu-img's ImageInfo (qapi/block-core.json)."""
    result: dict[str, Any] = {
        "virtual-size": header.disk_size,
        "filename": source.path,
        "cluster-size": header.cluster_size,
        "format": "qcow2",
        "actual-size": _actual_size(source),
        "format-specific": {"type": "qcow2", "data": _format_specific(header, bitmaps, luks)},
        "dirty-flag": bool(header.incompatible & h.DIRTY),
    }
    if header.encrypted:
        result["encrypted"] = True
    if snapshots:
        result["snapshots"] = [_snapshot_info(entry) for entry in snapshots]
    if header.unknown_extensions:
        found = header.unknown_extensions
        result["unknown-extensions"] = [{"magic": f"{each.magic:#010x}", "length": len(each.data)} for each in found]
    if header.backing_name is not None:
        result["backing-filename"] = header.backing_name
        result["full-backing-filename"] = _full_backing_name(source, header.backing_name)
        if header.backing_format is not None:
            result["backing-filename-format"] = header.backing_format
    return result


def _luks_info(luks: LuksHeader) -> dict[str, Any]:
    scheme = luks.scheme
    found: dict[str, Any] = {"ivgen-alg": scheme.vectors, "hash-alg": luks.hash, "cipher-alg": luks.cipher_name, "uuid": luks.uuid}
    if scheme.vectors == "essiv":
        found["ivgen-hash-alg"] = scheme.vectors_hash
    found |= {"format": "luks", "cipher-mode": scheme.mode}
    found["slots"] = [
        {"active": True, "iters": slot.iterations, "key-offset": slot.key_off, "stripes": slot.stripes}
        if slot.active
        else {"active": False, "key-offset": slot.key_off}
        for slot in luks.slots
    ]
    return found | {"payload-offset": luks.payload_off, "master-key-iters": luks.key_iterations}


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


def _format_specific(header: Header, bitmaps: tuple[BitmapEntry, ...], luks: LuksHeader | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": "1.1" if header.version == 3 else "0.10",
        "compression-type": header.compression_type,
    }
    if header.version == 3:
        data["lazy-refcounts"] = bool(header.compatible & h.LAZY_REFCOUNTS)
    if bitmaps:
        data["bitmaps"] = [
            {"flags": ["in-use"] * b.in_use + ["auto"] * b.auto, "name": b.name, "granularity": b.granularity} for b in bitmaps
        ]
    data["refcount-bits"] = 1 << header.refcount_order
    if luks:
        data["encrypt"] = _luks_info(luks)
    elif header.crypt_method == h.AES:
        data["encrypt"] = {"format": "aes"}
    if header.data_file_name is not None:
        data["data-file"] = header.data_file_name
    if header.has_data_file:
        data["data-file-raw"] = bool(header.autoclear & h.DATA_FILE_RAW)
    if header.version == 3:
        data["corrupt"] = header.corrupt
        data["extended-l2"] = header.extended_l2
    return data
