"""Workload: a Python process that imports fastqcow and does nothing else; against one that does nothing at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from alternating import Alternating


def test_import(alternating: Alternating) -> None:
    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    alternating({"import fastqcow": process("import fastqcow"), "pass": process("pass")})
