"""A benchmark as a page: one HTML file that is complete in itself, with plots as inline SVG, in light and dark.

No script, nothing loaded from anywhere: it can be mailed, archived, and opened in ten years. It is well-formed XML too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from fastqcow.cli.common import size_text
from fastqcow.errors import printable
from fastqcow.replay import OCTAVE, time_text

if TYPE_CHECKING:
    from fastqcow.benchmark import Benchmark, Measurement, Result
    from fastqcow.makeup import MakeUp

__all__ = ["page"]

WIDTH = 560
COLUMNS = 64  # of the map
_MAPPED = ("compressed", "plain", "zero", "invalid")
_CLASSES = {"fastqcow": "own", "uncompressed": "raw", "qemu-nbd": "nbd", "qemu-img convert -m 16 -W": "img2"}

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5d6878; --line: #dfe3e9;
  --own: #2563d9; --raw: #7c8798; --img: #d9702b; --img2: #b5591c; --nbd: #a8479a;
  --compressed: #0d9488; --plain: #e0a21b; --zero: #9aa7b8; --unallocated: #e6e9ee; --invalid: #d13b3b; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9aa6b6; --line: #323b48;
  --own: #6ea3ff; --raw: #97a3b4; --img: #f0985a; --img2: #d9803f; --nbd: #d98acb;
  --compressed: #2cc3b3; --plain: #ecbc4d; --zero: #6b788a; --unallocated: #2a323e; --invalid: #f06a6a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 75ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 16px; margin: 24px 0 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.tile b { display: block; font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em; }
.tile span { color: var(--soft); font-size: 13.5px; line-height: 1.4; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 4px; padding: 0; list-style: none; font-size: 13.5px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.tile span, h2, td { overflow-wrap: anywhere; }
.legend small { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; max-height: 300px; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--soft); }
svg text.name { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--line); stroke-width: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .left { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; min-width: 130px; }
.map { max-height: none; }
@media (max-width: 640px) { .map text { display: none; } }
tr.first td { border-top: 1px solid var(--line); }
td.bar { min-width: 150px; text-align: left; padding-left: 0; }
td.bar i { display: inline-block; height: 10px; border-radius: 2px 5px 5px 2px; vertical-align: baseline; }
td.bar span { margin-left: 7px; color: var(--soft); }
footer { margin-top: 20px; color: var(--soft); font-size: 13.5px; }
footer ul { margin: 4px 0 0; padding-left: 20px; }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round; }
.area { stroke: none; fill-opacity: 0.13; }
"""


def page(found: Benchmark) -> str:
    """The whole page, as text to be written in UTF-8."""
    cards = []
    if found.make_up.compressed_clusters:
        cards.append(_sizes_card(found.make_up))
    sequential = [each for each in found.measurements if each.name == "sequential"]
    if sequential:
        cards.append(_throughput_card(sequential))
    cards += [_latency_card(each) for each in found.measurements if each.name in ("random", "trace")]
    if len(cards) % 2:
        cards[-1] = cards[-1].replace('class="card"', 'class="card wide"', 1)
    cards = [_map_card(found.make_up), *cards, *([_table_card(found.measurements)] if found.measurements else [])]
    title = f"{_text(found.filename.rsplit('/', 1)[-1])}: what compression costs"
    tiles = "".join(f'<div class="card tile"><b>{value}</b><span>{said}</span></div>' for value, said in _tiles(found))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>{_colours()}{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{_subtitle(found)}</p>
<div class="tiles">{tiles}</div>
<div class="cards">
{"".join(cards)}
</div>
{_footer(found)}
</main>
</body>
</html>
"""


def _colours() -> str:
    """For each colour a class that fills, one that strokes, and one for a legend's square."""
    names = ("own", "raw", "img", "img2", "nbd", "compressed", "plain", "zero", "unallocated", "invalid")
    return "".join(
        f".f-{n} {{ fill: var(--{n}); }} .s-{n} {{ stroke: var(--{n}); }} .b-{n} {{ background: var(--{n}); }}\n" for n in names
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _subtitle(found: Benchmark) -> str:
    made = found.make_up
    backing = " over a backing file" if made.has_backing else ""
    return (
        f"{size_text(made.virtual_size)} disk{backing} in a file of {size_text(made.file_size)}, {_text(made.compression_type)} "
        f"clusters of {size_text(made.cluster_size)}. {_text(found.filename)}"
    )


def _tiles(found: Benchmark) -> Iterator[tuple[str, str]]:
    made = found.make_up
    if made.ratio is not None:
        inflated, stored = size_text(made.compressed_clusters * made.cluster_size), size_text(made.compressed_nbytes)
        yield f"{made.ratio:.2f} : 1", f"compression: {inflated} take {stored}"
    by_name = {each.name: each for each in reversed(found.measurements)}  # of the sequential ones, the one of small requests
    for name in ("trace", "random"):
        each = by_name.get(name)
        raw = _speed(each, "uncompressed")
        if each and raw:
            yield _times(raw), f"the time of the uncompressed bytes, {_text(each.title)}: what compression still costs"
            break
    for name, peer, what in (
        ("trace", "qemu-nbd", "as fast as qemu-nbd"),
        ("sequential", "qemu-img bench", "as fast as qemu-img bench"),
        ("convert", "qemu-img convert", "as fast as qemu-img convert"),
    ):
        each = by_name.get(name)
        speed = _speed(each, peer)
        if each and speed:
            yield _times(1 / speed), f"{what}, {_text(each.title)}"
    sequential = by_name.get("sequential")
    if sequential and sequential.inflated_uncached and not found.qemu:
        yield (
            f"{sequential.inflated:.2f}",
            f"bytes inflated for each one read, {_text(sequential.title)}; {sequential.inflated_uncached:.1f} by who keeps nothing",
        )


def _speed(found: Measurement | None, reader: str) -> float | None:
    return next((result.speed for result in found.results if result.reader == reader), None) if found else None


def _times(number: float) -> str:
    return f"{number:.1f}\u00d7" if number < 9.95 else f"{number:.0f}\u00d7"


def _reader_class(reader: str) -> str:
    return _CLASSES.get(reader, "img")


def _legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """(colour, name, what follows it)."""
    items = (f'<li><i class="b-{colour}"></i>{name} <small>{rest}</small></li>' for colour, name, rest in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _map_card(found: MakeUp) -> str:
    total = sum(found.units.values()) or 1
    unit = "clusters" if found.unit_size == found.cluster_size else "subclusters"
    entries = [
        (kind, kind, f"{size_text(count * found.unit_size)}, {count:,} {unit}, {count / total:.1%}")
        for kind, count in found.units.items()
        if count
    ]
    said = "The disk from its first byte, line by line; the paler, the less is stored there."
    if found.has_backing:
        said += " Unallocated ranges are read from the backing file."
    if found.looked_at < 1:
        said += f" Estimated from {found.looked_at:.1%} of the tables."
    return f'<section class="card wide"><h2>What is where</h2><p>{said}</p>{_map(found)}{_legend(entries)}</section>'


def _map(found: MakeUp) -> str:
    """A cell has the colour of what there is most of in it, empty space aside."""
    width, left, pitch, height = 1140, 74, 16.6, 15.4
    columns = min(COLUMNS, max(len(found.cells), 1))
    pitch_x = (width - left) / columns
    rows = -(-len(found.cells) // columns)
    parts = []
    for row in range(rows):
        first = row * columns
        here = found.cells[first : first + columns]
        y = row * pitch
        if row % 2 == 0:
            offset = first * found.virtual_size // len(found.cells)
            parts.append(f'<text x="{left - 10}" y="{y + 12:.1f}" text-anchor="end">{size_text(offset) if offset else "0"}</text>')
        for column, shares in enumerate(here):
            stored = min(sum(shares), 1.0)
            x, box = left + column * pitch_x, f'width="{pitch_x - 1.4:.1f}" height="{height - 0.2:.1f}" rx="2"'
            parts.append(f'<rect class="f-unallocated" x="{x:.1f}" y="{y:.1f}" {box}/>')
            if stored:
                kind = _MAPPED[shares.index(max(shares))]
                start, end = ((first + column + i) * found.virtual_size // len(found.cells) for i in (0, 1))
                named = ", ".join(f"{share:.0%} {name}" for name, share in zip(_MAPPED, shares, strict=True) if share)
                title = f"<title>{size_text(start)} to {size_text(end)}: {named}</title>"
                opacity = f"{0.25 + 0.75 * stored:.2f}"
                parts.append(f'<rect class="f-{kind}" fill-opacity="{opacity}" x="{x:.1f}" y="{y:.1f}" {box}>{title}</rect>')
    return _svg(width, max(rows, 1) * pitch, "A map of the disk", parts, "map")


def _svg(width: float, height: float, label: str, parts: Iterable[str], sort: str = "plot") -> str:
    return f'<svg class="{sort}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _sizes_card(found: MakeUp) -> str:
    left, top, width, height = 52, 12, WIDTH - 72, 200
    counts = found.compressed_sizes
    bins = len(counts) - 1
    most, step = _round_up(max(counts))
    pitch = width / (bins + 1)
    parts = []
    for value in range(0, most + 1, step):
        y = top + height - height * value / most
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4.5:.1f}" text-anchor="end">{value:,}</text>')
    for number, count in enumerate(counts):
        if count:
            tall = max(height * count / most, 1.5)
            upper = size_text(found.cluster_size * (number + 1) // bins)
            said = f"up to {upper}: {count:,}" if number < bins else f"more than a cluster: {count:,}"
            place = f'x="{left + number * pitch + 1:.1f}" y="{top + height - tall:.1f}"'
            size = f'width="{pitch - 2:.1f}" height="{tall:.1f}" rx="2"'
            parts.append(f'<rect class="f-compressed" {place} {size}><title>{said}</title></rect>')
    for quarter in range(5):
        x = left + quarter * bins / 4 * pitch
        text = size_text(found.cluster_size * quarter // 4) if quarter else "0"
        parts.append(f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{text}</text>')
    svg = _svg(WIDTH, top + height + 28, "Compressed clusters by size", parts)
    said = f"Compressed clusters by the bytes that they take in the file, of {size_text(found.cluster_size)} each."
    return f'<section class="card"><h2>How small clusters became</h2><p>{said}</p>{svg}</section>'


def _round_up(largest: int) -> tuple[int, int]:
    """The end of an axis from 0, and the distance of its lines: a round number, four lines or so."""
    step = max(10 ** int(math.log10(max(largest, 1))) // 2, 1)
    while largest > 5 * step:
        step *= 2
    return -(-max(largest, 1) // step) * step, step


def _decades(smallest: float, largest: float) -> tuple[int, int]:
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    return low, max(high, low + 1)


def _throughput_card(found: Sequence[Measurement]) -> str:
    left, top, width, height = 74, 14, WIDTH - 210, 220
    readers = list(dict.fromkeys(result.reader for each in found for result in each.results))
    rates = [result.nbytes_per_second for each in found for result in each.results]
    low, high = _decades(min(rates), max(rates))
    parts = []

    def place(column: int, rate: float) -> tuple[float, float]:
        x = left + 30 + (width - 60) * column / max(len(found) - 1, 1)
        return x, top + height - height * (math.log10(rate) - low) / (high - low)

    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4.5:.1f}" text-anchor="end">{_rate_text(10.0**power)}</text>')
    labels = []
    for column, each in enumerate(found):
        x = place(column, rates[0])[0]
        size = size_text(each.request_nbytes or 0)
        parts.append(f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{size}</text>')
    for reader in readers:
        colour, points = _reader_class(reader), []
        for column, each in enumerate(found):
            for result in each.results:
                if result.reader == reader:
                    points.append((*place(column, result.nbytes_per_second), result))
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline class="curve s-{colour}" points="{line}"/>')
        for x, y, result in points:
            said = f"{_text(reader)}: {_rate_text(result.nbytes_per_second)}"
            parts.append(f'<circle class="f-{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{said}</title></circle>')
        labels.append((points[-1][1], reader, points[-1][2]))
    at = -math.inf
    for y, reader, result in sorted(labels, key=lambda label: label[0]):
        at = max(at + 38, y)  # names that would lie over each other move down
        x = left + width - 8
        parts.append(f'<text class="name" x="{x}" y="{at - 1:.1f}">{_text(reader)}</text>')
        parts.append(f'<text x="{x}" y="{at + 15:.1f}">{_rate_text(result.nbytes_per_second)}</text>')
    svg = _svg(WIDTH, top + height + 28, "Throughput by request size", parts)
    said = "Sequential reads by the size of a request; the scale is logarithmic."
    return f'<section class="card"><h2>Throughput by request size</h2><p>{said}</p>{svg}</section>'


def _rate_text(rate: float) -> str:
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if rate >= scale * 0.9995:
            return f"{rate / scale:.3g} {unit}"
    return f"{rate:.3g} B/s"


def _latency_card(found: Measurement) -> str:
    """Densities: of each reader the share of its reads that lies in a bin, and its median as a line."""
    left, top, width, height = 18, 22, WIDTH - 36, 190
    timed = [(result, result.latency) for result in found.results if result.latency]
    # What is beyond a thousandth of the reads on either side would only squeeze the rest.
    low = min(_bin_at(latency.histogram, 0.001) - 4 for _, latency in timed) // OCTAVE * OCTAVE
    high = (max(_bin_at(latency.histogram, 0.999) for _, latency in timed) // OCTAVE + 1) * OCTAVE
    parts = []

    def place(number: float) -> float:
        return left + width * (min(max(number, low), high) - low) / (high - low)

    last = -math.inf
    for power in range(0, 11):
        number = math.log2(10.0**power) * OCTAVE
        if low <= number <= high and place(number) - last > 50:
            x = last = place(number)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}"/>')
            parts.append(f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{time_text(10.0**power)}</text>')
    parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}"/>')
    for result, latency in timed:
        colour, total = _reader_class(result.reader), sum(count for _, count in latency.histogram)
        shares = _smooth({number: count / total for number, count in latency.histogram}, low, high)
        most = max(shares)
        line = " ".join(
            f"{place(low + i + 0.5):.1f},{top + height - height * 0.94 * share / most:.1f}" for i, share in enumerate(shares)
        )
        base = top + height
        parts.append(
            f'<polygon class="area f-{colour}" points="{place(low + 0.5):.1f},{base} {line} {place(high - 0.5):.1f},{base}"/>'
        )
        parts.append(f'<polyline class="curve s-{colour}" points="{line}"/>')
        x = place(math.log2(latency.median_ns) * OCTAVE)
        parts.append(
            f'<line class="s-{colour}" stroke-width="1.5" stroke-dasharray="3 4" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>'
        )
    svg = _svg(WIDTH, top + height + 28, "Latency distribution", parts)
    entries = [
        (
            _reader_class(result.reader),
            _text(result.reader),
            f"{time_text(latency.median_ns)}, 99 % within {time_text(latency.p99_ns)}",
        )
        for result, latency in timed
    ]
    said = "How long single reads take, each reader to its own height; the scale is logarithmic, dashed lines are medians."
    return f'<section class="card"><h2>Latency, {_text(found.title)}</h2><p>{said}</p>{svg}{_legend(entries)}</section>'


def _bin_at(histogram: Iterable[tuple[int, int]], share: float) -> int:
    bins = list(histogram)
    left = share * sum(count for _, count in bins)
    for number, count in bins:
        left -= count
        if left <= 0:
            return number
    return bins[-1][0]


def _smooth(shares: dict[int, float], low: int, high: int) -> list[float]:
    """Each bin with a part of its neighbours: a few hundred reads make a comb else."""
    weights = (1, 3, 4, 3, 1)
    return [sum(w * shares.get(at + i - 2, 0.0) for i, w in enumerate(weights)) / 12 for at in range(low, high)]


def _table_card(found: Sequence[Measurement]) -> str:
    rows = []
    for each in found:
        fastest = max(result.nbytes_per_second for result in each.results)
        for number, result in enumerate(each.results):
            rows.append(_row(each, result, fastest, first=number == 0))
    head = (
        '<tr><th>work</th><th class="left">reader</th><th class="left">throughput</th><th>a read</th><th>90 %</th><th>99 %</th>'
        "<th>speed</th><th>inflated</th></tr>"
    )
    said = (
        "Speed is over fastqcow's, the median of rounds in which all took turns. Inflated are bytes for each one read by fastqcow, "
        "and, in brackets, by a reader that keeps nothing from request to request. Conversions by qemu-img are processes, whose "
        "start counts; fastqcow's ran within its own."
    )
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f'<section class="card wide"><h2>All measurements</h2><p>{said}</p>{table}</section>'


def _a_read(found: Measurement, result: Result) -> str:
    """The mean; where several threads read there is none that says anything. Of a conversion, all of it."""
    if found.threads > 1 and found.requests:
        return ""
    return time_text(result.seconds / max(found.requests, 1) * 1e9)


def _row(found: Measurement, result: Result, fastest: float, *, first: bool) -> str:
    inflated = ""
    if result.reader == "fastqcow":
        inflated = f"{found.inflated:.2f}" + (f" ({found.inflated_uncached:.2f})" if found.inflated_uncached is not None else "")
    bar = (
        f'<i class="b-{_reader_class(result.reader)}" style="width: {max(110 * result.nbytes_per_second / fastest, 2):.0f}px"></i>'
    )
    latency = result.latency
    cells = [
        f"<td>{_text(found.title) if first else ''}</td>",
        f'<td class="left">{_text(result.reader)}</td>',
        f'<td class="bar">{bar}<span>{_rate_text(result.nbytes_per_second)}</span></td>',
        f"<td>{_a_read(found, result)}</td>",
        f"<td>{time_text(latency.p90_ns) if latency else ''}</td>",
        f"<td>{time_text(latency.p99_ns) if latency else ''}</td>",
        f"<td>{result.speed:.2f}</td>",
        f"<td>{inflated}</td>",
    ]
    opening = '<tr class="first">' if first else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def _footer(found: Benchmark) -> str:
    qemu = f", QEMU {_text(found.qemu)}" if found.qemu else ""
    left_out = "".join(f"<li>{_text(what)}: {_text(why)}</li>" for what, why in found.left_out)
    listed = f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""
    return (
        f"<footer><p>fastqcow {_text(found.fastqcow)} with {_text(found.engine)}{qemu}, {found.cpus} CPUs. All was read from "
        f"the page cache; each measurement took about {found.seconds:g} s.</p>{listed}</footer>"
    )
