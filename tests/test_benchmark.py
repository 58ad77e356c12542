"""How fast an image is read, what the command says of it, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.benchmark import Benchmark, benchmark
from fastqcow.cli import main
from fastqcow.makeup import make_up
from fastqcow.replay import read_trace
from fastqcow.report import page
from images import COPIED, L2, PAYLOAD, build, data_entry, noise, patched
from test_makeup import mixed_image

CLUSTER = 65536
TINY = 0.01


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(mixed_image())
    return path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, to be found empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def test_of_a_snapshot(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    qemu.io(path, "write -P 1 0 128k")
    qemu.img("snapshot", "-c", "before", path)
    qemu.io(path, "write -P 2 512k 128k")
    with fastqcow.open(path) as image:
        assert make_up(image).units["plain"] == 4
        snapshot = image.snapshot("before")
        assert make_up(snapshot).units["plain"] == 2
        found = benchmark(snapshot, seconds=TINY)
        assert found.qemu is None
        assert next(what for what, _ in found.left_out) == "QEMU"
        assert [each.nbytes for each in found.measurements if each.name == "convert"] == [128 << 10]


def trace_file(folder: Path, said: str | bytes) -> Path:
    path = folder / "boot.trace"
    path.write_bytes(said if isinstance(said, bytes) else said.encode())
    return path


def test_trace(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, "0 512\n4096 65536"), 1 << 20)
    assert (list(trace.offsets), list(trace.lengths)) == ([0, 4096], [512, 65536])


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "there are no requests"),
        ("0 512\nhello\n", "line 2 is not an offset and a length"),
        ("0 512\n\n", "line 2 is not"),
        ("0x200 512\n", "line 1 is not"),
        ("-512 512\n", "line 1 is not"),
        ("0 512 0\n", "line 1 is not"),
        ("1" * 100 + " 512\n", "line 1 is not"),
        (b"\xff\xfe\0 512\n", "line 1 is not"),
        ("0 0\n", "line 1 has a length of 0"),
        (f"0 {33 << 20}\n", "line 1 has a length of"),
        (f"{40 * CLUSTER} 1\n", "line 1 ends at"),
        (b"\0" * 100_000, "line 1 is not"),
    ],
)
def test_bad_traces_end_in_one_line(path: Path, capsys: pytest.CaptureFixture[str], said: str | bytes, reason: str) -> None:
    trace = trace_file(path.parent, said)
    assert main(["bench", "--trace", str(trace), str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastqcow: {trace}: {reason}")
    assert err.count("\n") == 1


def test_a_trace_that_never_ends(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastqcow.replay.TRACE_REQUESTS_MAX", 3)
    assert main(["bench", "--trace", str(trace_file(path.parent, "0 512\n" * 4)), str(path)]) == 1
    assert "more than 3 requests" in capsys.readouterr().err
    with pytest.raises(ValueError, match="more than 3 requests"):
        read_trace(trace_file(path.parent, "0 512\n" * 4), 1 << 20)
    assert len(read_trace(trace_file(path.parent, "0 512\n" * 3), 1 << 20).offsets) == 3


def test_json(path: Path, temporary: Path, no_tools: None, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(path.parent, "0 512\n65536 4096\n")
    assert main(["bench", "--seconds", str(TINY), "--output=json", "--trace", str(trace), str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["make-up"]["units"]["compressed"] == 3
    assert said["make-up"]["ratio"] > 1
    assert said["make-up"]["amplification"]["4096"] == 16
    assert said["filename"] == str(path)
    by_title = {each["title"]: each for each in said["measurements"]}
    assert {each["name"] for each in said["measurements"]} == {"sequential", "random", "threads", "trace", "convert"}
    assert [title for title in by_title if title.startswith("sequential")] == [
        "sequential 4 KiB",
        "sequential 64 KiB",
        "sequential 1 MiB",
    ]
    for each in said["measurements"]:
        assert [result["reader"] for result in each["results"]] == ["fastqcow", "uncompressed"]
        assert each["nbytes"] > 0
        assert all(result["seconds"] > 0 and result["speed"] > 0 for result in each["results"])
        assert each["rounds"] >= 1
    assert by_title["trace boot.trace"]["requests"] == 2
    assert by_title["trace boot.trace"]["inflated-uncached"] == 2 * CLUSTER / 4608
    latency = by_title["random 4 KiB"]["results"][0]["latency"]
    assert latency["median-ns"] <= latency["p90-ns"] <= latency["p99-ns"] <= latency["longest-ns"]
    assert (
        sum(count for _, count in latency["histogram"]) == by_title["random 4 KiB"]["requests"] * by_title["random 4 KiB"]["rounds"]
    )
    assert said["qemu"] is None
    assert said["left-out"] == [{"what": "QEMU", "why": "qemu-img is not installed"}]
    assert list(temporary.iterdir()) == []


def test_for_people(path: Path, no_tools: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--seconds", str(TINY), "--no-raw", "--no-qemu", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "compressed              3 clusters" in " ".join(out.split(" "))
    assert "sequential 4 KiB" in out
    assert "uncompressed " not in out
    assert "left out" not in out
    assert err == ""


def test_against_qemu(qemu: Qemu, path: Path, temporary: Path) -> None:
    with fastqcow.open(path) as image:
        found = benchmark(image, seconds=0.3)
    assert found.qemu
    readers = {each.name: [result.reader for result in each.results] for each in found.measurements}
    assert readers["convert"] == ["fastqcow", "uncompressed", "qemu-img convert", "qemu-img convert -m 16 -W"]
    nbd = shutil.which("qemu-nbd") and find_library("nbd")
    # On a busy machine few requests fit into the time: too few for a tool that counts in milliseconds.
    too_quick = [
        what for what, why in found.left_out if what.startswith("qemu-img bench, random") and "less time than it can tell" in why
    ]
    bench = [] if too_quick else ["qemu-img bench"]
    assert readers["random"] == ["fastqcow", "uncompressed", *bench, *(["qemu-nbd"] if nbd else [])]
    assert list(temporary.iterdir()) == []


def test_qemu_is_not_given_other_files(qemu: Qemu, tmp_path: Path) -> None:
    """It would open those that the image names."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(noise(CLUSTER))
    top.write_bytes(build([0], backing=("other.raw", "raw")))
    for rule in (base, False):
        with fastqcow.open(top, backing=rule) as image:
            found = benchmark(image, seconds=TINY)
        assert found.qemu is None
        assert "given" in dict(found.left_out)["QEMU"]


def test_no_room_for_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch, no_tools: None) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with fastqcow.open(path) as image:
        found = benchmark(image, seconds=TINY)
    assert {what for what, _ in found.left_out} == {"QEMU", "uncompressed", "conversion to raw"}


def test_large_disks_are_sampled(tmp_path: Path, no_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 2^60 bytes, whose L1 entries are all of the same table."""
    monkeypatch.setattr("fastqcow.benchmark.SCAN_SECONDS", 0.01)
    monkeypatch.setattr("fastqcow.benchmark.COPY_NBYTES_MAX", 8 << 20)
    path, bits, l1_entries = tmp_path / "large.qcow2", 21, 1 << 21
    made = build([data_entry(PAYLOAD << bits)] * 64, noise(1 << bits), cluster_bits=bits)
    made = patched(made, 24, struct.pack(">QIIQ", 1 << 60, 0, l1_entries, len(made)))
    path.write_bytes(made + struct.pack(">Q", COPIED | L2 << bits) * l1_entries)
    with fastqcow.open(path) as image:
        found = benchmark(image, seconds=TINY)
    assert found.make_up.looked_at < 1
    assert "conversion" in dict(found.left_out)
    assert {each.name for each in found.measurements} == {"sequential", "random", "threads"}


def test_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(build([], size=0, l1=[]))
    with fastqcow.open(path) as image:
        found = benchmark(image, seconds=TINY)
    assert found.measurements == ()
    assert_is_a_page(page(found))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "1e9"])
def test_bad_times(path: Path, capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["bench", f"--seconds={seconds}", str(path)])
    assert "is not a time" in capsys.readouterr().err
    if seconds != "x":
        with fastqcow.open(path) as image, pytest.raises(ValueError, match="seconds"):
            benchmark(image, seconds=float(seconds))


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(path: Path, temporary: Path, interruption: signal.Signals) -> None:
    """In the middle of it all: when temporary files are there, and much is left to do."""
    trace = trace_file(path.parent, "0 4096\n" * 100_000)
    child = subprocess.Popen(
        [sys.executable, "-m", "fastqcow", "bench", "--seconds=60", "--no-qemu", "--trace", trace, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(temporary.iterdir()):
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(interruption)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + interruption
    assert err.count(b"\n") <= 1
    assert list(temporary.iterdir()) == []


def assert_is_a_page(made: str) -> ElementTree.Element:
    """Well-formed, and complete in itself."""
    assert made.startswith("<!DOCTYPE html>\n")
    root = ElementTree.fromstring(made.partition("\n")[2])
    assert not re.search(r"https?:|url\(|@import|src=|<script|<link", made)
    assert "prefers-color-scheme: dark" in made
    return root


def test_report(path: Path, no_tools: None, capsys: pytest.CaptureFixture[str]) -> None:
    odd = path.with_name("a<b>&\"c'\x1b\udcff.qcow2")
    try:
        path.rename(odd)
    except OSError:
        pytest.skip("no such names here")
    report, trace = path.with_name("out.html"), trace_file(path.parent, "0 512\n65536 4096\n")
    arguments = ["bench", f"--seconds={TINY}", "--trace", str(trace), "--report", str(report), str(odd)]
    assert main(arguments) == 0
    root = assert_is_a_page(report.read_text(encoding="utf-8"))
    heading = root.find(".//h1")
    assert heading is not None
    assert heading.text == "a<b>&\"c'\\x1b\\udcff.qcow2: what compression costs"
    assert len(root.findall(".//svg")) == 5
    assert "\x1b" not in capsys.readouterr().out


def test_report_without_measurements_is_a_page_too(path: Path) -> None:
    with fastqcow.open(path) as image:
        found = Benchmark(str(path), "0", "libz", None, 1, 1.0, make_up(image), (), (("all <b>", "why & why"),))
    assert_is_a_page(page(found))
    assert_is_a_page(page(dataclasses.replace(found, make_up=dataclasses.replace(found.make_up, looked_at=0.5, has_backing=True))))


def test_report_is_not_written_over_what_is_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(path.parent, "0 512\n")
    before = path.read_bytes()
    for target in (path, trace, path.parent, path.parent / "missing" / "out.html"):
        assert main(["bench", "--trace", str(trace), "--report", str(target), str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(target if target.name != "out.html" else target.parent) in err
    assert path.read_bytes() == before
    assert os.path.getsize(trace) == 6
