"""Workload: a whole compressed image to a raw file, as whole processes, page cache warm, into a name that is new each time.

Peers: qemu-img as it is, and with what makes it fastest (16 coroutines, writes out of order). And what `--check`, `--verify` and
`--checksum` add.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating

FASTQCOW = (sys.executable, "-m", "fastqcow", "convert")


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Callable[[], object]]:
    """What runs a command on an image."""
    numbers = itertools.count()

    def process_of(image: Path, *command: str) -> Callable[[], object]:
        def run() -> None:
            out = tmp_path / str(next(numbers))
            subprocess.run([*command, image, out], check=True, stdout=subprocess.DEVNULL)
            out.unlink()

        return run

    return process_of


def test_convert(alternating: Alternating, image: Path, process: Callable[..., Callable[[], object]]) -> None:
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")
    alternating(
        {
            "fastqcow": process(image, *FASTQCOW),
            "qemu-img": process(image, "qemu-img", "convert", "-O", "raw"),
            "qemu-img -m 16 -W": process(image, "qemu-img", "convert", "-m", "16", "-W", "-O", "raw"),
        }
    )


def test_convert_checked(alternating: Alternating, zlib_image: Path, process: Callable[..., Callable[[], object]]) -> None:
    peers = {"convert": process(zlib_image, *FASTQCOW)}
    for option in ("--check", "--verify", "--checksum"):
        peers[option] = process(zlib_image, *FASTQCOW, option)
    alternating(peers)
