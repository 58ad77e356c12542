"""Sums up what gcov says of csrc, file by file: lines and branches that ran. Of a header, in the file that uses it most."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple


class Run(NamedTuple):
    lines_run: float
    lines: int
    branches_run: float
    branches: int


found: dict[str, Run] = {}
for block in sys.stdin.read().split("File '")[1:]:
    name = re.match(r".*/csrc/(.*)'", block)
    lines = re.search(r"Lines executed:([\d.]+)% of (\d+)", block)
    branches = re.search(r"Taken at least once:([\d.]+)% of (\d+)", block)
    if name and lines:
        percent, count = (float(branches[1]), int(branches[2])) if branches else (0.0, 0)
        run = Run(float(lines[1]) * int(lines[2]), int(lines[2]), percent * count, count)
        found[name[1]] = max(run, found.get(name[1], run))
found["all"] = Run(*(sum(column) for column in zip(*found.values(), strict=True)))
for file, run in found.items():
    print(f"{file:12} {run.lines_run / run.lines:6.1f}% of {run.lines:5} lines", end="")
    print(f" {run.branches_run / run.branches:6.1f}% of {run.branches:5} branches" if run.branches else "")
