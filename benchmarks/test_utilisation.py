"""Workload: the whole of a 64 MiB disk, in order, from an image just opened: by how much of it is used, codec and request size.

The data is that of the real disk where it is densest; a half-used disk has every other MiB of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating, compressed
from peers import readers
from test_sequential import MIB, densest

ROUNDS = 5


@pytest.fixture(scope="module")
def disks(zlib_image: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[Path, Path]]:
    """An image and its raw file, by the share of the disk that is used, in per cent, and the codec."""
    folder = tmp_path_factory.mktemp("utilisation")
    span = densest(zlib_image)

    def made(used: int, method: str) -> tuple[Path, Path]:
        path, image = folder / f"{used}.raw", folder / f"{used}-{method}.qcow2"
        if not path.exists():
            with open(raw, "rb") as source, open(path, "wb") as disk:
                disk.truncate(len(span))
                for at in range(0, len(span), MIB):
                    if at // MIB * used % 100 + used >= 100:
                        source.seek(span.start + at)
                        disk.seek(at)
                        disk.write(source.read(MIB))
        return (image if image.exists() else compressed(path, image, method)), path

    return made


@pytest.mark.parametrize("nbytes", [4096, 65536, 1 << 20])
@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("used", [0, 50, 100])
def test_utilisation(
    alternating: Alternating, disks: Callable[[int, str], tuple[Path, Path]], used: int, method: str, nbytes: int
) -> None:
    image, raw = disks(used, method)

    def read(opened: Callable[[], Callable[[int, int], bytes]]) -> Callable[[], object]:
        def run() -> None:
            pread = opened()
            for offset in range(0, raw.stat().st_size, nbytes):
                pread(nbytes, offset)

        return run

    alternating({name: read(opened) for name, opened in readers(image, raw).items() if name != "libqcow"}, ROUNDS)
