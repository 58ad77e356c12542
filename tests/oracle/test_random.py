"""Random images: mixed writes, zero writes, discards, compressed writes, snapshots and resizes over random geometry and chains, all
made by QEMU's tools. Whatever comes of it, fastqcow reads what qemu-img reads.

Some seeds run always; `pytest --random-images=2000 tests/oracle/test_random.py` tries more, and `--random-seed` others.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

import fastqcow
from cases import check_commands
from conftest import Qemu
from images import mixed

SIZE_MAX = 6 << 20


class Maker:
    """Makes one image, and those below it, from a seed."""

    def __init__(self, qemu: Qemu, folder: Path, seed: int) -> None:
        self.qemu = qemu
        self.folder = folder
        self.rng = random.Random(seed)
        self.made = 0

    def image(self, depth: int = 0) -> Path:
        rng = self.rng
        path = self.folder / f"{self.made}.qcow2"
        self.made += 1
        size = rng.randrange(1, SIZE_MAX // 512) * 512
        cluster_bits = rng.choice((9, 10, 12, 14, 16, 16, 17, 21))
        version = rng.choice(("1.1", "1.1", "1.1", "0.10"))
        options = [f"cluster_size={1 << cluster_bits}", f"compat={version}"]
        if version == "1.1":
            options.append(f"compression_type={rng.choice(('zlib', 'zstd'))}")
            options.append(f"refcount_bits={rng.choice((1, 8, 16, 64))}")
            options.append(f"extended_l2={'on' if cluster_bits >= 14 and rng.random() < 0.5 else 'off'}")
        below = self.below(depth)
        if below:
            self.qemu.img(
                "create", "-q", "-f", "qcow2", "-o", ",".join(options), "-b", below, "-F", below.suffix[1:], path, str(size)
            )
        elif rng.random() < 0.5:
            raw = self.raw(size)
            self.qemu.img("convert", "-f", "raw", "-O", "qcow2", *rng.choice(([], ["-c"])), "-o", ",".join(options), raw, path)
        else:
            self.qemu.img("create", "-q", "-f", "qcow2", "-o", ",".join(options), path, str(size))
        for _ in range(rng.randrange(4)):
            self.write_to(path, size, 1 << cluster_bits)
            if rng.random() < 0.4:
                self.qemu.img("snapshot", "-c", f"s{rng.randrange(1000)}", path, check=False)
            if rng.random() < 0.3:
                size = rng.randrange(1, SIZE_MAX // 512) * 512
                self.qemu.img("resize", "-q", "--shrink", path, str(size), check=False)
        return path

    def below(self, depth: int) -> Path | None:
        if depth == 3 or self.rng.random() < 0.5:
            return None
        if self.rng.random() < 0.3:
            return self.raw(self.rng.randrange(1, SIZE_MAX))
        return self.image(depth + 1)

    def raw(self, size: int) -> Path:
        path = self.folder / f"{self.made}.raw"
        self.made += 1
        path.write_bytes(mixed(size, self.rng.randrange(1 << 30)))
        return path

    def write_to(self, path: Path, size: int, cluster_size: int) -> None:
        """Some of these fail, a compressed write over data for one; that is QEMU's to decide."""
        commands = []
        for _ in range(self.rng.randrange(1, 12)):
            start = self.rng.randrange(size // 512) * 512
            length = min(self.rng.choice((512, 4096, 20_480, cluster_size, 300 << 10)), size - start)
            pattern = self.rng.randrange(1, 256)
            kinds = (f"write -P {pattern}", "write -z", "write -z -u", "discard")
            command = f"{self.rng.choice(kinds)} {start} {length}"
            if self.rng.random() < 0.3:
                start = start // cluster_size * cluster_size
                command = f"write -c -P {pattern} {start} {min(cluster_size, size - start)}"
            commands += ["-c", command]
        subprocess.run(["qemu-io", *commands, path], capture_output=True, check=False)


# QEMU marks some of them as corrupt when it makes them, and goes on.
@pytest.mark.filterwarnings("ignore::fastqcow.CorruptWarning")
def test_random_image(qemu: Qemu, tmp_path: Path, random_image_seed: int) -> None:
    maker = Maker(qemu, tmp_path, random_image_seed)
    path = maker.image()
    check(qemu, path, maker.rng)
    with fastqcow.open(path) as image:
        for entry in image.snapshots:
            copy = tmp_path / "copy.qcow2"
            shutil.copy(path, copy)
            if qemu.img("snapshot", "-a", entry.id, copy, check=False).returncode == 0:
                with image.snapshot(entry.id) as snapshot:
                    assert snapshot.read() == qemu.read(copy)


def check(qemu: Qemu, path: Path, rng: random.Random) -> None:
    expected = qemu.read(path)
    if expected is None:  # one that QEMU has damaged itself, with a compressed write into a cluster that a snapshot shares
        with fastqcow.open(path) as image, pytest.raises(fastqcow.FormatError):
            image.read()
        return
    with fastqcow.open(path, threads=rng.choice((1, 3)), cache_size=rng.choice((0, 100_000, 1 << 25))) as image:
        for _ in range(30):
            offset, nbytes = rng.randrange(len(expected) + 1), rng.choice((1, 512, 5000, 100_000))
            assert image.pread(nbytes, offset) == expected[offset : offset + nbytes]
        assert image.read() == expected
        fastqcow.convert(image, path.with_suffix(".out"), sparse_size=rng.choice((0, 512, 4096, 65536)))
    assert path.with_suffix(".out").read_bytes() == expected
    check_commands(qemu, path)
