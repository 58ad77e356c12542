"""The command: arguments, output, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import fastqcow
from cases import words
from conftest import Qemu
from fastqcow.cli import main
from fastqcow.cli.common import size_argument, size_text
from images import PAYLOAD, build, data_entry, noise

CLUSTER = 65536
PLAIN = noise(CLUSTER)
IMAGE = build([data_entry(PAYLOAD * CLUSTER), 0], PLAIN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastqcow", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_convert(path: Path, tmp_path: Path) -> None:
    assert main(["convert", "-f", "qcow2", "-O", "raw", "-U", "-W", "-m", "2", "-S", "64k", str(path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == PLAIN + bytes(CLUSTER)


def test_convert_allocates(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-C", "-o", "preallocation=falloc", str(path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == PLAIN + bytes(CLUSTER)
    assert main(["convert", "-C", "-S", "4k", str(path), str(tmp_path / "out")]) == 1
    assert "cannot be used with -S" in capsys.readouterr().err


def test_convert_says_what_it_did(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--output=json", str(path), str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["virtual-size"], said["bytes-written"], said["clusters-inflated"]) == (2 * CLUSTER, CLUSTER, 0)


def test_convert_in_place(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-n", str(path), str(tmp_path / "out")]) == 1
    assert "out: No such file" in capsys.readouterr().err
    (tmp_path / "out").write_bytes(bytes(3 * CLUSTER))
    assert main(["convert", "-n", str(path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == PLAIN + bytes(2 * CLUSTER)


def test_backing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    base, top, out = tmp_path / "base.raw", tmp_path / "inner" / "top.qcow2", tmp_path / "out"
    base.write_bytes(PLAIN)
    top.write_bytes(build([0], backing=("../base.raw", "raw")))
    assert main(["convert", str(top), str(out)]) == 1
    assert "follow" in capsys.readouterr().err
    for rule, expected in (("follow", PLAIN), (str(base), PLAIN), ("none", bytes(CLUSTER))):
        assert main(["convert", "--backing", rule, str(top), str(out)]) == 0
        assert out.read_bytes() == expected
    assert main(["map", "--backing=follow", str(top)]) == 0
    assert str(base) in capsys.readouterr().out.replace("/inner/..", "")


def test_snapshots(qemu: Qemu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    assert main(["snapshot", "-l", str(path)]) == 0
    assert capsys.readouterr().out == ""
    qemu.io(path, "write -P 1 0 1M")
    qemu.img("snapshot", "-c", "before", path)
    qemu.io(path, "write -P 2 0 1M")
    assert main(["snapshot", "-l", str(path)]) == 0
    assert words(capsys.readouterr().out) == words(qemu.img("snapshot", "-l", path).stdout)
    assert main(["snapshot", "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "before"
    for name in ("before", "1"):
        assert main(["convert", "-l", name, str(path), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out").read_bytes() == b"\1" * (1 << 20)
    assert main(["convert", "-l", "none", str(path), str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err == f"fastqcow: {path}: no snapshot has the id or name 'none'\n"
    assert not (tmp_path / "other").exists()


def test_map_for_people(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(path)]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["Offset", "Length", "Mapped", "to", "File"]
    assert line.split() == ["0x0", "0x10000", "0x40000", str(path)]


def test_map_of_nothing_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_bytes(build([], size=0, l1=[]))
    assert main(["map", "--output=json", str(tmp_path / "empty")]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("command", ["info", "map", "convert"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [("none", "No such file"), (".", "Is a directory"), ("empty", "empty"), ("text", "not a qcow2 image")],
)
def test_bad_images_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, bad: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("text").write_text("hello\n")
    assert main([command, bad, *(["out"] if command == "convert" else [])]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fastqcow: {bad}: ")
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert not Path("out").exists()


OTHERS = [
    *["vmdk", "vdi", "vhdx", "vpc", "qed", "luks", "parallels", "qcow"],
    *[
        "vmdk subformat=monolithicFlat",
        "vmdk subformat=streamOptimized",
        "vmdk subformat=twoGbMaxExtentSparse",
        "vhdx subformat=fixed",
    ],
]


@pytest.mark.parametrize("other", OTHERS)
def test_other_formats_are_refused_by_name(
    qemu: Qemu, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    """And not taken for raw; that a file is raw can be said."""
    fmt, *options = other.split()
    image, out = tmp_path / "other", tmp_path / "out"
    if fmt == "luks":
        options = ["key-secret=key,iter-time=10"]
    secret = ["--object", "secret,id=key,data=x"] if fmt == "luks" else []
    for _ in range(20):  # of LUKS it times its own hashing, and gives up where the clock does not move meanwhile
        made = qemu.img(
            "create", "-q", *secret, "-f", fmt, *(word for o in options for word in ("-o", o)), image, "2M", check=False
        )
        if "CPU usage" not in made.stderr:
            break
    if "Unknown file format" in made.stderr:
        pytest.skip(f"this qemu-img makes no {fmt}")
    assert made.returncode == 0, made.stderr
    assert f"file format: {fmt}\n" in qemu.img("info", image).stdout
    arguments = {"compare": [path, image], "checksum": [image], "convert": [image, out]}
    for command, names in arguments.items():
        assert main([command, *map(str, names)]) == (2 if command == "compare" else 1)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"fastqcow: {image}: the format {fmt} is not supported; qcow2 and raw are\n"
    assert not out.exists()
    assert main(["convert", "-f", "raw", str(image), str(out)]) == 0
    assert out.read_bytes().rstrip(b"\0") == image.read_bytes().rstrip(b"\0")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["convert", "x"],
        ["convert", "-S", "much", "a", "b"],
        ["convert", "-O", "vmdk", "a", "b"],
        ["convert", "-o", "size=1", "a", "b"],
        ["convert", "-o", "preallocation=metadata", "a", "b"],
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_1(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Bash and zsh, where they are, take what is said; bash completes a command by it."""
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    if shell != "tcsh" and shutil.which(shell):
        subprocess.run([shell, "-n", script], check=True)
    if shell == "bash" and shutil.which("bash"):
        ask = f'. {script}; COMP_WORDS=(fastqcow con); COMP_CWORD=1; {{ complete -p fastqcow; }} | sed "s/.*-F \\([^ ]*\\).*/\\1/"'
        function = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        ask = f'. {script}; COMP_WORDS=(fastqcow con); COMP_CWORD=1; {function}; echo "${{COMPREPLY[@]}}"'
        assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split() == ["convert"]


@pytest.mark.parametrize("command", [[], ["info"], ["map"], ["convert"], ["snapshot"], ["serve"], ["bench"]])
def test_help_has_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "example: fastqcow" in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"fastqcow {fastqcow.__version__}\n"


def test_reader_of_our_output_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "many.qcow2"
    path.write_bytes(build([i % 2 for i in range(8192)]))
    command = [sys.executable, "-m", "fastqcow", "map", "--output=json", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("[{")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_progress_on_a_terminal_only(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    quiet = run("convert", "-p", path, tmp_path / "out")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    try:
        master, terminal = pty.openpty()
    except OSError as e:
        pytest.skip(f"no terminals here: {e}")
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-m", "fastqcow", "convert", "-p", path, tmp_path / "out"], stderr=terminal, check=False)
    os.close(terminal)
    assert done.returncode == 0
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while data := os.read(master, 10_000):
            shown += data
    os.close(master)
    assert b"100%" in shown


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("512", 512), ("512b", 512), ("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("2T", 2 << 40)]
)
def test_size_argument(text: str, nbytes: int) -> None:
    assert size_argument(text) == nbytes


@pytest.mark.parametrize("text", ["", "k", "-1", "100E", "1.5M", "1X", "0x10", "1kk"])
def test_bad_size_argument(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size_argument(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (196616, "192 KiB"),
        (52080640, "49.7 MiB"),
        (1 << 30, "1 GiB"),
    ],
)
def test_size_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
