"""The header: what is read of a good one, and which bad ones are refused, with what words."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.header import BitmapsExtension, CryptoHeader, Feature, Header, UnknownExtension
from images import build, extension, patched

GOOD = build([0, 0, 0])


def u32(offset: int, value: int, image: bytes = GOOD) -> bytes:
    return patched(image, offset, struct.pack(">I", value))


def u64(offset: int, value: int, image: bytes = GOOD) -> bytes:
    return patched(image, offset, struct.pack(">Q", value))


def read(image: bytes) -> Header:
    return Header.read(lambda nbytes, off: image[off : off + nbytes], "disk.qcow2")


def test_version_3() -> None:
    header = read(GOOD)
    assert (header.version, header.cluster_size, header.size, header.l1_entries) == (3, 65536, 3 * 65536, 1)
    assert (header.refcount_order, header.header_nbytes, header.compression_type) == (4, 112, "zlib")
    assert not header.extended_l2
    assert not header.encrypted
    assert not header.has_data_file
    assert header.backing_name is None


def test_version_2() -> None:
    header = read(build([0], version=2, backing=("base.img", "raw")))
    assert (header.version, header.header_nbytes, header.refcount_order) == (2, 72, 4)
    assert (header.backing_name, header.backing_format) == ("base.img", "raw")


def test_extensions() -> None:
    features = b"".join(bytes([kind, bit]) + name.ljust(46, b"\0") for kind, bit, name in ((0, 0, b"dirty bit"), (2, 1, b"x" * 46)))
    image = u32(
        32,
        2,
        build(
            [0],
            backing=("b", "qcow2"),
            extensions=extension(0x6803F857, features)
            + extension(0x23852875, struct.pack(">IIQQ", 2, 0, 64, 0x70000))
            + extension(0x0537BE77, struct.pack(">QQ", 0x80000, 4096))
            + extension(0x44415441, b"data.raw")
            + extension(0x12345678, b"whatever"),
        ),
    )
    header = read(image)
    assert header.features == (Feature(0, 0, "dirty bit"), Feature(2, 1, "x" * 46))
    assert header.bitmaps == BitmapsExtension(2, 64, 0x70000)
    assert header.crypto == CryptoHeader(0x80000, 4096)
    assert header.data_file_name == "data.raw"
    assert header.unknown_extensions == (UnknownExtension(0x12345678, b"whatever"),)
    assert (header.backing_name, header.backing_format) == ("b", "qcow2")


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        read(GOOD).size = 1  # type: ignore[misc]


# The image; a part of the error's words; the host offset and the value that it names.
BAD: dict[str, tuple[bytes, str, int | None, int | None]] = {
    "an empty file": (b"", "empty", None, None),
    "bad magic": (b"QFI\xfa" + GOOD[4:], "not a qcow2 image", None, None),
    "text": (b"hello, I am no image", "not a qcow2 image", None, None),
    "nothing but the magic": (GOOD[:4], "ends within the header, after 4 bytes", None, None),
    "a truncated header": (GOOD[:71], "ends within the header", None, None),
    "a truncated version 3 header": (GOOD[:103], "ends within the header", None, None),
    "truncated extensions": (build([0], extensions=extension(1, bytes(500)))[:200], "ends within a header extension", 112, 500),
    "no end of extensions": (build([0], extensions=extension(1, bytes(8)))[:130], "ends within the header extensions", 128, None),
    "version 1": (u32(4, 1), "version 1 is not supported", 4, 1),
    "version 4": (u32(4, 4), "version 4 is not supported", 4, 4),
    "cluster_bits 0": (u32(20, 0), "cluster_bits", 20, 0),
    "cluster_bits 8": (u32(20, 8), "cluster_bits", 20, 8),
    "cluster_bits 22": (u32(20, 22), "cluster_bits", 20, 22),
    "cluster_bits 31": (u32(20, 31), "cluster_bits", 20, 31),
    "cluster_bits 4294967295": (u32(20, 0xFFFFFFFF), "cluster_bits", 20, 0xFFFFFFFF),
    "extended L2 entries, cluster_bits 13": (u32(20, 13, u64(72, 16)), "cluster_bits is less than 14", 20, 13),
    "header_length 100": (u32(100, 100), "header_length is less", 100, 100),
    "header_length 4294967295": (u32(100, 0xFFFFFFFF), "header_length is more", 100, 0xFFFFFFFF),
    "a header_length that leaves no space for extensions": (u32(100, 65535), "no space", 65535, None),
    "a space of 4 bytes for extensions": (u64(8, 116), "no space", 112, None),
    "an end of extensions that is too long": (build([0], extensions=extension(0, b"", 65536)), "longer than the space", 112, 65536),
    "an extension of 2 GiB": (build([0], extensions=extension(1, b"", 0x7FFFFFFF)), "longer than the space", 112, 0x7FFFFFFF),
    "a backing file name of 1,024 bytes": (u32(16, 1024, u64(8, 200)), "longer than 1023", 16, 1024),
    "a backing file format of 16 bytes": (build([0], extensions=extension(0xE2792ACA, b"x" * 16)), "longer than 15", 112, 16),
    "a backing file name past the first cluster": (u32(16, 100, u64(8, 65500)), "runs past", 65500, 100),
    "a backing file name beyond the first cluster": (u64(8, 65537), "starts beyond", 8, 65537),
    "an unknown incompatible feature": (u64(72, 1 << 40), "bit 40", None, None),
    "compression type without its feature bit": (patched(GOOD, 104, b"\1"), "contradict", 104, 1),
    "compression feature bit without a type": (u64(72, 8), "contradict", 104, 0),
    "compression type in a header of 105 bytes": (patched(u32(100, 105), 104, b"\1"), "contradict", 104, 1),
    "compression feature bit in a header of 104 bytes": (u64(72, 8, patched(u32(100, 104), 104, bytes(8))), "contradict", 104, 0),
    "an unknown compression type": (patched(u64(72, 8), 104, b"\2"), "compression type 2 is not known", None, None),
    "refcount_order 7": (u32(96, 7), "refcount_order", 96, 7),
    "a raw data file, but no data file": (u64(88, 2), "raw, but there is none", 88, 2),
    "an encryption header, but no encryption": (build([0], extensions=extension(0x0537BE77, bytes(16))), "not LUKS", 32, 0),
    "LUKS without its header": (u32(32, 2), "nothing points to its header", 32, 2),
    "a LUKS header that is not aligned": (
        u32(32, 2, build([0], extensions=extension(0x0537BE77, struct.pack(">QQ", 0x10200, 4096)))),
        "not aligned",
        None,
        0x10200,
    ),
    "an encryption header of another method": (
        u32(32, 1, build([0], extensions=extension(0x0537BE77, bytes(16)))),
        "not LUKS",
        32,
        1,
    ),
    "an unknown encryption method": (u32(32, 3), "encryption method", None, None),
    "an L1 table too small": (u64(24, 1 << 40), "too small", 36, 1),
    "no L1 table": (u32(36, 0), "too small", 36, 0),
    "an L1 table over 32 MiB": (u32(36, (4 << 20) + 1), "larger than 32 MiB", 36, (4 << 20) + 1),
    "an L1 table of 4294967295 entries": (u32(36, 0xFFFFFFFF), "larger than 32 MiB", 36, 0xFFFFFFFF),
    "an unaligned L1 table": (u64(40, 65536 + 8), "L1 table is not aligned", 40, 65544),
    "an L1 table beyond any file": (u64(40, (1 << 64) - 65536), "beyond any file", 40, (1 << 64) - 65536),
    "no refcount table": (u32(56, 0), "no refcount table", 56, 0),
    "a refcount table over 8 MiB": (u32(56, 129), "refcount table is larger than 8 MiB", 56, 129),
    "a refcount table beyond any file": (u64(48, 1 << 63), "refcount table lies beyond any file", 48, 1 << 63),
    "a refcount table that is huge": (u32(56, 0xFFFFFFFF), "refcount table is larger", 56, 0xFFFFFFFF),
    "an unaligned refcount table": (u64(48, 123), "refcount table is not aligned", 48, 123),
    "65,537 snapshots": (u32(60, 65537), "more than 65536", 60, 65537),
    "an unaligned snapshot table, which is empty": (u64(64, 1000), "snapshot table is not aligned", 64, 1000),
    "a snapshot table beyond any file, which is empty": (u64(64, 1 << 63), "snapshot table lies beyond any file", 64, 1 << 63),
    "an unaligned snapshot table": (u64(64, 1000, u32(60, 1)), "snapshot table is not aligned", 64, 1000),
    "a virtual size of 2^63": (u64(24, 1 << 63), "more than 2", 24, 1 << 63),
    "1,025 extensions": (build([0], extensions=extension(1, b"") * 1025), "more than 1024 header extensions", 8304, None),
    "a bitmaps extension of 23 bytes": (build([0], extensions=extension(0x23852875, bytes(23))), "24 bytes", 112, 23),
    "an encryption pointer of 8 bytes": (build([0], extensions=extension(0x0537BE77, bytes(8))), "16 bytes", 112, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    image, reason, host_off, value = BAD[name]
    with pytest.raises((fastqcow.FormatError, fastqcow.UnsupportedError), match=reason) as caught:
        fastqcow.open(io.BytesIO(image))
    error = caught.value
    assert (error.path, error.guest_off, error.host_off, error.value) == ("<BytesIO>", None, host_off, value)


# The file was cut: QEMU takes what is lost for zeroes. And it knows no bound on extensions but the first cluster.
QEMU_READS = {"truncated extensions", "no end of extensions", "1,025 extensions"}


@pytest.mark.parametrize("name", BAD)
def test_qemu_refuses_them_too(qemu: Qemu, tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(BAD[name][0])
    assert (qemu.read(path) is None) == (name not in QEMU_READS)


def test_feature_names_are_used_for_unknown_features() -> None:
    names = bytes([0, 40]) + b"time travel".ljust(46, b"\0")
    with pytest.raises(fastqcow.UnsupportedError, match="time travel, bit 41"):
        fastqcow.open(io.BytesIO(u64(72, 3 << 40, build([0], extensions=extension(0x6803F857, names)))))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 65536 * 3 - 1])
def test_sizes(size: int) -> None:
    assert read(build([0, 0, 0], size=size)).size == size
