"""compare and checksum, and their commands: the answers of qemu-img and of hashlib."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import need_full_device
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
    assert main(["checksum", "-a", "shake_128", str(tmp_path / "good")]) == 1
    assert "no length" in capsys.readouterr().err
    with open(need_full_device(), "w") as full:
        command = [sys.executable, "-m", "fastqcow", "compare", *[str(tmp_path / "good")] * 2]
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False).returncode == 2


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


def shake(nbytes: int) -> bytes:
    return hashlib.shake_128(b"fastqcow").digest(nbytes)


MIXED = b"".join(
    (
        shake(100_000),
        bytes(300_000),
        shake(5),
        bytes(3 * CLUSTER),
        shake(2 * CLUSTER),
        bytes(1 << 20),
        shake(1 << 20),
        bytes(CLUSTER - 1),
        b"x",
        bytes(70_001),
    )
)
# What blkhash's own implementation in Python says of them.
BLKHASHES = {
    "nothing": (b"", "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
    "1": (shake(1), "d27aca37aff8f76e732a3c340a1dfd15c6908c05e130e5fd6f88c08914d7ec1f"),
    "65535": (shake(65535), "50fd38c0eaac817f8faab063d33fbc57db6fca256ca087aed8fd5b25396c85fb"),
    "65536": (shake(65536), "fb5e7aeb7f4526c0d11ead8161adff1965080e84b6bf5867e4feda955d0e4bdd"),
    "65537": (shake(65537), "dd18a31411a6ecfbfea16a0cc8a62eedd45803815473d6a03c83a5129bda322b"),
    "1 zero": (bytes(1), "3aa275143d0713bc404144a02208ea1ea840d565fa0c19af486cc65b0a10a267"),
    "65535 zeroes": (bytes(65535), "8d353a9bd4f1656187818dba1da7272427de2c7d4866a2580be468a34c547d24"),
    "65536 zeroes": (bytes(65536), "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af"),
    "65537 zeroes": (bytes(65537), "43702a4ffbe4bdb5c0cf900dd2a899fdd2536b78559f8b55cf0ed7fe1e8195b5"),
    "mixed": (MIXED, "727c3a334a7aee90a7ff4d23c5dc650f6e09de527f3d8b093add845c3b5f156e"),
}


def blkhash(data: bytes) -> str:
    blocks = (hashlib.sha256(data[at : at + 65536]).digest() for at in range(0, len(data), 65536))
    return hashlib.sha256(b"".join(blocks) + len(data).to_bytes(8, "little")).hexdigest()


@pytest.mark.parametrize("name", BLKHASHES)
def test_blkhash_known_answers(name: str) -> None:
    data, expected = BLKHASHES[name]
    seen: list[tuple[int, int]] = []
    assert (
        fastqcow.checksum(fastqcow.open_raw(io.BytesIO(data)), blkhash=True, progress=lambda *done: seen.append(done)) == expected
    )
    assert blkhash(data) == expected
    assert seen == sorted(seen)
    assert not data or seen[-1] == (len(data), len(data))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("md5", "344eeabe731474d7a88ddc7c982f3df2"),
        ("sha3_256", "c9a30dd58e1865abbc83a0634b41f21cb067b7c8b94d479e29b88c3b29d6f2f0"),
        (
            "blake2b",
            "6ce07c2c54641227821d22f0397755223ad9031bd9f95784b356e5eabbc10bcc"
            "e8d2ea097a532cf26f8ce03ea106edc67408a72e2afd34499a37697b2ff8dbdb",
        ),
    ],
)
def test_blkhash_of_other_digests(algorithm: str, expected: str) -> None:
    assert fastqcow.checksum(fastqcow.open_raw(io.BytesIO(MIXED)), algorithm, blkhash=True) == expected


def test_blkhash_of_a_sparse_file(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(64 << 20)
        f.seek(20 << 20)
        f.write(shake(100))
        f.seek((40 << 20) - 1)
        f.write(b"\1")
    with fastqcow.open_raw(tmp_path / "sparse") as disk:
        expected = "ec3907b198458a68755abcbdeeb89806560b3466130e4df64af17298aaae5b85"
        assert fastqcow.checksum(disk, blkhash=True) == expected


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("compress", [[], ["-c"]], ids=["plain", "compressed"])
def test_blkhash_of_qcow2_is_that_of_raw(qemu: Qemu, tmp_path: Path, cluster_bits: int, compress: list[str]) -> None:
    """Small clusters cut blocks, large ones are cut by them, and zeroes start and end anywhere."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(mixed(7 * (1 << 20) + 512, cluster_bits))
    options = f"cluster_size={1 << cluster_bits}"
    qemu.img("convert", "-S", "512", "-f", "raw", "-O", "qcow2", *compress, "-o", options, raw, path)
    with fastqcow.open(path) as image:
        assert fastqcow.checksum(image, blkhash=True) == blkhash(raw.read_bytes())


def test_blkhash_command(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a raw file that ends within a sector, blksum sees what QEMU does: a disk with whole ones."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(MIXED[:200_001])
    qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.img("snapshot", "-c", "before", path)
    qemu.io(path, "write -P 1 0 64k")
    expected = blkhash(MIXED[:200_001].ljust(391 * 512, b"\0"))
    for arguments in ([str(raw)], ["-f", "raw", str(raw)], ["-l", "before", str(path)]):
        assert main(["checksum", "--blkhash", *arguments]) == 0
        assert capsys.readouterr().out == f"{expected}  {arguments[-1]}\n"
    assert main(["checksum", "--blkhash", "--output=json", str(raw)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "filename": str(raw),
        "virtual-size": 391 * 512,
        "algorithm": "sha256",
        "blkhash": True,
        "digest": expected,
    }


@pytest.mark.parametrize(("algorithm", "reason"), [("blake3", "unsupported hash type blake3"), ("shake_128", "no length")])
def test_blkhash_of_no_such_digest(tmp_path: Path, algorithm: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").write_bytes(DATA)
    assert main(["checksum", "--blkhash", "-a", algorithm, str(tmp_path / "disk")]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_blkhash_of_damage_says_where(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([data_entry(AT)] * 40 + [compressed_entry(AT, 3000, 16)], b"\xff" * CLUSTER))
    with fastqcow.open(path) as image, pytest.raises(fastqcow.FormatError) as caught:
        fastqcow.checksum(image, blkhash=True)
    assert caught.value.guest_off == 40 * CLUSTER


def test_blkhash_reads_no_zeroes(tmp_path: Path) -> None:
    """A tebibyte of nothing, with one block of data in it."""
    path = tmp_path / "disk.qcow2"
    l1 = [0] * 2048
    l1[1000] = (1 << 63) | 3 * CLUSTER
    path.write_bytes(build([0, data_entry(AT)], DATA, size=1 << 40, l1=l1))
    at = 1000 * (1 << 29) + CLUSTER
    zero = hashlib.sha256(bytes(CLUSTER)).digest()
    outer = hashlib.sha256()
    for piece in (zero * (at // CLUSTER), hashlib.sha256(DATA).digest(), zero * ((1 << 24) - 1 - at // CLUSTER)):
        outer.update(piece)
    outer.update((1 << 40).to_bytes(8, "little"))
    seen: list[tuple[int, int]] = []
    with fastqcow.open(path) as image:
        assert fastqcow.checksum(image, blkhash=True, progress=lambda *done: seen.append(done)) == outer.hexdigest()
        assert image.stats()["bytes_returned"] == CLUSTER
    assert len(seen) > 500
    assert seen == sorted(seen)
