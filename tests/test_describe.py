"""info: of images that can be read, and of those that cannot. Its fields are compared with QEMU's in oracle/test_commands.py."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main
from images import build, extension, patched

GOOD = build([0, 0])


def u64(offset: int, value: int) -> bytes:
    return patched(GOOD, offset, value.to_bytes(8, "big"))


UNREADABLE = {
    "an unknown feature": (u64(72, 1 << 40), "bit 40"),
    "an unknown compression type": (patched(u64(72, 8), 104, b"\7"), "compression type 7"),
    "encryption": (patched(GOOD, 32, b"\0\0\0\1"), "encrypted"),
    "unknown encryption": (patched(GOOD, 32, b"\0\0\0\5"), "encryption method 5"),
    "a missing backing file": (build([0, 0], backing=("none.raw", "raw")), "No such file"),
    "a backing file elsewhere": (build([0, 0], backing=("/etc/passwd", "raw")), "lies outside"),
    "a data file without a name": (u64(72, 4), "data_file="),
    "an L1 table beyond the end of the file": (u64(40, 99 << 16), "L1 table runs past"),
}


def test_readable() -> None:
    assert "unreadable" not in fastqcow.info(io.BytesIO(GOOD))


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, reason = UNREADABLE[name]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    found = fastqcow.info(path)
    assert (found["format"], found["virtual-size"]) == ("qcow2", 2 * 65536)
    assert reason in found["unreadable"]
    with pytest.raises((fastqcow.Error, OSError)):
        fastqcow.open(path)
    assert main(["info", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("cannot be read: ")
    assert reason in last


def test_damaged_snapshot_table() -> None:
    found = fastqcow.info(io.BytesIO(patched(GOOD, 60, (1).to_bytes(4, "big") + (99 << 16).to_bytes(8, "big"))))
    assert "snapshot table" in found["unreadable"]


def test_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(1000))
    top = tmp_path / "inner" / "top.qcow2"
    top.write_bytes(build([0], backing=("../base.raw", "raw")))
    assert "unreadable" in fastqcow.info(top)
    assert "unreadable" not in fastqcow.info(top, backing="follow")
    assert main(["info", "--backing=follow", str(top)]) == 0
    assert "cannot be read" not in capsys.readouterr().out


def test_it_does_not_warn() -> None:
    """pytest would make a warning an error."""
    assert fastqcow.info(io.BytesIO(u64(72, 2)))["format-specific"]["data"]["corrupt"]


def test_backing_chain(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(100_000))
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "mid.qcow2", "1M")
    top = tmp_path / "top.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", top, "2M")
    theirs = json.loads(qemu.img("info", "--backing-chain", "--output=json", top).stdout)
    assert main(["info", "--backing-chain", "--output=json", str(top)]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours == [{key: value for key, value in layer.items() if key != "children"} for layer in theirs]
    assert main(["info", "--backing-chain", str(top)]) == 0
    assert capsys.readouterr().out.count("image: ") == 3


def test_backing_chain_by_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(1000))
    top = tmp_path / "inner" / "top.qcow2"
    top.write_bytes(build([0], backing=("../base.raw", "raw")))
    assert main(["info", "--backing-chain", str(top)]) == 1
    assert "follow" in capsys.readouterr().err
    assert main(["info", "--backing-chain", "--backing=follow", str(top)]) == 0
    assert "file format: raw" in capsys.readouterr().out


@pytest.mark.parametrize(("fmt", "reason"), [(None, "not guessed"), ("vmdk", "'vmdk'")])
def test_backing_chain_of_other_formats(tmp_path: Path, fmt: str | None, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").write_bytes(bytes(1000))
    (tmp_path / "top.qcow2").write_bytes(build([0], backing=("base", fmt)))
    assert main(["info", "--backing-chain", str(tmp_path / "top.qcow2")]) == 1
    assert reason in capsys.readouterr().err


def test_backing_chain_of_an_image_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.qcow2").write_bytes(UNREADABLE["encryption"][0])
    (tmp_path / "top.qcow2").write_bytes(build([0], backing=("base.qcow2", "qcow2")))
    assert main(["info", "--backing-chain", "--output=json", str(tmp_path / "top.qcow2")]) == 0
    assert [layer.get("encrypted") for layer in json.loads(capsys.readouterr().out)] == [None, True]


def test_backing_chain_that_loops(tmp_path: Path) -> None:
    path = tmp_path / "self.qcow2"
    path.write_bytes(build([0], backing=("self.qcow2", "qcow2")))
    assert "comes back" in fastqcow.info(path)["unreadable"]
    assert main(["info", "--backing-chain", str(path)]) == 1


def test_unknown_extensions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([0], extensions=extension(0x12345678, b"whatever") + extension(1, b"")))
    expected = [{"magic": "0x12345678", "length": 8}, {"magic": "0x00000001", "length": 0}]
    assert fastqcow.info(path)["unknown-extensions"] == expected
    assert main(["info", str(path)]) == 0
    assert "unknown header extension: 0x12345678 (8 bytes)\n" in capsys.readouterr().out
