"""Writes docs/performance.md and its plots from the results of a run of the suites; `script/bench` calls it.

    python benchmarks/performance.py RESULTS.json

RESULTS is what pytest-benchmark's `--benchmark-json` writes. `targets` says what is to be reached, and by which of the results;
everything else on the page is the results as they are.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import fastqcow
from fastqcow.cpus import available_cpus

DOCS = Path(__file__).parents[1] / "docs"
MIB = 1 << 20

Info = dict[str, Any]  # a benchmark's extra_info: for each peer its median and other figures


def times_faster(*peers: str) -> Callable[[Info], float]:
    """How often the best of these peers' time is that of the subject."""
    return lambda info: float(min(info[peer]["over_subject"] for peer in peers))


def of(peer: str) -> Callable[[Info], float]:
    """The subject's time over a peer's."""
    return lambda info: 1 / float(info[peer]["over_subject"])


def size_of(peer: str) -> Callable[[Info], float]:
    """The size of the subject's file over that of a peer's."""
    return lambda info: float(info["fastqcow"]["nbytes"]) / float(info[peer]["nbytes"])


def memory(info: Info) -> float:
    return float(info["memory_nbytes"]) / MIB


def more_than(peer: str, subject: str) -> Callable[[Info], float]:
    return lambda info: (float(info[subject]["median_s"]) - float(info[peer]["median_s"])) * 1e3


class Target(NamedTuple):
    """what: of {} is the parameter. tests: a pattern of the tests' names."""

    what: str
    tests: str
    value: Callable[[Info], float]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def text(self) -> str:
        bound, limit = ("at least", self.at_least) if self.at_least is not None else ("at most", self.at_most)
        return f"{bound} {limit:g}{self.unit}"

    def met(self, value: float) -> bool:
        """As printed: with two decimals."""
        value = round(value, 2)
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0)


def targets(threads: int) -> list[Target]:
    limit = f"limit, {threads} threads"
    return [
        Target(
            "whole image into memory, of the limit's speed: {}", r"read_into_memory\[(.*)\]", times_faster(limit), at_least=0.95
        ),
        Target(
            "`convert` to raw, times the best qemu-img: {}",
            r"convert\[(.*)\]",
            times_faster("qemu-img", "qemu-img -m 16 -W"),
            at_least=3,
        ),
        Target(
            "in order, times dissect.hypervisor: {} bytes", r"sequential\[(.*)\]", times_faster("dissect.hypervisor"), at_least=5
        ),
        Target("in order, times qemu-nbd: {} bytes", r"sequential\[(.*-4096)\]", times_faster("qemu-nbd"), at_least=10),
        Target("random 4 KiB, first time, of one bare inflation: {}", r"first_time\[(.*)\]", of("limit, 1 thread"), at_most=1.15),
        Target("random 4 KiB, cached, of os.pread{}", r"cached()", of("raw file"), at_most=2.5),
        Target("boot, cold, of one thread's bare inflation: {}", r"boot\[(.*)\]", of("limit, 1 thread"), at_most=0.75),
        Target("boot, cold, times qemu-nbd: {}", r"boot\[(.*)\]", times_faster("qemu-nbd"), at_least=8),
        Target("boot, once more, of os.pread{}", r"second_boot()", of("raw file"), at_most=1.3),
        Target("random cached, 8 threads' time of 2 threads'{}", r"cached_by_many_threads()", of("2 threads"), at_most=1),
        Target("`convert -c`, times qemu-img: {}", r"write\[(.*)\]", times_faster("qemu-img"), at_least=1.8),
        Target("`convert -c`, times qemu-img -m 16 -W: {}", r"write\[(.*)\]", times_faster("qemu-img -m 16 -W"), at_least=1),
        Target("`convert -c`, of the size of qemu-img's: {}", r"write\[(.*)\]", size_of("qemu-img"), at_most=1.005),
        Target("`convert -c`, fast, times qemu-img: {}", r"write_fast\[(.*zlib)\]", times_faster("qemu-img"), at_least=8),
        Target("`convert -c`, fast, of the size of qemu-img's: {}", r"write_fast\[(.*zlib)\]", size_of("qemu-img"), at_most=1.1),
        Target("`convert -c` by 2 threads, times 1: {}", r"write_by_threads\[(.*)\]", times_faster("1 thread"), at_least=1.85),
        Target("memory of `convert -c`: {}", r"memory_of_writing\[(.*)\]", memory, at_most=256, unit=" MiB"),
        Target("memory of a conversion: {}", r"memory_of_convert\[(.*)\]", memory, at_most=128, unit=" MiB"),
        Target("memory of random reads (cache 32 MiB): {}", r"memory_of_random_reads\[(.*)\]", memory, at_most=96, unit=" MiB"),
        Target("copy over NBD, times qemu-nbd{}", r"nbd_copy()", times_faster("qemu-nbd"), at_least=2),
        Target("boot over NBD, times qemu-nbd{}", r"nbd_boot()", times_faster("qemu-nbd"), at_least=4),
        Target("boot over NBD, of nbdkit's raw file{}", r"nbd_boot()", of("nbdkit, raw file"), at_most=1.5),
        Target("every file, times dissect.hypervisor{}", r"every_file()", times_faster("dissect.hypervisor"), at_least=2),
        Target("`import fastqcow` over bare Python{}", r"import()", more_than("pass", "import fastqcow"), at_most=30, unit=" ms"),
    ]


def target_rows(results: dict[str, Info], threads: int) -> Iterable[str]:
    yield "| workload | measured | target | |"
    yield "|---|---|---|---|"
    for target in targets(threads):
        for name, info in results.items():
            if not (found := re.fullmatch(target.tests, name)):
                continue
            try:
                value = target.value(info)
            except KeyError:
                continue  # a peer that is not installed
            met = "met" if target.met(value) else "**missed**"
            yield f"| {target.what.format(found[1])} | {value:.2f}{target.unit} | {target.text()} | {met} |"


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def table(info: Info) -> Iterable[str]:
    sized = any("nbytes" in found for found in info.values())
    yield f"| | median | least to most | times the first |{' bytes |' if sized else ''}"
    yield f"|---|---|---|---|{'---|' if sized else ''}"
    for peer, found in info.items():
        least_to_most = f"{time_text(found['least_s'])} to {time_text(found['most_s'])}"
        nbytes = f" {found['nbytes']:,} |" if sized else ""
        yield f"| {peer} | {time_text(found['median_s'])} | {least_to_most} | {found['over_subject']:.2f} |{nbytes}"


def bars(title: str, groups: dict[str, dict[str, float]], unit: str) -> str:
    """A plot of horizontal bars in groups, the first of each in colour."""
    longest = max((value for group in groups.values() for value in group.values()), default=1)
    left, width, row = 170, 520, 25
    parts, y = [f'<text x="20" y="28" font-size="16" font-weight="600">{escape(title)}</text>'], 44
    for name, group in groups.items():
        y += 12
        parts.append(f'<text x="20" y="{y + 6}" font-weight="600" fill="#444">{escape(name)}</text>')
        y += 14
        for i, (peer, value) in enumerate(group.items()):
            length = max(width * value / longest, 1)
            fill, weight = ("#0b7a75", "600") if i == 0 else ("#b8bec6", "400")
            parts.append(
                f'<text x="20" y="{y + 14}" fill="#444">{escape(peer)}</text>'
                f'<rect x="{left}" y="{y}" width="{length:.0f}" height="18" rx="2" fill="{fill}"/>'
                f'<text x="{left + length + 8:.0f}" y="{y + 14}" font-weight="{weight}">{value:.3g} {unit}</text>'
            )
            y += row
    said = "; ".join(
        f"{name}: " + ", ".join(f"{peer} {value:.3g} {unit}" for peer, value in g.items()) for name, g in groups.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {y + 16}" font-family="system-ui, sans-serif" font-size="14" '
        f'fill="#1a1a1a" role="img" aria-label="{escape(title)}. {escape(said)}">\n'
        f'<rect width="800" height="{y + 16}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def plot(results: dict[str, Info], title: str, tests: str, leave_out: Iterable[str] = ()) -> str | None:
    """Milliseconds of every peer, a group for each test."""
    groups = {
        found[1] or found[0]: {peer: f["median_s"] * 1e3 for peer, f in info.items() if peer not in leave_out}
        for name, info in results.items()
        if (found := re.fullmatch(tests, name))
    }
    return bars(title, groups, "ms") if groups else None


PLOTS = {
    "convert": ("A compressed Debian image to raw, whole process: milliseconds, less is better", r"convert\[(zlib|zstd)\]", ()),
    "sequential": (
        "64 MiB in order through Python, by image and request size: milliseconds, less is better",
        r"sequential\[(zl.*|zs.*)\]",
        ("libqcow", "qemu-nbd"),
    ),
    "boot": ("The reads of a machine that boots: milliseconds, less is better", r"boot\[(.*)\]", ("libqcow",)),
}

SECTIONS = {
    "Whole images into memory": r"read_into_memory.*",
    "Whole images to a file": r"convert.*",
    "Compressed images written": r"write.*|levels",
    "In order": r"sequential.*",
    "Random reads": r"first_time.*|cached.*",
    "A machine that boots": r"boot.*|second_boot.*",
    "Over NBD": r"nbd.*",
    "Every file through dissect": r"every_file",
    "Many processes, by Dask": r"workers.*",
    "By utilisation, codec and request size": r"utilisation.*",
    "Start": r"import",
}


def versions() -> Iterable[str]:
    built = fastqcow.build_info()._asdict()
    yield f"fastqcow {fastqcow.__version__} with " + ", ".join(f"{name} {text}" for name, text in built.items() if text)
    yield f"Python {platform.python_version()}"
    for command in ("qemu-img", "nbdkit"):
        try:
            said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):
            continue
        yield said.split(" (")[0]
    for package in ("dissect.hypervisor", "libqcow-python"):
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue


def machine(info: dict[str, Any]) -> str:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpu = info["cpu"].get("brand_raw", info["machine"])
    return f"{cpu}, {available_cpus()} CPUs, {gib:.0f} GiB, {info['system']} {info['release']}"


def page(results: dict[str, Info], run: dict[str, Any], plots: dict[str, str]) -> Iterable[str]:
    yield "# How fast, and against what\n"
    yield "Written by `script/bench`, from one run; to see it for your machine, run that. The suites are those in `benchmarks/`,"
    yield "where each says what it measures. Peers take turns, so that a machine's drift hits all of them; what counts is the"
    yield "median of the ratios. Ratios are printed with two decimals, and compared with the targets as printed.\n"
    yield f"- Machine: {machine(run['machine_info'])}"
    yield f"- Versions: {'; '.join(versions())}"
    yield f"- Run: {run['datetime'][:10]}"
    yield "- Images: zlib, a real Debian system, 1 GiB with 152 MB in 2,315 compressed clusters, written by qemu-img; zstd, the"
    yield "  same disk; large zlib and large zstd, 640 MiB of a machine's files in ext4"
    yield "- The limit: the same clusters inflated from memory by `fastqcow.inflate_into`, with nothing around\n"
    yield "## Targets\n"
    yield from target_rows(results, available_cpus())
    for title, tests in SECTIONS.items():
        found = {name: info for name, info in results.items() if re.fullmatch(tests, name) and "memory_nbytes" not in info}
        if not found:
            continue
        yield f"\n## {title}"
        for name in plots:
            if re.fullmatch(tests, name):
                yield f"\n![{PLOTS[name][0]}]({name}.svg)"
        for name, info in found.items():
            yield f"\n`{name}`\n"
            yield from table(info)


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    results = {b["name"].removeprefix("test_"): b["extra_info"] for b in run["benchmarks"] if b["extra_info"]}
    plots = {name: svg for name, (title, tests, without) in PLOTS.items() if (svg := plot(results, title, tests, without))}
    for name, svg in plots.items():
        (DOCS / f"{name}.svg").write_text(svg)
    (DOCS / "performance.md").write_text("\n".join(page(results, run, plots)) + "\n")
    print("\n".join(target_rows(results, available_cpus())))


if __name__ == "__main__":
    main()
