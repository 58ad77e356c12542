"""Workload: a whole compressed image to a raw file, as whole processes, page cache warm, into a name that is new each time.

Peers: qemu-img as it is, and with what makes it fastest (16 coroutines, writes out of order).
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


def test_convert(alternating: Alternating, image: Path, tmp_path: Path) -> None:
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")
    numbers = itertools.count()

    def process(*command: str) -> Callable[[], object]:
        def run() -> None:
            out = tmp_path / str(next(numbers))
            subprocess.run([*command, image, out], check=True)
            out.unlink()

        return run

    alternating(
        {
            "fastqcow": process(sys.executable, "-m", "fastqcow", "convert"),
            "qemu-img": process("qemu-img", "convert", "-O", "raw"),
            "qemu-img -m 16 -W": process("qemu-img", "convert", "-m", "16", "-W", "-O", "raw"),
        }
    )
