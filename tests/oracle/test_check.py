"""`check` counts what `qemu-img check` counts, and exits as it does, on sound images and on damaged ones.

Differences on purpose: overlaps, a field that qemu-img does not have; images that need other files or a password to be opened,
which a check does not.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Qemu
from fastqcow.checking import Finding, check
from fastqcow.cli import main
from images import COPIED, compressed_entry, mixed, patched

KINDS = ["plain", "v2", "compressed", "zstd", "extended", "512", "2M", "snapshots", "bitmaps", "resized", "data-file"]
KINDS += [f"refcount-bits-{bits}" for bits in (1, 2, 4, 8, 32, 64)]

# Of others the end of the file may cut off the table of snapshots or bitmaps, which is an error here; QEMU takes it for zeroes.
CUTTABLE = ("plain", "compressed", "zstd", "extended", "512", "2M", "resized", "data-file")


def make(qemu: Qemu, kind: str, path: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(mixed(2 << 20, seed=3))

    def convert(options: str, *more: str) -> None:
        qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", options, *more, raw, path)

    match kind.rsplit("-", 1):
        case ["plain"]:
            convert("cluster_size=64k")
        case ["v2"]:
            convert("compat=0.10")
            qemu.img("snapshot", "-c", "one", path)
        case ["compressed"]:
            convert("cluster_size=64k", "-c")
        case ["zstd"]:
            convert("compression_type=zstd,cluster_size=4k", "-c")
        case ["extended"]:
            convert("extended_l2=on")
            qemu.io(path, "write -z 100k 10k", "discard 256k 64k", "write -c 1M 64k")
        case ["512" | "2M" as size]:
            convert(f"cluster_size={size}")
        case ["snapshots"]:
            convert("cluster_size=4k")
            qemu.img("resize", "-q", path, "3M")
            for i in range(3):
                qemu.img("snapshot", "-c", f"number {i}", path)
                qemu.io(path, "write 300k 64k", "write -z 1M 100k", "discard 1500k 8k", f"write -c {2100 + 4 * i}k 4k")
        case ["bitmaps"]:
            convert("cluster_size=64k")
            qemu.img("bitmap", "--add", path, "one")
            qemu.img("bitmap", "--add", "-g", "4k", "--disable", path, "another one")
            qemu.io(path, "write 500k 100k")
        case ["resized"]:
            convert("cluster_size=4k")
            qemu.img("resize", "-q", path, "100M")
            qemu.io(path, "write 90M 2M")
            qemu.img("resize", "-q", "--shrink", path, "1M")
        case ["data", "file"]:
            convert(f"data_file={path.parent}/data.raw")
            qemu.io(path, "write -z 64k 64k", "discard 256k 64k", "write 512k 64k")
        case ["refcount-bits", bits]:
            convert(f"refcount_bits={bits},cluster_size=4k")
            if bits != "1":
                qemu.img("snapshot", "-c", "one", path)
                qemu.io(path, "write 300k 64k")


@pytest.fixture(scope="module")
def made(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An image of each kind, made once."""
    images: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in images:
            images[kind] = tmp_path_factory.mktemp(kind) / "disk.qcow2"
            make(qemu, kind, images[kind])
        return images[kind]

    return find


def compare(qemu: Qemu, path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Ask both; returns what they found."""
    theirs = qemu.img("check", "-f", "qcow2", "--output=json", path, check=False)
    capsys.readouterr()
    code = main(["check", "--output=json", str(path)])
    said = capsys.readouterr()
    assert code == theirs.returncode, said.err + theirs.stderr
    if not theirs.stdout:
        assert not said.out
        return {}
    ours: dict[str, Any] = json.loads(said.out)
    ours.pop("overlaps", None)
    assert ours == json.loads(theirs.stdout), said.err + theirs.stderr
    findings: list[Finding] = []
    result = check(path, report=findings.append)
    if not result.not_reported:
        assert sum(f.times for f in findings if f.severity == "corruption") == result.corruptions
        assert sum(f.times for f in findings if f.severity == "leak") == result.leaks
    assert len(said.err.splitlines()) == len(findings) + (code == 1) + bool(result.not_reported)
    human = qemu.img("check", "-f", "qcow2", path, check=False).stdout
    if not result.overlaps:
        assert main(["check", str(path)]) == code
        assert capsys.readouterr().out == human
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_sound(qemu: Qemu, made: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(qemu, made(kind), capsys)
    assert "corruptions" not in found
    assert check(made(kind)).overlaps == 0


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def damaged(image: bytes, rng: random.Random) -> bytes:
    """With one number changed: an L1 entry, an L2 entry, one of the refcount table, or refcounts."""
    (cluster_bits,) = struct.unpack_from(">I", image, 20)
    l1_entries, l1_off, table_off = struct.unpack_from(">IQQ", image, 36)
    cluster = 1 << cluster_bits
    l1 = [x & 0x00FF_FFFF_FFFF_FE00 for (x,) in struct.iter_unpack(">Q", image[l1_off : l1_off + 8 * l1_entries])]
    block_off = int.from_bytes(image[table_off : table_off + 8], "big")
    places = [l1_off + 8 * rng.randrange(l1_entries), table_off + 8 * rng.randrange(2)]
    places += [rng.choice([x for x in l1 if x] or [l1_off]) + 8 * rng.randrange(cluster // 8) for _ in range(2)]
    if block_off < len(image):
        places += [block_off + 8 * rng.randrange(min(64, cluster // 8)) for _ in range(2)]
    at = rng.choice(places)
    if at + 8 > len(image):
        return image
    (old,) = struct.unpack_from(">Q", image, at)
    values = [
        old ^ 1 << rng.randrange(64),
        old ^ COPIED,
        0,
        COPIED | rng.randrange(len(image) // cluster + 2) * cluster,
        rng.randrange(len(image) // 512 + 4) * 512,
        compressed_entry(rng.randrange(len(image)), rng.randrange(1, cluster), cluster_bits),
        rng.getrandbits(64),
        old + 1 & (1 << 64) - 1,
        old + cluster & (1 << 64) - 1,
    ]
    return patched(image, at, u64(rng.choice(values)))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged(
    qemu: Qemu, made: Callable[[str], Path], tmp_path: Path, kind: str, damage_seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"{kind} {damage_seed}")
    image = made(kind).read_bytes()
    for _ in range(rng.choice((1, 1, 2, 5))):
        image = damaged(image, rng)
    if damage_seed == 0 and kind in CUTTABLE:
        image = image[: rng.randrange(len(image) // 2, len(image))]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    compare(qemu, path, capsys)
