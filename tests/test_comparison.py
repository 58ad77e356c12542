"""compare and checksum, and their commands: the answers of qemu-img and of hashlib."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, ZERO, build, compressed_entry, data_entry, deflate, mixed, noise, patched, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
DATA = text(CLUSTER)
STREAM = deflate(DATA)


def plain(*clusters: bytes) -> bytes:
    return build([data_entry(AT + i * CLUSTER) for i in range(len(clusters))], b"".join(clusters))


PAIRS = {
    "the same, plain and compressed": (plain(DATA), build([compressed_entry(AT, len(STREAM), 16)], STREAM + bytes(999))),
    "the last byte": (plain(DATA, DATA), plain(DATA, DATA[:-1] + b"x")),
    "the first byte": (plain(DATA), plain(b"x" + DATA[1:])),
    "a byte within a sector": (plain(DATA), plain(patched(DATA, 40_000, b"\0"))),
    "zeroes of three kinds": (plain(bytes(CLUSTER), DATA), build([ZERO, data_entry(AT)], DATA)),
    "zeroes against nothing": (build([ZERO, 0]), build([0, ZERO])),
    "data against nothing": (plain(DATA, DATA), build([0, data_entry(AT)], DATA)),
    "longer, followed by zeroes": (plain(DATA), plain(DATA, bytes(CLUSTER))),
    "longer, followed by nothing": (build([data_entry(AT), 0, 0], DATA), plain(DATA)),
    "longer, followed by data": (plain(DATA, bytes(CLUSTER), noise(CLUSTER)), plain(DATA)),
    "nothing at all": (build([], size=0, l1=[]), build([], size=0, l1=[])),
    "nothing against something": (build([], size=0, l1=[]), plain(DATA)),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    for path, image in zip(paths, PAIRS[request.param], strict=True):
        path.write_bytes(image)
    return paths


@pytest.mark.parametrize("options", [[], ["-s"], ["-q"]], ids=["", "strict", "quiet"])
def test_as_qemu_compares(qemu: Qemu, pair: tuple[Path, Path], options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    theirs = qemu.img("compare", *options, *pair, check=False)
    code = main(["compare", *options, str(pair[0]), str(pair[1])])
    assert (code, capsys.readouterr().out) == (theirs.returncode, theirs.stdout)


def test_with_a_raw_file(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(mixed(9 << 20))
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    assert main(["compare", str(raw), str(image)]) == 0
    assert main(["compare", "-F", "raw", "-f", "qcow2", str(image), str(raw)]) == 0
    with raw.open("r+b") as f:
        f.seek(7_000_000)
        f.write(b"different")
    assert main(["compare", str(image), str(raw)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"Content mismatch at offset {7_000_000 // 512 * 512}!"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (build([data_entry(AT + 512)]), "not aligned"),
        (b"KDMV" + bytes(600), "vmdk"),
        (b"vhdxfile" + bytes(9), "vhdx"),
    ],
)
def test_what_cannot_be_read_is_exit_code_2(
    tmp_path: Path, content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good").write_bytes(plain(DATA))
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    for names in (("good", "bad"), ("bad", "good")):
        assert main(["compare", *(str(tmp_path / name) for name in names)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert reason in said.err


def test_errors_of_any_kind_are_exit_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 would say that the images differ."""
    (tmp_path / "good").write_bytes(plain(DATA))
    (tmp_path / "bad").write_bytes(build([0], backing=("x\x1b[31m\ny", "raw")))
    assert main(["compare", str(tmp_path / "good"), str(tmp_path / "bad")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said
    command = f"{sys.executable} -m fastqcow compare {tmp_path}/good {tmp_path}/good > /dev/full"
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 2
    assert main(["checksum", "-a", "shake_128", str(tmp_path / "good")]) == 1
    assert "no length" in capsys.readouterr().err


def test_raw_file_that_ends_within_a_sector(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(DATA[:1000])
    qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    theirs = qemu.img("compare", "-f", "raw", raw, path, check=False)
    assert (main(["compare", "-f", "raw", str(raw), str(path)]), capsys.readouterr().out) == (theirs.returncode, theirs.stdout)
    assert main(["checksum", str(raw)]) == 0
    assert capsys.readouterr().out.split()[0] == hashlib.sha256(DATA[:1000]).hexdigest()


def test_compare_by_rule(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.raw").write_bytes(DATA)
    (tmp_path / "inner" / "top.qcow2").write_bytes(build([0], backing=("../base.raw", "raw")))
    images = [str(tmp_path / "inner" / "top.qcow2"), str(tmp_path / "base.raw")]
    assert main(["compare", *images]) == 2
    assert main(["compare", "--backing=follow", *images]) == 0


def test_difference(tmp_path: Path) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    for path, data in zip(paths, (DATA, DATA[:700] + b"\0" + DATA[701:]), strict=True):
        path.write_bytes(plain(data))
    with fastqcow.open(paths[0]) as one, fastqcow.open(paths[1]) as other:
        assert fastqcow.compare(one, other) == fastqcow.Difference("content", 512)
        assert fastqcow.compare(one, one) is None


def test_much_of_nothing_takes_no_time(tmp_path: Path) -> None:
    for name, entry in (("a", 0), ("b", ZERO)):
        (tmp_path / name).write_bytes(build([entry], size=1 << 50, cluster_bits=21, l1=[0] * 2047 + [(1 << 63) | 3 << 21]))
    with fastqcow.open(tmp_path / "a") as one, fastqcow.open(tmp_path / "b") as other:
        assert fastqcow.compare(one, other) is None
        difference = fastqcow.compare(one, other, strict=True)
    assert difference == fastqcow.Difference("status", 2047 << 39)


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "blake2b"])
def test_checksum(tmp_path: Path, algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    data = mixed(9 * CLUSTER)
    path.write_bytes(build([data_entry(AT + i * CLUSTER) for i in range(9)] + [0] * 90, data))
    expected = hashlib.new(algorithm, data + bytes(90 * CLUSTER)).hexdigest()
    seen: list[Any] = []
    with fastqcow.open(path) as image:
        assert fastqcow.checksum(image, algorithm, progress=lambda *done: seen.append(done)) == expected
        assert seen[-1] == (image.size, image.size)
    assert main(["checksum", "-a", algorithm, str(path)]) == 0
    assert capsys.readouterr().out == f"{expected}  {path}\n"
    assert main(["checksum", "-a", algorithm, "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == expected


def test_checksum_of_raw_files_and_snapshots(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(DATA * 3)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.img("snapshot", "-c", "before", path)
    qemu.io(path, "write -P 1 0 64k")
    expected = hashlib.sha256(DATA * 3).hexdigest()
    for arguments in ([str(raw)], ["-l", "before", str(path)]):
        assert main(["checksum", *arguments]) == 0
        assert capsys.readouterr().out.split()[0] == expected
    assert main(["checksum", "-l", "before", str(raw)]) == 1
    assert main(["checksum", "-a", "nonsense", str(raw)]) == 1
    assert capsys.readouterr().err.count("\n") == 2
