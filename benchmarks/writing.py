"""Writes the tables of docs/writing.md from the results of a run of test_writing.py, those that it has; `script/bench` calls it.

python -m pytest benchmarks/test_writing.py --benchmark-json=RESULTS.json
python benchmarks/writing.py RESULTS.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from performance import DOCS, Info, machine, time_text, versions

MIB = 1 << 20


def peers_table(results: dict[str, Info]) -> Iterable[str]:
    """fastqcow at its default and at its fast level, and qemu-img, for each disk and method."""
    yield "| disk, method | | median | times fastqcow | bytes |"
    yield "|---|---|---|---|---|"
    for name, info in results.items():
        if found := re.fullmatch(r"write(_fast)?\[(.*)\]", name):
            level = ", `compression_level=fast`" if found[1] else ""
            for peer, of in info.items():
                yield f"| {found[2]}{level} | {peer} | {time_text(of['median_s'])} | {of['over_subject']:.2f} | {of['nbytes']:,} |"


def levels_table(info: Info) -> Iterable[str]:
    yield "| level | time | times that of zlib 6 | bytes |"
    yield "|---|---|---|---|"
    for name, of in info.items():
        yield f"| {name} | {time_text(of['median_s'])} | {of['over_subject']:.2f} | {of['nbytes']:,} |"


def replaced(page: str, name: str, lines: Iterable[str]) -> str:
    """The page with what stands between the comments of this name."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(start)
    return before + start + "\n".join(["", *lines, "", end]) + rest.partition(end)[2]


def main() -> None:
    with open(sys.argv[1]) as file:
        run: dict[str, Any] = json.load(file)
    results = {b["name"].removeprefix("test_"): b["extra_info"] for b in run["benchmarks"] if b["extra_info"]}
    page = (DOCS / "writing.md").read_text()
    said = f"{machine(run['machine_info'])}; {'; '.join(versions())}; {run['datetime'][:10]}."
    page = replaced(page, "machine", [said])
    if "write[zlib]" in results:
        page = replaced(page, "peers", peers_table(results))
    if "levels" in results:
        page = replaced(page, "levels", levels_table(results["levels"]))
    (DOCS / "writing.md").write_text(page)


if __name__ == "__main__":
    main()
