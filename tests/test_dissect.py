"""The drop-in for dissect.hypervisor's qcow2 reader. What both do is tested on both: dissect itself is the control."""

from __future__ import annotations

import gc
import gzip
import io
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from dissecting import (
    BASE,
    BASES,
    CLUSTER,
    DISSECT,
    EXPECTED,
    FASTQCOW,
    TOP,
    WITH_DATA_FILE,
    Error,
    InvalidHeaderError,
    compressed,
    module,
    overlay,
    snapshots_image,
    write,
)
from images import PAYLOAD, build, compressed_entry, data_entry, extension, mixed, noise, patched

HAS_ZSTD = module.HAS_ZSTD

FEATURES = extension(0x6803F857, b"\0\0" + b"dirty bit".ljust(46, b"\0"))
UNKNOWN = extension(0x12345678, b"what is this")


@pytest.fixture(params=["dissect", "fastqcow"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The classes of one of the two."""
    if request.param == "fastqcow":
        yield FASTQCOW
        return
    # dissect never closes what it opens by a path.
    files, plain_open = [], Path.open

    def recorded(self: Path, *arguments: Any, **options: Any) -> Any:
        files.append(plain_open(self, *arguments, **options))
        return files[-1]

    monkeypatch.setattr(Path, "open", recorded)
    yield DISSECT
    for file in files:
        file.close()


DISK = mixed(5 * CLUSTER + 512, 7)


@pytest.fixture
def disk(qemu: Qemu, tmp_path: Path) -> Path:
    """DISK, compressed."""
    raw, path = write(tmp_path, DISK, "disk.raw"), tmp_path / "disk.qcow2"
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    return path


# Reading


@pytest.mark.parametrize(
    "options",
    [
        *("-o cluster_size=64k", "-o cluster_size=512", "-o compat=0.10", "-o preallocation=metadata"),
        *("-c -o cluster_size=64k", "-c -o cluster_size=512", "-c -o cluster_size=2M", "-c -o compat=0.10"),
        "-c -o compression_type=zstd",
    ],
)
def test_disks_made_by_qemu(reader: Any, qemu: Qemu, tmp_path: Path, options: str) -> None:
    if "zstd" in options and reader is DISSECT and not HAS_ZSTD:
        pytest.skip("dissect needs backports.zstd")
    raw, path = write(tmp_path, DISK, "disk.raw"), tmp_path / "disk.qcow2"
    qemu.img("convert", "-f", "raw", "-O", "qcow2", *options.split(), raw, path)
    with path.open("rb") as file:
        stream = reader.QCow2(file).open()
        assert stream.size == len(DISK)
        assert stream.read() == DISK
        assert stream.read() == b""


@pytest.mark.parametrize("seed", range(5))
def test_any_calls_in_any_order(reader: Any, disk: Path, seed: int) -> None:
    """Against a plain file of the same bytes, with what AlignedStream adds to it."""
    rng = random.Random(seed)
    model = io.BytesIO(DISK)
    with disk.open("rb") as file:
        stream = reader.QCow2(file).open()
        for _ in range(200):
            n = rng.choice((0, 1, 100, 511, 512, 4096, CLUSTER - 1, CLUSTER, 3 * CLUSTER, 1 << 30))
            at = rng.choice((0, rng.randrange(len(DISK)), len(DISK) - 1, len(DISK), len(DISK) + 5000))
            call = rng.choice(("read", "readinto", "peek", "seek", "from here", "from the end", "readoffset"))
            if call == "read":
                assert stream.read(n) == model.read(n)
            elif call == "readinto":
                theirs, ours = bytearray(n % (4 * CLUSTER)), bytearray(n % (4 * CLUSTER))
                assert stream.readinto(theirs) == model.readinto(ours)
                assert theirs == ours
            elif call == "peek":
                before = model.tell()
                assert stream.peek(n) == model.read(n)
                model.seek(before)
            elif call == "seek":
                assert stream.seek(at) == model.seek(at)
            elif call == "from here":
                step = max(at - CLUSTER, -model.tell())
                assert stream.seek(step, io.SEEK_CUR) == model.seek(step, io.SEEK_CUR)
            elif call == "from the end":
                assert stream.seek(-at, io.SEEK_END) == model.seek(max(len(DISK) - at, 0))
            else:
                model.seek(at)
                assert stream.readoffset(at, n) == model.read(n)
            assert stream.tell() == model.tell()


def test_stream_as_a_file(reader: Any, disk: Path) -> None:
    with disk.open("rb") as file:
        qcow2 = reader.QCow2(file)
        stream = qcow2.open()
        assert isinstance(stream, module.AlignedStream)
        assert isinstance(stream, reader.QCow2Stream)
        assert stream.qcow2 is qcow2
        assert (stream.size, stream.align) == (len(DISK), CLUSTER)
        assert (stream.readable(), stream.seekable(), stream.writable()) == (True, True, False)
        assert stream.seek(-(1 << 40), io.SEEK_CUR) == 0
        assert stream.seek(-(1 << 40), io.SEEK_END) == 0
        assert stream.readall() == DISK
        assert stream.seek(1 << 70) == 1 << 70
        assert stream.read(1) == b""
        assert stream.peek(1) == b""
        assert stream.seek(len(DISK) - 3) == len(DISK) - 3
        assert stream.peek(10) == stream.read(10) == DISK[-3:]
        with pytest.raises(ValueError, match="negative seek position -1"):
            stream.seek(-1)
        with pytest.raises(OSError, match="invalid whence value"):
            stream.seek(0, 7)
        with pytest.raises(ValueError, match="invalid number of bytes to read"):
            stream.read(-2)
        assert io.BufferedReader(stream).seek(0) == 0
        # As dissect's does, it goes on after it is closed: whoever closes it may not be the only one who has it.
        with stream:
            stream.seek(0)
        assert not stream.closed
        assert stream.read(9) == DISK[:9]


def test_streams_of_one_image(reader: Any, disk: Path) -> None:
    with disk.open("rb") as file:
        qcow2 = reader.QCow2(file)
        one, other = qcow2.open(), reader.QCow2Stream(qcow2)
        assert one.read(100_000) == other.read(100_000) == DISK[:100_000]
        other.seek(5)
        assert one.tell() == 100_000


def test_streams_share_caches(disk: Path) -> None:
    with disk.open("rb") as file:
        qcow2 = FASTQCOW.QCow2(file)
        one, other = qcow2.open(), qcow2.open()
        one.read(10)
        other.read(10)
        assert qcow2._disk.reader.stats()["clusters_inflated"] == 1


def test_files_without_a_descriptor(reader: Any, disk: Path) -> None:
    packed = write(disk.parent, gzip.compress(disk.read_bytes()), "disk.qcow2.gz")
    with gzip.open(packed) as file:
        assert reader.QCow2(file).open().read() == DISK
    assert reader.QCow2(io.BytesIO(disk.read_bytes())).open().read() == DISK


def test_file_inside_of_a_disk(reader: Any, tmp_path: Path) -> None:
    """An image on a disk that is an image itself, as a stream of dissect."""
    parts = [noise(CLUSTER, seed) for seed in range(2)]
    inner = compressed(*parts)
    outer = compressed(*[inner[i : i + CLUSTER].ljust(CLUSTER, b"\0") for i in range(0, len(inner), CLUSTER)])
    with write(tmp_path, outer).open("rb") as file:
        assert reader.QCow2(reader.QCow2(file).open()).open().read() == b"".join(parts)


# What it says of an image

SAME = """
    size cluster_bits cluster_size subclusters_per_cluster subcluster_size subcluster_bits l2_bits l2_size compression_type
    csize_shift csize_mask cluster_offset_mask backing_format feature_table crypto_header
    image_data_file auto_backing_file image_backing_file has_backing_file needs_backing_file has_data_file needs_data_file
    has_subclusters l1_table
""".split()  # noqa: SIM905 - a list of words


def described(reader: Any, image: bytes, **options: Any) -> dict[str, Any]:
    qcow2 = reader.QCow2(io.BytesIO(image), **options)
    found = {name: getattr(qcow2, name) for name in SAME}
    found["l1_table"] = list(found["l1_table"])
    found["header"] = qcow2.header.dumps()
    found["l2"] = [qcow2.l2_table(l1 & ((1 << 56) - 512)).entry(0) for l1 in found["l1_table"] if l1]
    found["unknown_extensions"] = [(ext.magic, ext.len, data) for ext, data in qcow2.unknown_extensions]
    found["bitmap_header"] = qcow2.bitmap_header and qcow2.bitmap_header.dumps()
    return found


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (build([0, data_entry(PAYLOAD * CLUSTER)], noise(CLUSTER)), {}),
        (build([0] * 9, cluster_bits=9), {}),
        (build([0], extensions=FEATURES + UNKNOWN), {}),
        (build([(0, 0)], extended=True), {}),
        (build([0], zstd=True), {}),
        (build([0], extensions=extension(0x23852875, struct.pack(">IIQQ", 1, 0, 4096, 5 * CLUSTER))), {}),
        (build([0], backing=("base.Raw", "raw")), {"backing_file": io.BytesIO(b"base")}),
        (build([0], backing=("base.qcow2", None)), {"allow_no_backing_file": True}),
        (
            patched(build([0], extensions=extension(0x44415441, b"data.bin")), 72, struct.pack(">Q", 4)),
            {"allow_no_data_file": True},
        ),
        (WITH_DATA_FILE, {"data_file": io.BytesIO()}),
    ],
    ids=["plain", "512", "extensions", "extended", "zstd", "bitmaps", "backing", "no backing", "no data file", "data file"],
)
def test_attributes(image: bytes, options: Any) -> None:
    if image[79] & 8 and not HAS_ZSTD:
        pytest.skip("dissect needs backports.zstd")
    assert described(FASTQCOW, image, **options) == described(DISSECT, image, **options)


ENCRYPTED = patched(build([0]), 32, struct.pack(">I", 1))
CONTRADICTION = patched(build([0], extended=True, cluster_bits=14), 20, struct.pack(">I", 13))


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (b"not a qcow2 image".ljust(512), InvalidHeaderError, "Invalid qcow2 header magic"),
        (patched(build([0]), 4, struct.pack(">I", 4)), InvalidHeaderError, "Unsupported qcow2 version: 4"),
        (patched(build([0]), 20, struct.pack(">I", 22)), InvalidHeaderError, r"Unsupported cluster size: 2\*\*22"),
        (CONTRADICTION, InvalidHeaderError, "Unsupported subcluster size: 0x100"),
        (ENCRYPTED, NotImplementedError, "Encrypted qcow2 files are not supported"),
        (build([0])[:50], EOFError, None),
        (b"", EOFError, None),
    ],
)
def test_images_that_are_refused(reader: Any, image: bytes, kind: type[Exception], message: str | None) -> None:
    with pytest.raises(kind, match=message):
        reader.QCow2(io.BytesIO(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (patched(build([0]), 36, struct.pack(">I", 1 << 30)), "L1 table is larger than 32 MiB"),
        (patched(build([0]), 100, struct.pack(">I", 20)), "header_length is less than 104"),
        (patched(build([0]), 72, struct.pack(">Q", 1 << 40)), "features that are not known: bit 40"),
        (build([0], extensions=extension(0x12345678, b"", 1 << 31)), "longer than the space for it"),
        (patched(build([0]), 60, struct.pack(">IQ", 1 << 20, CLUSTER)), "more than 65536 snapshots"),
    ],
)
def test_damaged_headers(image: bytes, message: str) -> None:
    """What fastqcow refuses, as an error that dissect's callers expect."""
    with pytest.raises(InvalidHeaderError, match=message) as caught:
        FASTQCOW.QCow2(io.BytesIO(image))
    assert isinstance(caught.value.__cause__, fastqcow.Error | None)


def test_size_in_whole_sectors() -> None:
    """As QEMU counts; to dissect the last part of a sector is there."""
    qcow2 = FASTQCOW.QCow2(io.BytesIO(build([0], size=1000)))
    assert (qcow2.header.size, qcow2.size, qcow2.open().size, len(qcow2.open().read())) == (1000, 512, 512, 512)


def test_damaged_clusters(tmp_path: Path) -> None:
    image = build([compressed_entry(PAYLOAD * CLUSTER, 512, 16)], b"\xff" * 512)
    stream = FASTQCOW.QCow2(io.BytesIO(image)).open()
    with pytest.raises(fastqcow.FormatError, match="guest offset 0x0"):
        stream.read(1)


# Data files


@pytest.fixture
def with_data_file(qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "disk.qcow2"
    monkeypatch.chdir(tmp_path)  # of which the name is counted when it is made
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=data.bin", write(tmp_path, DISK, "disk.raw"), path)
    return path


NO_DATA_FILE = r"^data-file required but not provided \(image_data_file = 'data.bin'\)$"


def test_data_file_beside_the_image(reader: Any, with_data_file: Path) -> None:
    qcow2 = reader.QCow2(with_data_file)
    assert qcow2.path == with_data_file
    assert (qcow2.has_data_file, qcow2.needs_data_file) == (True, True)
    assert Path(qcow2.data_file.name).samefile(with_data_file.with_name("data.bin"))
    assert qcow2.open().read() == DISK


def test_data_file_of_the_caller(reader: Any, with_data_file: Path) -> None:
    with with_data_file.open("rb") as file, with_data_file.with_name("data.bin").open("rb") as data:
        with pytest.raises(Error, match=NO_DATA_FILE):
            reader.QCow2(file)
        qcow2 = reader.QCow2(file, data)
        assert qcow2.data_file is data
        assert qcow2.fh is file
        assert qcow2.open().read() == DISK


def test_data_file_that_comes_later(reader: Any, with_data_file: Path) -> None:
    with with_data_file.open("rb") as file, with_data_file.with_name("data.bin").open("rb") as data:
        qcow2 = reader.QCow2(file, allow_no_data_file=True)
        assert qcow2.data_file is None
        assert not qcow2.has_data_file
        with pytest.raises(Error, match=NO_DATA_FILE):
            qcow2.open()
        qcow2.data_file = data
        assert qcow2.open().read() == DISK


def test_data_file_that_is_missing(reader: Any, with_data_file: Path) -> None:
    with_data_file.with_name("data.bin").unlink()
    with pytest.raises(Error, match=r"^data-file '.*/data\.bin' not found \(image_data_file = 'data.bin'\)$"):
        reader.QCow2(with_data_file)


# Backing files


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("said", [True, False])
def test_backing_file_beside_the_image(reader: Any, tmp_path: Path, kind: str, said: bool) -> None:
    base = write(tmp_path, BASES[kind], "base")
    qcow2 = reader.QCow2(write(tmp_path, overlay("base", kind if said else None)))
    assert (qcow2.has_backing_file, qcow2.needs_backing_file) == (True, True)
    assert isinstance(qcow2.backing_file, reader.QCow2Stream) == (kind == "qcow2")
    if kind == "qcow2":
        assert qcow2.backing_file.qcow2.path == base
        assert qcow2.backing_file.qcow2.fh.name == str(base)
    assert qcow2.open().read() == EXPECTED


NO_BACKING_FILE = r"^backing-file required but not provided \(auto_backing_file = 'base'\)$"


@pytest.mark.parametrize("kind", BASES)
def test_backing_file_of_the_caller(reader: Any, kind: str) -> None:
    image = overlay("base", kind)
    with pytest.raises(Error, match=NO_BACKING_FILE):
        reader.QCow2(io.BytesIO(image))
    base = io.BytesIO(BASES[kind])
    qcow2 = reader.QCow2(io.BytesIO(image), None, base)
    assert kind == "qcow2" or qcow2.backing_file is base
    assert qcow2.open().read() == EXPECTED


def test_stream_as_backing_file(reader: Any) -> None:
    """A stream is the bytes of a disk, whatever the image says of the format."""
    base = reader.QCow2(io.BytesIO(BASES["qcow2"])).open()
    qcow2 = reader.QCow2(io.BytesIO(overlay("base", "qcow2")), backing_file=base)
    assert qcow2.backing_file is base
    assert qcow2.open().read() == EXPECTED
    plain = reader.QCow2(io.BytesIO(overlay("base", "qcow2")), backing_file=io.BytesIO(BASE))
    assert plain.open().read() == EXPECTED


def test_backing_file_that_comes_later(reader: Any) -> None:
    qcow2 = reader.QCow2(io.BytesIO(overlay("base", "raw")), allow_no_backing_file=True)
    assert qcow2.backing_file is None
    with pytest.raises(Error, match=NO_BACKING_FILE):
        qcow2.open()
    qcow2.backing_file = io.BytesIO(BASE)
    assert qcow2.open().read() == EXPECTED
    qcow2.backing_file = io.BytesIO(bytes(3 * CLUSTER))
    assert qcow2.open().read() == bytes(CLUSTER) + TOP + bytes(CLUSTER)


def test_without_a_backing_file(reader: Any) -> None:
    """Who makes the stream alone, and not by open(), is not asked for it."""
    qcow2 = reader.QCow2(io.BytesIO(overlay("base", "raw")), allow_no_backing_file=True)
    assert reader.QCow2Stream(qcow2).read() == bytes(CLUSTER) + TOP + bytes(CLUSTER)


def test_backing_file_that_is_missing(reader: Any, tmp_path: Path) -> None:
    path = write(tmp_path, overlay("base", "raw"))
    with pytest.raises(Error, match=r"^backing-file '.*/base' not found \(auto_backing_file = 'base'\)$"):
        reader.QCow2(path)
    assert reader.QCow2(path, allow_no_backing_file=True).backing_file is None


def test_chain(reader: Any, qemu: Qemu, tmp_path: Path) -> None:
    base = write(tmp_path, BASES["qcow2"], "0.qcow2")
    for i in range(1, 6):
        path = tmp_path / f"{i}.qcow2"
        qemu.img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)
        qemu.io(path, f"write -P {i} {i * 20}k 30k")
        base = path
    stream = reader.QCow2(base).open()
    assert stream.read() == qemu.read(base)
    for i in range(4, -1, -1):
        stream = stream.qcow2.backing_file
        assert stream.qcow2.path.name == f"{i}.qcow2"


def test_layers_share_caches() -> None:
    below = FASTQCOW.QCow2(io.BytesIO(BASES["qcow2"])).open()
    above = FASTQCOW.QCow2(io.BytesIO(overlay("base", "qcow2")), backing_file=below).open()
    below.read(10)
    above.read(10)
    assert above._disk.reader.stats()["clusters_inflated"] == 1


@pytest.mark.parametrize("name", ["../base", "{}/base", "below/../../base", "link"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    """Names in other directories: dissect 3.21 fails with a ValueError, newer ones open every file."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    write(tmp_path, BASE, "base")
    (folder / "link").symlink_to(tmp_path / "base")
    path = write(folder, overlay(name.format(tmp_path), "raw"))
    with pytest.raises(Error, match="outside of the image's directory"):
        FASTQCOW.QCow2(path)
    with (tmp_path / "base").open("rb") as base:
        assert FASTQCOW.QCow2(path, backing_file=base).open().read() == EXPECTED


@pytest.mark.parametrize("name", ["below/base", "{}/below/base", "file:below/base"])
def test_names_that_stay_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", BASE, "base")
    assert FASTQCOW.QCow2(write(tmp_path, overlay(name.format(tmp_path), "raw"))).open().read() == EXPECTED


def test_raw_is_raw_even_if_it_looks_like_qcow2(tmp_path: Path) -> None:
    """Or the guest that wrote to the raw disk would say which file is read next."""
    guest = BASES["qcow2"].ljust(3 * CLUSTER, b"\0")[: 3 * CLUSTER]
    write(tmp_path, guest, "base")
    expected = guest[:CLUSTER] + TOP + guest[2 * CLUSTER :]
    assert FASTQCOW.QCow2(write(tmp_path, overlay("base", "raw"))).open().read() == expected
    assert FASTQCOW.QCow2(io.BytesIO(overlay("base", "raw")), backing_file=io.BytesIO(guest)).open().read() == expected


@pytest.mark.parametrize(
    ("fmt", "kind", "message"),
    [("vmdk", Error, "of the format 'VMDK', which is not supported"), ("qcow2", InvalidHeaderError, "Invalid qcow2 header magic")],
)
def test_backing_files_that_are_something_else(tmp_path: Path, fmt: str, kind: type[Exception], message: str) -> None:
    """dissect takes them for raw ones."""
    write(tmp_path, BASE, "base")
    with pytest.raises(kind, match=message):
        FASTQCOW.QCow2(write(tmp_path, overlay("base", fmt)))


def test_loops(tmp_path: Path) -> None:
    path = write(tmp_path, overlay("other.qcow2", "qcow2"))
    write(tmp_path, overlay("disk.qcow2", "qcow2"), "other.qcow2")
    with pytest.raises(Error, match="one of the images above it"):
        FASTQCOW.QCow2(path)


def test_depth() -> None:
    top = FASTQCOW.QCow2(io.BytesIO(build([0]))).open()
    for _ in range(199):
        top = FASTQCOW.QCow2(io.BytesIO(build([0], backing=("base", "qcow2"))), backing_file=top).open()
    assert top.read(1) == b"\0"
    with pytest.raises(Error, match="deeper than 200"):
        FASTQCOW.QCow2(io.BytesIO(build([0], backing=("base", "qcow2"))), backing_file=top).open()


def test_files_are_closed_with_the_last_user(tmp_path: Path) -> None:
    write(tmp_path, BASES["qcow2"], "base")
    qcow2 = FASTQCOW.QCow2(write(tmp_path, overlay("base", "qcow2")))
    stream, files = qcow2.open(), [qcow2.fh, qcow2.backing_file.qcow2.fh]
    del qcow2
    gc.collect()
    assert [file.closed for file in files] == [False, False]
    del stream
    gc.collect()
    assert [file.closed for file in files] == [True, True]


# Snapshots


@pytest.fixture
def history(qemu: Qemu, disk: Path) -> Path:
    """A disk with two snapshots, of which the second one has the first one's id for a name."""
    qemu.img("snapshot", "-c", "before", disk)
    qemu.io(disk, "write -P 1 10k 100k", "write -P 2 300k 1k")
    qemu.img("snapshot", "-c", "1", disk)
    qemu.io(disk, "write -P 3 0 200k")
    return disk


def test_snapshots(reader: Any, qemu: Qemu, history: Path) -> None:
    with history.open("rb") as file:
        qcow2 = reader.QCow2(file)
        assert [(each.id, each.name) for each in qcow2.snapshots] == [("1", "before"), ("2", "1")]
        for snapshot, expected in zip(qcow2.snapshots, ("before", "snapshot.id=2"), strict=True):
            assert isinstance(snapshot, reader.QCow2Snapshot)
            stream = snapshot.open()
            assert stream.read() == qemu.read(history, expected)
            assert stream.qcow2 is qcow2
            assert list(stream.l1_table) == list(snapshot.l1_table)
            assert reader.QCow2Stream(qcow2, snapshot.l1_table).peek(5000) == stream.readoffset(0, 5000)
        assert qcow2.open().read() == qemu.read(history)


def test_snapshot_attributes(history: Path) -> None:
    def described(reader: Any) -> list[tuple[Any, ...]]:
        with history.open("rb") as file:
            found = [
                (s.offset, s.header.dumps(), s.extra.dumps(), s.unknown_extra, s.id, s.name, s.entry_size, list(s.l1_table))
                for s in reader.QCow2(file).snapshots
            ]
        assert len(found) == 2
        return found

    assert described(FASTQCOW) == described(DISSECT)


def test_snapshot_of_another_image() -> None:
    qcow2, other = (FASTQCOW.QCow2(io.BytesIO(snapshots_image(CLUSTER, 1))) for _ in range(2))
    with pytest.raises(ValueError, match="neither the image's nor that of one of its snapshots"):
        FASTQCOW.QCow2Stream(qcow2, other.snapshots[0].l1_table)


@pytest.mark.parametrize(
    ("image", "message"),
    [(snapshots_image(CLUSTER, (1 << 32) - 1), "larger than 32 MiB"), (snapshots_image(CLUSTER + 8, 1), "not aligned")],
)
def test_damaged_snapshots(image: bytes, message: str) -> None:
    qcow2 = FASTQCOW.QCow2(io.BytesIO(image))
    assert qcow2.open().read() == bytes(CLUSTER)
    with pytest.raises(Error, match=message):
        qcow2.snapshots[0].open()
    with pytest.raises(Error, match=message):
        qcow2.snapshots[0].l1_table  # noqa: B018 - a property that raises


def test_damaged_snapshot_table() -> None:
    qcow2 = FASTQCOW.QCow2(io.BytesIO(snapshots_image(CLUSTER, 1, bytes(1025))))
    with pytest.raises(Error, match="more than 1024 bytes"):
        qcow2.snapshots  # noqa: B018 - a property that raises
    assert qcow2.open().read() == bytes(CLUSTER)
    with pytest.raises(Error, match="past the end of the file"):
        FASTQCOW.QCow2Snapshot(qcow2, 1 << 40)


def test_snapshots_of_an_image_without_its_backing_file() -> None:
    image = patched(snapshots_image(CLUSTER, 1), 8, overlay("base", "raw")[8:20])
    image = patched(image, 112, overlay("base", "raw")[112:200])
    qcow2 = FASTQCOW.QCow2(io.BytesIO(image), allow_no_backing_file=True)
    with pytest.raises(Error, match=NO_BACKING_FILE):
        qcow2.snapshots[0].open()
