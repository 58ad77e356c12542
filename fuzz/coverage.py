"""Sums up what gcov says, file by file of csrc: lines and branches that ran."""

from __future__ import annotations

import re
import sys

total = [0.0, 0, 0.0, 0]
for block in sys.stdin.read().split("\n\n"):
    name = re.search(r"File '.*/csrc/(.*)'", block)
    lines = re.search(r"Lines executed:([\d.]+)% of (\d+)", block)
    branches = re.search(r"Taken at least once:([\d.]+)% of (\d+)", block)
    if name and lines:
        found = [*map(float, lines.groups()), *(map(float, branches.groups()) if branches else (100.0, 0.0))]
        print(f"{name[1]:12} {found[0]:6.1f}% of {found[1]:5.0f} lines {found[2]:6.1f}% of {found[3]:5.0f} branches")
        total = [total[0] + found[0] * found[1], total[1] + found[1], total[2] + found[2] * found[3], total[3] + found[3]]
print(f"{'all':12} {total[0] / total[1]:6.1f}% of {total[1]:5.0f} lines {total[2] / total[3]:6.1f}% of {total[3]:5.0f} branches")
