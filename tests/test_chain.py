"""Backing chains: which files are opened, and what an overlay shows of them."""

from __future__ import annotations

import io
import os
import signal
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, ZERO, build, data_entry, noise

CLUSTER = 65536
BASE, TOP = noise(2 * CLUSTER, 1), noise(CLUSTER, 2)


def overlay(name: str, fmt: str | None = "raw", clusters: int = 3) -> bytes:
    """The second cluster is the overlay's own."""
    return build([0, data_entry(PAYLOAD * CLUSTER)] + [0] * (clusters - 2), TOP, backing=(name, fmt))


EXPECTED = BASE[:CLUSTER] + TOP + bytes(CLUSTER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for place in (folder, folder / "below", tmp_path):
        (place / "base.raw").write_bytes(BASE)
    return folder


def write(folder: Path, name: str, image: bytes) -> Path:
    path = folder / name
    path.write_bytes(image)
    return path


def test_base_beside_the_image(folder: Path) -> None:
    path = write(folder, "top.qcow2", overlay("base.raw"))
    with fastqcow.open(path) as image:
        assert image.read() == EXPECTED


@pytest.mark.parametrize("name", ["below/base.raw", "./base.raw", "below/../base.raw", "file:base.raw"])
def test_names_that_stay_inside(folder: Path, name: str) -> None:
    with fastqcow.open(write(folder, "top.qcow2", overlay(name))) as image:
        assert image.read() == EXPECTED


def test_absolute_name_inside(folder: Path) -> None:
    with fastqcow.open(write(folder, "top.qcow2", overlay(str(folder / "base.raw")))) as image:
        assert image.read() == EXPECTED


def test_relative_path_of_the_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "top.qcow2", overlay("base.raw"))
    monkeypatch.chdir(folder)
    with fastqcow.open("top.qcow2") as image:
        assert image.read() == EXPECTED


@pytest.mark.parametrize("name", ["../base.raw", "below/../../base.raw", "/etc/passwd"])
def test_names_that_lead_out(folder: Path, name: str) -> None:
    path = write(folder, "top.qcow2", overlay(name))
    with pytest.raises(fastqcow.PolicyError, match="backing='follow'") as caught:
        fastqcow.open(path)
    assert caught.value.path == str(path)
    with fastqcow.open(path, backing="follow") as image:
        assert image.size == 3 * CLUSTER


def test_symbolic_link_that_leads_out(folder: Path) -> None:
    (folder / "link.raw").symlink_to(folder.parent / "base.raw")
    path = write(folder, "top.qcow2", overlay("link.raw"))
    with pytest.raises(fastqcow.PolicyError):
        fastqcow.open(path)
    with fastqcow.open(path, backing="follow") as image:
        assert image.read() == EXPECTED


def test_symbolic_link_to_the_image(folder: Path, tmp_path: Path) -> None:
    """The directory that counts is the one the image really lies in; a name counts from the one it was opened by, as for QEMU."""
    write(folder, "top.qcow2", overlay("base.raw"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "top.qcow2").symlink_to(folder / "top.qcow2")
    with pytest.raises((fastqcow.PolicyError, FileNotFoundError)):
        fastqcow.open(tmp_path / "other" / "top.qcow2")


@pytest.mark.parametrize(
    "name", ["json:{}", "nbd://localhost:1/x", "http://localhost/x", "host_device:/dev/null", "fat:/etc", "ssh:x", "file://x"]
)
@pytest.mark.parametrize("rule", [None, "follow"])
def test_protocols_are_never_opened(folder: Path, name: str, rule: Any) -> None:
    path = write(folder, "top.qcow2", overlay(name))
    with pytest.raises((fastqcow.PolicyError, FileNotFoundError)):
        fastqcow.open(path, backing=rule)
    with fastqcow.open(path, backing=False) as image:
        assert image.read() == bytes(CLUSTER) + TOP + bytes(CLUSTER)


def test_file_given_by_the_caller(folder: Path, tmp_path: Path) -> None:
    path = write(folder, "top.qcow2", overlay("json:{}"))
    with fastqcow.open(path, backing=tmp_path / "base.raw") as image:
        assert image.read() == EXPECTED
    with fastqcow.open(path, backing=io.BytesIO(BASE)) as image:
        assert image.read() == EXPECTED
    with fastqcow.open(io.BytesIO(path.read_bytes()), backing=io.BytesIO(BASE)) as image:
        assert image.read() == EXPECTED


def test_file_object_has_no_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says where an image lies that comes out of memory, so nothing lies beside it."""
    monkeypatch.chdir(folder)
    for name in ("base.raw", str(folder / "base.raw")):
        with pytest.raises(fastqcow.PolicyError):
            fastqcow.open(io.BytesIO(overlay(name)))
    with fastqcow.open(io.BytesIO(overlay(str(folder / "base.raw"))), backing="follow") as image:
        assert image.read() == EXPECTED


@pytest.mark.parametrize("rule", [None, "follow"])
def test_fifo_as_base_is_not_waited_for(folder: Path, rule: Any) -> None:
    os.mkfifo(folder / "fifo")
    with pytest.raises(OSError, match="Not a regular file"):
        fastqcow.open(write(folder, "top.qcow2", overlay("fifo")), backing=rule)


def test_empty_names_are_none(qemu: Qemu, folder: Path) -> None:
    path = write(folder, "top.qcow2", overlay(""))
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path) == bytes(CLUSTER) + TOP + bytes(CLUSTER)
    write(folder, "mid.qcow2", overlay("base.raw"))
    path = write(folder, "top.qcow2", overlay("mid.qcow2", ""))
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path)


def test_names_with_control_characters_do_nothing_to_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, "top.qcow2", overlay("a\x1b[2J\nb\udcff"))
    assert main(["info", str(path)]) == 0
    assert "backing file: a\\x1b[2J\\nb\\udcff" in capsys.readouterr().out
    assert main(["map", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_l1_tables_of_a_chain_are_bounded(folder: Path) -> None:
    """Each may have 32 MiB, in a file that takes no room on the disk."""
    for i in range(9):
        image = build([], size=1 << 36, cluster_bits=9, l1=[0], backing=(f"{i - 1}.qcow2", "qcow2") if i else None)
        path = write(folder, f"{i}.qcow2", image[:36] + (4 << 20).to_bytes(4, "big") + image[40:])
        os.truncate(path, 33 << 20)
    with fastqcow.open(folder / "5.qcow2") as image_of_six:
        assert image_of_six.pread(10, 1 << 35) == bytes(10)
    with pytest.raises(fastqcow.FormatError, match="L1 tables of the backing chain"):
        fastqcow.open(folder / "8.qcow2")


def test_empty_overlay_of_a_fragmented_base_costs_little(folder: Path) -> None:
    """The overlay's tables are not walked anew, to their end, for each cluster that its base shows: that would take a minute."""
    clusters = 20_000
    base = bytearray(build([], size=clusters << 9, cluster_bits=9, l1=[0]))
    tables = bytes([0, 0, 0, 0, 0, 0, 0, ZERO] + [0] * 8) * (clusters // 2)
    l2_at = range(len(base), len(base) + len(tables), 512)
    tables = tables.ljust(len(l2_at) * 512, b"\0")
    base[36:48] = struct.pack(">IQ", len(l2_at), len(base) + len(tables))
    write(folder, "0.qcow2", bytes(base) + tables + struct.pack(f">{len(l2_at)}Q", *l2_at))
    top = bytearray(build([], size=clusters << 9, cluster_bits=9, l1=[0], backing=("0.qcow2", "qcow2")))
    top[36:40] = struct.pack(">I", 4 << 20)
    os.truncate(write(folder, "top.qcow2", bytes(top)), 33 << 20)
    signal.alarm(30)
    try:
        with fastqcow.open(folder / "top.qcow2") as image:
            assert len(list(image.map())) == clusters
    finally:
        signal.alarm(0)


def test_gate(folder: Path, tmp_path: Path) -> None:
    """It is asked for each file of the chain, and answers with a rule."""
    asked: list[tuple[str, str | None, str]] = []
    answers: dict[str, Any] = {"mid": io.BytesIO(overlay("json:{}", None)), "json:{}": io.BytesIO(overlay("../base.raw"))}

    def gate(name: str, fmt: str | None, image: str) -> Any:
        asked.append((name, fmt, image))
        return answers.get(name, tmp_path / "base.raw")

    path = write(folder, "top.qcow2", overlay("mid", "qcow2"))
    with fastqcow.open(path, backing=gate) as image:
        assert image.read() == EXPECTED
    assert asked == [("mid", "qcow2", str(path)), ("json:{}", None, "<BytesIO>"), ("../base.raw", "raw", "<BytesIO>")]


@pytest.mark.parametrize(("answer", "expected"), [(False, bytes(CLUSTER)), ("follow", BASE[:CLUSTER])])
def test_gate_answers_with_a_rule(folder: Path, answer: Any, expected: bytes) -> None:
    with fastqcow.open(write(folder, "top.qcow2", overlay("../base.raw")), backing=lambda name, fmt, image: answer) as image:
        assert image.pread(CLUSTER, 0) == expected


def test_gate_that_leaves_it_to_the_safe_rule(folder: Path) -> None:
    with pytest.raises(fastqcow.PolicyError):
        fastqcow.open(write(folder, "top.qcow2", overlay("../base.raw")), backing=lambda name, fmt, image: None)


def test_gate_that_raises(folder: Path) -> None:
    def gate(name: str, fmt: str | None, image: str) -> None:
        raise PermissionError(name)

    with pytest.raises(PermissionError, match="base"):
        fastqcow.open(write(folder, "top.qcow2", overlay("base.raw")), backing=gate)


def test_corrupt_images_are_read_with_a_warning(folder: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    image = build([data_entry(PAYLOAD * CLUSTER)], TOP)
    path = write(folder, "disk.qcow2", image[:72] + (2).to_bytes(8, "big") + image[80:])
    with pytest.warns(fastqcow.CorruptWarning, match="marked as corrupt"), fastqcow.open(path) as disk:
        assert disk.read() == qemu.read(path) == TOP
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["map", str(path)]) == 0
    assert capsys.readouterr().err == f"fastqcow: warning: {path}: the image is marked as corrupt\n"


def test_dirty_images_are_read(folder: Path, qemu: Qemu) -> None:
    image = build([data_entry(PAYLOAD * CLUSTER)], TOP)
    path = write(folder, "disk.qcow2", image[:72] + (1).to_bytes(8, "big") + image[80:])
    with fastqcow.open(path) as disk:
        assert disk.read() == TOP
        assert disk.info()["dirty-flag"]


def test_missing_base(folder: Path) -> None:
    path = write(folder, "top.qcow2", overlay("none.raw"))
    with pytest.raises(FileNotFoundError) as caught:
        fastqcow.open(path)
    assert caught.value.filename == str(folder / "none.raw")
    assert fastqcow.info(path)["backing-filename"] == "none.raw"


def test_format_is_not_guessed(folder: Path) -> None:
    with pytest.raises(fastqcow.FormatError, match="not guessed"):
        fastqcow.open(write(folder, "top.qcow2", overlay("base.raw", None)))
    write(folder, "mid.qcow2", overlay("base.raw"))
    with fastqcow.open(write(folder, "top.qcow2", overlay("mid.qcow2", None))) as image:
        assert image.read() == BASE[:CLUSTER] + TOP + bytes(CLUSTER)


def test_raw_is_raw_even_if_it_looks_like_qcow2(folder: Path) -> None:
    write(folder, "guest.raw", overlay("/etc/passwd"))
    with fastqcow.open(write(folder, "top.qcow2", overlay("guest.raw", "raw"))) as image:
        assert image.pread(4, 0) == b"QFI\xfb"


def test_other_formats(folder: Path) -> None:
    with pytest.raises(fastqcow.UnsupportedError, match="vmdk"):
        fastqcow.open(write(folder, "top.qcow2", overlay("base.raw", "vmdk")))


def test_loops(folder: Path) -> None:
    path = write(folder, "self.qcow2", overlay("self.qcow2", "qcow2"))
    with pytest.raises(fastqcow.FormatError, match="comes back"):
        fastqcow.open(path)
    write(folder, "a.qcow2", overlay("b.qcow2", "qcow2"))
    with pytest.raises(fastqcow.FormatError, match="comes back"):
        fastqcow.open(write(folder, "b.qcow2", overlay("below/../a.qcow2", "qcow2")))
    os.link(folder / "a.qcow2", folder / "c.qcow2")
    with pytest.raises(fastqcow.FormatError, match="comes back"):
        fastqcow.open(folder / "c.qcow2")


def test_depth(folder: Path) -> None:
    write(folder, "0.qcow2", build([data_entry(PAYLOAD * 512)], b"x" * 512, cluster_bits=9))
    for i in range(1, 201):
        write(folder, f"{i}.qcow2", build([0], backing=(f"{i - 1}.qcow2", "qcow2"), cluster_bits=9))
    with fastqcow.open(folder / "199.qcow2") as image:
        assert image.read() == b"x" * 512
        assert next(image.map()).depth == 199
    with pytest.raises(fastqcow.FormatError, match="deeper than 200"):
        fastqcow.open(folder / "200.qcow2")


def test_error_names_the_layer(folder: Path) -> None:
    write(folder, "mid.qcow2", build([data_entry(999 * CLUSTER)]))
    path = write(folder, "top.qcow2", build([0], backing=("mid.qcow2", "qcow2")))
    with fastqcow.open(path) as image, pytest.raises(fastqcow.FormatError) as caught:
        image.read()
    assert caught.value.path == str(folder / "mid.qcow2")
    assert (caught.value.guest_off, caught.value.host_off) == (0, 999 * CLUSTER)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda: _with(32, b"\0\0\0\7"), "encryption method 7"),
    ],
)
def test_not_yet(tmp_path: Path, image: Any, reason: str) -> None:
    path = write(tmp_path, "disk.qcow2", image())
    with pytest.raises(fastqcow.UnsupportedError, match=reason):
        fastqcow.open(path)
    assert fastqcow.info(path)["format"] == "qcow2"


def _with(offset: int, data: bytes) -> bytes:
    image = build([0])
    return image[:offset] + data + image[offset + len(data) :]


@pytest.mark.parametrize("base_size", [0, 1, 511, 5000, 65536, 100_000, 300_000])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_base_of_another_size(qemu: Qemu, tmp_path: Path, base_size: int, fmt: str) -> None:
    raw, base, path = tmp_path / "b.raw", tmp_path / f"b.{fmt}", tmp_path / "top.qcow2"
    raw.write_bytes(noise(base_size))
    if fmt == "qcow2":
        qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, base)
    qemu.img("create", "-q", "-f", "qcow2", "-b", base, "-F", fmt, path, "192k")
    qemu.io(path, "write -P 3 100k 4k")
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path)
    check_commands(qemu, path)
