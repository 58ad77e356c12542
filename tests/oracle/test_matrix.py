"""Images as qemu-img writes them, over geometry, codec and content: every way to read gives the bytes that qemu-img gives."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from images import mixed, noise, text

GEOMETRIES = [
    (512, False),
    (4096, False),
    (65536, False),
    (2 << 20, False),
    (16384, True),
    (65536, True),
    (2 << 20, True),
]
CODECS = [None, "zlib", "zstd"]
CONTENTS = {
    "zeros": bytes(3 << 20),
    "text": text(3 << 20),
    "incompressible": noise(3 << 20),
    "mixed": mixed(5 << 20),
    "odd-size": mixed((3 << 20) + 512 * 7, seed=1),
}


@pytest.fixture(params=GEOMETRIES, ids=lambda g: f"{g[0]}{'-ext' if g[1] else ''}")
def geometry(request: pytest.FixtureRequest) -> tuple[int, bool]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_way_to_read(qemu: Qemu, tmp_path: Path, geometry: tuple[int, bool], codec: str | None, content: str) -> None:
    cluster_size, extended = geometry
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(CONTENTS[content])
    options = f"cluster_size={cluster_size},extended_l2={'on' if extended else 'off'},compression_type={codec or 'zlib'}"
    qemu.img("convert", *(["-c"] if codec else []), "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    expected = qemu.read(path)
    assert expected == CONTENTS[content]

    rng = random.Random(content)
    places = [(rng.randrange(len(expected) + 1), rng.randrange(1, 150_000)) for _ in range(40)]
    with fastqcow.open(path) as image:
        assert image.size == len(expected)
        assert image.pread(image.size, 0) == expected
        for offset, nbytes in places:
            assert image.pread(nbytes, offset) == expected[offset : offset + nbytes]
        for offset, nbytes in places:
            check_scattered(image, expected, offset, nbytes, rng)
        check_as_file(image, expected)
        with ThreadPoolExecutor(8) as pool:
            for (offset, nbytes), found in zip(places, pool.map(lambda p: image.pread(p[1], p[0]), places), strict=True):
                assert found == expected[offset : offset + nbytes]
    with fastqcow.open(io.BytesIO(path.read_bytes())) as image:
        assert image.read() == expected
    with fastqcow.open(path, engine="libz", threads=1, cache_size=0) as image:
        assert image.read() == expected
    fastqcow.convert(path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == expected
    check_commands(qemu, path)


def check_scattered(image: fastqcow.Image, expected: bytes, offset: int, nbytes: int, rng: random.Random) -> None:
    """Buffers with odd borders, empty ones among them, get the same bytes; what lies beyond the disk stays as it was."""
    buffers: list[bytearray] = []
    while sum(len(b) for b in buffers) < nbytes:
        buffers.append(bytearray(b"\xaa" * rng.choice((0, 1, 511, 513, 4096, 33_333, 70_000))))
    room = sum(len(b) for b in buffers)
    got = image.preadv(buffers, offset)
    assert got == min(room, len(expected) - offset)
    assert b"".join(buffers) == (expected[offset : offset + room] + b"\xaa" * (room - got))


def check_as_file(image: fastqcow.Image, expected: bytes) -> None:
    assert image.seek(0) == 0
    buffered = io.BufferedReader(image, 10_007)
    assert buffered.read(1_000_000) == expected[:1_000_000]
    buffered.detach()
    image.seek(-1000, io.SEEK_END)
    assert image.read(5000) == expected[-1000:]
    assert image.read(1) == b""
    image.seek(77)
    buffer = bytearray(100_001)
    assert image.readinto(buffer) == len(buffer)
    assert buffer == expected[77 : 77 + len(buffer)]
    assert image.tell() == 77 + len(buffer)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_mixed_kinds_of_clusters(qemu: Qemu, tmp_path: Path, compat: str, cluster_size: int) -> None:
    """Compressed, plain, zeroed and discarded clusters side by side, over a backing file."""
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(mixed(1 << 20, seed=5))
    qemu.img("create", "-f", "qcow2", "-o", f"compat={compat},cluster_size={cluster_size}", "-b", base, "-F", "raw", path, "2M")
    qemu.io(path, "write -P 7 100k 300k", "discard 128k 64k")
    if compat == "1.1":
        qemu.io(path, "write -z 200k 64k", "write -z -u 704k 128k")
    qemu.io(path, f"write -c -P 9 512k {cluster_size}", f"write -c -P 10 {1024 - 64}k {cluster_size}")
    with fastqcow.open(path) as image:
        assert image.read() == qemu.read(path)
    check_commands(qemu, path)


def test_subclusters(qemu: Qemu, tmp_path: Path) -> None:
    """Writes and zero writes of single subclusters, over a backing file that shows between them."""
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(noise(1 << 20, seed=6))
    qemu.img("create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", "-b", base, "-F", "raw", path, "1M")
    qemu.io(path, "write -c -P 3 128k 64k")
    rng = random.Random(3)
    for _ in range(60):
        place = f"{2 * rng.randrange(500)}k {2 * rng.randint(1, 12)}k"
        qemu.io(path, rng.choice((f"write -P {rng.randrange(1, 255)} {place}", f"write -z {place}", f"write -z -u {place}")))
    expected = qemu.read(path)
    assert expected is not None
    with fastqcow.open(path) as image:
        assert image.read() == expected
        for offset in range(0, 1 << 20, 1536):
            assert image.pread(700, offset) == expected[offset : offset + 700]
    check_commands(qemu, path)
