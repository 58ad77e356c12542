"""`fastqcow bench`: what compression costs on an image, and what is left of it with fastqcow."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fastqcow.cli.common import Commands, add_image, add_opening, add_output, at_snapshot, opening, size_text
from fastqcow.errors import printable
from fastqcow.image import Image
from fastqcow.image import open as open_image

if TYPE_CHECKING:
    from fastqcow.benchmark import Benchmark, Measurement
    from fastqcow.diskfile import DiskFile
    from fastqcow.makeup import MakeUp

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure what compression costs on an image",
        description="Say what an image is made of, and measure how fast it is read: against the same bytes uncompressed, in a "
        "temporary file in $TMPDIR, and against qemu-img, and qemu-nbd where libnbd is, if they are installed. "
        "Each measurement takes about as long as --seconds says, a trace and the conversion some times that.",
        epilog="example: fastqcow bench --report bench.html disk.qcow2",
    )
    add_image(parser)
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="an internal snapshot, by id or name, in place of the disk")
    parser.add_argument("--trace", metavar="FILE", help="replay requests too: lines of 'offset length', both in decimal bytes")
    parser.add_argument("--seconds", type=_seconds, default=1.0, metavar="S", help="what each measurement may take, about (1)")
    parser.add_argument("--no-raw", action="store_true", help="write no uncompressed copy, and do not compare with one")
    parser.add_argument("--no-qemu", action="store_true", help="do not compare with QEMU's tools")
    parser.add_argument("--report", metavar="FILE", help="write a page with plots too: one HTML file, complete in itself")
    add_opening(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 3600:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time; write seconds, more than 0 and up to 3600")


def run(arguments: argparse.Namespace) -> int:
    with open_image(arguments.image, **opening(arguments)) as image:
        disk = at_snapshot(image, arguments.snapshot)
        assert isinstance(disk, Image)
        if arguments.report is not None:
            _check_target(disk, arguments.report, arguments.trace)
        from fastqcow.benchmark import benchmark
        from fastqcow.replay import read_trace

        trace = None if arguments.trace is None else read_trace(arguments.trace, disk.size)
        with _status() as report:
            found = benchmark(
                disk,
                seconds=arguments.seconds,
                trace=trace,
                uncompressed=not arguments.no_raw,
                qemu=not arguments.no_qemu,
                report=report,
            )
    if arguments.report is not None:
        from fastqcow.report import page

        with open(arguments.report, "w", encoding="utf-8", errors="replace") as f:
            f.write(page(found))
    if arguments.output == "json":
        import json

        print(json.dumps(fields(found), indent=4))
    else:
        print("\n".join(printable(line) for line in human(found)))
    return 0


def _check_target(disk: DiskFile, path: str, trace: str | None) -> None:
    """Before anything is measured: that the report can be written, and over nothing that is read."""
    from fastqcow.conversion import refuse_source

    folder = os.path.dirname(path) or "."
    if os.path.exists(path):
        refuse_source(disk._open_reader(), path)
        if trace is not None and os.path.exists(trace) and os.path.samefile(trace, path):
            raise ValueError(f"{path}: the trace is read from this file, so it cannot be the report")
    if os.path.isdir(path):
        raise IsADirectoryError(21, os.strerror(21), path)
    os.stat(folder)


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], object] | None]:
    """On a terminal a line that says what is being measured."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda title: print(f"\r\033[Kmeasuring: {printable(title)}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def fields(found: Benchmark) -> dict[str, Any]:
    """What there is as JSON: the names of the dataclasses with hyphens, and sizes that are keys as text."""
    import dataclasses

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name).replace("_", "-"): renamed(each) for name, each in value.items()}
        return [renamed(each) for each in value] if isinstance(value, (list, tuple)) else value

    made: dict[str, Any] = renamed(dataclasses.asdict(found))
    made["make-up"]["ratio"] = found.make_up.ratio
    made["left-out"] = [{"what": what, "why": why} for what, why in found.left_out]
    return made


def human(found: Benchmark) -> list[str]:
    qemu = f", QEMU {found.qemu}" if found.qemu else ""
    lines = [
        f"image: {found.filename}",
        *make_up_lines(found.make_up),
        f"fastqcow {found.fastqcow} with {found.engine}{qemu}; {found.cpus} CPUs; medians of runs that took turns",
    ]
    if found.measurements:
        lines += ["", f"{'':<28}{'reader':<29}{'MB/s':>8}{'a read':>10}{'99 %':>10}{'speed':>9}{'inflated':>10}"]
    for each in found.measurements:
        lines += measurement_lines(each)
    if found.measurements:
        lines += ["", "speed: over fastqcow's. inflated: bytes for each byte read, and what a reader inflates that keeps nothing."]
    if any(each.name == "convert" and len(each.results) > 1 for each in found.measurements) and found.qemu:
        lines += ["qemu-img convert is a process, and its start counts; fastqcow's conversion runs within this one."]
    return lines + [f"left out: {what}: {why}" for what, why in found.left_out]


def make_up_lines(found: MakeUp) -> list[str]:
    total = sum(found.units.values()) or 1
    name = "clusters" if found.unit_size == found.cluster_size else "subclusters"
    lines = [
        f"disk: {size_text(found.virtual_size)} in a file of {size_text(found.file_size)}; {name} of {size_text(found.unit_size)}"
    ]
    for kind, count in found.units.items():
        if count or kind in ("compressed", "plain"):
            lines.append(f"  {kind:<13}{count:>12} {name}{size_text(count * found.unit_size):>12}{count / total:>9.1%}")
    if found.looked_at < 1:
        lines.append(f"  an estimate from {found.looked_at:.1%} of the tables")
    if found.ratio is not None:
        sizes = ", ".join(f"{share:.0%} at {at:.0%}" for share, at in quantiles(found))
        lines.append(
            f"compression: {found.compression_type}, {found.ratio:.2f} to 1 "
            f"({size_text(found.compressed_clusters * found.cluster_size)} in {size_text(found.compressed_nbytes)})"
        )
        lines.append(f"sizes of compressed clusters, up to: {sizes} of a cluster")
        times = ", ".join(f"{size_text(n)}: {amplification:g}" for n, amplification in found.amplification.items())
        lines.append(f"inflated for each byte of a read by who keeps nothing: {times}")
    return lines


def quantiles(found: MakeUp) -> Iterator[tuple[float, float]]:
    """Shares of the compressed clusters, and the share of a cluster that these take at most."""
    bins, left = len(found.compressed_sizes) - 1, iter((0.1, 0.5, 0.9))
    share, seen = next(left), 0
    for number, count in enumerate(found.compressed_sizes, 1):
        seen += count
        while seen and seen >= share * found.compressed_clusters:
            yield share, min(number, bins) / bins
            if (share := next(left, 2.0)) > 1:
                return


def measurement_lines(found: Measurement) -> Iterator[str]:
    from fastqcow.replay import time_text

    title = found.title
    if len(title) > 27:
        yield title
        title = ""
    for result in found.results:
        a_read = time_text(result.seconds / found.requests * 1e9) if found.requests and found.threads == 1 else ""
        whole = time_text(result.seconds * 1e9) if not found.requests else a_read
        last = time_text(result.latency.p99_ns) if result.latency else ""
        inflated = f"{found.inflated:.2f}" if result.reader == "fastqcow" else ""
        if inflated and found.inflated_uncached is not None:
            inflated += f" / {found.inflated_uncached:.2f}"
        rate = (
            f"{result.nbytes_per_second / 1e6:.0f}"
            if result.nbytes_per_second >= 9.95e6
            else f"{result.nbytes_per_second / 1e6:.1f}"
        )
        yield f"{title:<28}{result.reader:<29}{rate:>8}{whole:>10}{last:>10}{result.speed:>9.2f}  {inflated}".rstrip()
        title = ""
