"""External data files: which are opened, and what their images may say."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from fastqcow.cli import main
from images import COPIED, ZERO, build, compressed_entry, data_entry, extension, noise, patched

CLUSTER = 65536
DATA = noise(4 * CLUSTER)
# The first cluster lies at offset 0: it is there, as COPIED says.
ENTRIES: list[int | tuple[int, int]] = [COPIED, 0, data_entry(2 * CLUSTER), data_entry(3 * CLUSTER) | ZERO]
CONTENTS = DATA[:CLUSTER] + bytes(CLUSTER) + DATA[2 * CLUSTER : 3 * CLUSTER] + bytes(CLUSTER)


def image_with(name: str | None, entries: list[int | tuple[int, int]] = ENTRIES, *, extended: bool = False) -> bytes:
    extensions = b""
    if name is not None:
        extensions = extension(0x44415441, name.encode())
    image = build(entries, extended=extended, extensions=extensions)
    return patched(image, 72, struct.pack(">Q", 4 | (16 if extended else 0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "data.raw").write_bytes(DATA)
    (tmp_path / "data.raw").write_bytes(DATA)
    return folder


def write(folder: Path, image: bytes) -> Path:
    path = folder / "disk.qcow2"
    path.write_bytes(image)
    return path


def test_beside_the_image(qemu: Qemu, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU looks for a relative name in the directory that it runs in, and so finds the file of whoever put one there."""
    path = write(folder, image_with("data.raw"))
    assert qemu.read(path) is None
    monkeypatch.chdir(folder)
    expected = qemu.read(path)
    monkeypatch.undo()
    with fastqcow.open(path) as image:
        assert image.read() == CONTENTS == expected
        assert [extent.offset for extent in image.map()] == [0, None, 2 * CLUSTER, 3 * CLUSTER]


def test_extended_l2_entries(qemu: Qemu, folder: Path) -> None:
    entries: list[int | tuple[int, int]] = [(COPIED, 1 | 2 << 32), (data_entry(CLUSTER), 0xFFFF_FFFF)]
    path = write(folder, image_with(str(folder / "data.raw"), entries, extended=True))
    with fastqcow.open(path) as image:
        assert image.read() == DATA[:2048] + bytes(CLUSTER - 2048) + DATA[CLUSTER : 2 * CLUSTER] == qemu.read(path)
    check_commands(qemu, path)


@pytest.mark.parametrize("name", ["../data.raw", "/etc/passwd", "nbd://localhost/x", "json:{}"])
def test_names_that_lead_out(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, image_with(name))
    with pytest.raises(fastqcow.PolicyError, match="data_file="):
        fastqcow.open(path)
    for given in (folder / "data.raw", io.BytesIO(DATA)):
        with fastqcow.open(path, data_file=given) as image:
            assert image.read() == CONTENTS
    assert main(["map", "--data-file", str(folder / "data.raw"), str(path)]) == 0
    assert str(folder / "data.raw") in capsys.readouterr().out


def test_follow(folder: Path) -> None:
    with fastqcow.open(write(folder, image_with("../data.raw")), data_file="follow") as image:
        assert image.read() == CONTENTS


def test_without_a_name(folder: Path) -> None:
    path = write(folder, image_with(None))
    with pytest.raises(fastqcow.FormatError, match="data_file="):
        fastqcow.open(path)
    with fastqcow.open(path, data_file=folder / "data.raw") as image:
        assert image.read() == CONTENTS


def test_missing_file(folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fastqcow.open(write(folder, image_with("none.raw")))
    assert caught.value.filename == str(folder / "none.raw")


def test_data_file_of_a_backing_file(folder: Path) -> None:
    write(folder, image_with("data.raw"))
    top = folder / "top.qcow2"
    top.write_bytes(build([0] * 4, backing=("disk.qcow2", "qcow2")))
    with fastqcow.open(top) as image:
        assert image.read() == CONTENTS


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (compressed_entry(0, 3000, 16), "compressed, which it cannot be"),
        (data_entry(CLUSTER), "own place"),
        (data_entry(CLUSTER) | ZERO, "own place"),
        (data_entry(512), "not aligned"),
    ],
)
@pytest.mark.parametrize("data_nbytes", [len(DATA), CLUSTER // 2])
def test_bad_entries(qemu: Qemu, folder: Path, entry: int, reason: str, data_nbytes: int) -> None:
    (folder / "data.raw").write_bytes(DATA[:data_nbytes])
    path = write(folder, image_with(str(folder / "data.raw"), [entry]))
    assert qemu.read(path) is None
    with fastqcow.open(path) as image, pytest.raises(fastqcow.FormatError, match=reason) as caught:
        image.read()
    assert caught.value.value == entry
    check_commands(qemu, path)


def test_given_file_counts_for_the_image_alone(folder: Path) -> None:
    write(folder, image_with("data.raw"))
    (folder / "other.raw").write_bytes(bytes(4 * CLUSTER))
    top = folder / "top.qcow2"
    top.write_bytes(build([0] * 4, backing=("disk.qcow2", "qcow2")))
    with fastqcow.open(top, data_file=folder / "other.raw") as image:
        assert image.read() == CONTENTS


def test_cut_data_file(folder: Path) -> None:
    (folder / "data.raw").write_bytes(DATA[: CLUSTER // 2])
    with fastqcow.open(write(folder, image_with("data.raw"))) as image:
        assert image.pread(CLUSTER, 0) == DATA[: CLUSTER // 2] + bytes(CLUSTER // 2)
        with pytest.raises(fastqcow.FormatError, match="beyond the end") as caught:
            image.pread(1, 2 * CLUSTER)
        assert caught.value.path == str(folder / "data.raw")


@pytest.mark.parametrize("raw", ["on", "off"])
def test_as_qemu_makes_them(qemu: Qemu, tmp_path: Path, raw: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw,data_file_raw={raw}", path, "4M")
    qemu.io(path, "write -P 1 0 100k", "write -P 2 1M 1M", "write -z 64k 64k", "discard 1M 128k")
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path)
    check_commands(qemu, path)
    with pytest.raises(ValueError, match=r"d.raw: the image is read from this file"):
        fastqcow.convert(path, tmp_path / "d.raw")


def test_option_of_a_wrong_kind(folder: Path) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError):
        fastqcow.open(write(folder, image_with("data.raw")), data_file=wrong)


def test_there_is_nothing_to_read_without_it(folder: Path) -> None:
    with pytest.raises(fastqcow.PolicyError, match="cannot be read without"):
        fastqcow.open(write(folder, image_with("data.raw")), data_file=False)


def test_gate(folder: Path) -> None:
    asked = []

    def gate(name: str, fmt: str | None, image: str) -> Path:
        asked.append((name, fmt, image))
        return folder / "data.raw"

    path = write(folder, image_with("somewhere/else"))
    with fastqcow.open(path, data_file=gate) as image:
        assert image.read() == CONTENTS
    assert asked == [("somewhere/else", "raw", str(path))]
