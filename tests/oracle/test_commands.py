"""`map`, `info` and `check` say what qemu-img says, field for field, also of every image in the tables of the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_malformed import BITMAPS, HEADERS, SNAPSHOT_TABLES, SNAPSHOTS, SUBCLUSTERS, TABLES
from test_verdicts import DEFLATE, ZSTD

import fastqcow
from cases import TRUNCATED, check_check, check_info, check_map, words
from conftest import Qemu
from fastqcow.cli import main
from images import mixed, text
from test_bitmaps import BAD_DIRECTORIES, GOOD_DIRECTORIES
from test_header import BAD

IMAGES = ["empty", "v2", "zlib", "zstd", "extended", "overlay", "short-base", "deep", "raw-holes", "wide-refcounts", "512"]
IMAGES += ["snapshots", "data-file", "data-file-raw", "bitmaps"]


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest, qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    raw, path = folder / "disk.raw", folder / "disk.qcow2"
    raw.write_bytes(mixed(5 << 20, seed=2))

    def convert(options: str, *more: str) -> None:
        qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", options, *more, raw, path)

    def overlay(base: str, base_format: str, target: Path, size: str, options: str = "cluster_size=64k") -> None:
        qemu.img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", base_format, target, size)

    match request.param:
        case "empty":
            qemu.img("create", "-q", "-f", "qcow2", path, "20G")
        case "v2":
            convert("compat=0.10")
        case "zlib" | "zstd":
            convert(f"compression_type={request.param}", "-c")
        case "extended":
            overlay("disk.raw", "raw", path, "6M", "extended_l2=on")
            qemu.io(path, "write -c 0 64k", "write 70k 10k", "write -z 256k 4k", "write -z -u 512k 64k", "discard 640k 64k")
        case "overlay":
            overlay("disk.raw", "raw", path, "5M")
            qemu.io(path, "write -c 64k 64k", "write 1M 300k", "write -z 2M 64k", "write -z -u 3M 128k", "discard 1M 64k")
        case "short-base":
            overlay("disk.raw", "raw", path, "9M")
            qemu.io(path, "write 8M 64k", "write 4900k 10k")
        case "deep":
            overlay("disk.raw", "raw", folder / "a.qcow2", "5M")
            qemu.io(folder / "a.qcow2", "write 100k 200k", "write -c 1M 64k")
            overlay("a.qcow2", "qcow2", folder / "b.qcow2", "4M", "cluster_size=4k")
            qemu.io(folder / "b.qcow2", "write 150k 20k", "write -z 1M 8k")
            overlay("b.qcow2", "qcow2", path, "6M", "cluster_size=1M")
            qemu.io(path, "write 2M 100")
        case "raw-holes":
            with raw.open("wb") as f:
                f.truncate(6 << 20)
                f.seek(2 << 20)
                f.write(text(1 << 20))
            overlay("disk.raw", "raw", path, "7M")
            qemu.io(path, "write 0 64k", "write 2500k 64k")
        case "wide-refcounts":
            convert("refcount_bits=64,lazy_refcounts=on")
        case "snapshots":
            convert("cluster_size=64k")
            for name in ("first", "second one", "a name that is longer than its column"):
                qemu.img("snapshot", "-c", name, path)
                qemu.io(path, "write 1M 64k")
        case "bitmaps":
            convert("cluster_size=64k")
            qemu.img("bitmap", "--add", path, "one")
            qemu.img("bitmap", "--add", "-g", "4k", "--disable", path, "another one")
        case "data-file":
            convert(f"data_file={folder}/data.raw")
            qemu.io(path, "write -z 64k 64k", "discard 256k 64k", "write 512k 64k")
        case "data-file-raw":
            qemu.img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder}/data.raw,data_file_raw=on", path, "5M")
            qemu.io(path, "write 0 1M", "write -z 64k 64k", "discard 256k 64k")
        case "512":
            convert("cluster_size=512", "-c")
    return path


def test_map(qemu: Qemu, image: Path) -> None:
    check_map(qemu, image)


def test_map_of_a_part(qemu: Qemu, image: Path) -> None:
    check_map(qemu, image, "--start-offset=1000k", "--max-length=2M")


def test_map_covers_the_disk_and_tells_the_truth(image: Path) -> None:
    with fastqcow.open(image) as disk:
        at = 0
        for extent in disk.map():
            assert extent.start == at
            at += extent.length
            if extent.zero and extent.length < 1 << 30:
                assert not any(disk.pread(extent.length, extent.start))
            if extent.depth == 0 and extent.offset is not None and extent.data:
                stored = image.with_name("data.raw") if disk.header.has_data_file else image
                with stored.open("rb") as f:
                    f.seek(extent.offset)
                    assert f.read(min(extent.length, 4096)) == disk.pread(min(extent.length, 4096), extent.start)
        assert at == disk.size


def test_info(qemu: Qemu, image: Path) -> None:
    check_info(qemu, image)
    check_check(qemu, image)


def test_info_for_people(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = qemu.img("info", image).stdout
    assert main(["info", str(image)]) == 0
    assert words(capsys.readouterr().out) == words(theirs)


def test_bytes(qemu: Qemu, image: Path) -> None:
    with fastqcow.open(image) as disk:
        if disk.size < 1 << 30:
            assert disk.read() == qemu.read(image)


IN_TABLES = {
    **{f"deflate: {name}": case.image for name, case in DEFLATE.items()},
    **{f"zstd: {name}": case.image for name, case in ZSTD.items()},
    **{f"header: {name}": case.image for name, case in HEADERS.items()},
    **{f"bad header: {name}": bad[0] for name, bad in BAD.items()},
    **{f"tables: {name}": case.image for name, case in TABLES.items()},
    **{f"subclusters: {name}": case.image for name, case in SUBCLUSTERS.items()},
    **{f"snapshot: {name}": case.image for name, case in SNAPSHOTS.items()},
    **{f"snapshot table: {name}": case.image for name, case in SNAPSHOT_TABLES.items()},
    **{f"bitmaps: {i}": image for i, (image, _) in enumerate(GOOD_DIRECTORIES)},
    **{f"bad bitmaps: {i}": image for i, (image, _) in enumerate(BAD_DIRECTORIES)},
}
OPENING_DIFFERS = {
    "bad header: 1,025 extensions": "QEMU knows no bound on extensions but the first cluster",
    "bad header: truncated extensions": TRUNCATED,
    "bad header: no end of extensions": TRUNCATED,
    "header: snapshot table beyond the end of the file": TRUNCATED,
    "snapshot table: cut within an entry": TRUNCATED,
    "snapshot table: cut within a name": TRUNCATED,
}
MAP_DIFFERS = OPENING_DIFFERS | {
    "header: L1 table of 32 MiB, cut by the end of the file": TRUNCATED,
    "header: L1 table beyond the end of the file": TRUNCATED,
    "header: L1 table: the header": TRUNCATED,
    "tables: L2 table beyond the end of the file": TRUNCATED,
    "tables: L2 table cut by the end of the file": TRUNCATED,
    "tables: L2 table at 2^56 less a cluster": TRUNCATED,
    **{name: BITMAPS for name in IN_TABLES if name.startswith("bad bitmaps: ")},
    **{f"header: {name}": BITMAPS for name, case in HEADERS.items() if case.differs == BITMAPS},
}
INFO_DIFFERS = OPENING_DIFFERS | {
    "snapshot: machine state that claims to be endless": "qemu-img prints its size as a negative number",
}


CHECK_DIFFERS = OPENING_DIFFERS | {
    "bad header: no refcount table": "refused as by every other command; QEMU counts every cluster as wrong",
}


@pytest.mark.filterwarnings("ignore::fastqcow.CorruptWarning")
@pytest.mark.parametrize("name", IN_TABLES)
def test_images_of_the_tables(qemu: Qemu, tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IN_TABLES[name])
    check_map(qemu, path, differs=MAP_DIFFERS.get(name, ""))
    check_info(qemu, path, differs=INFO_DIFFERS.get(name, ""))
    check_check(qemu, path, differs=CHECK_DIFFERS.get(name, ""))
