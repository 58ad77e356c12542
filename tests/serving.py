"""Images served by `fastqcow serve`, for tests with real clients."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVE = [sys.executable, "-m", "fastqcow", "serve"]
SECONDS = 20  # more than any answer takes


def need(*tools: str) -> None:
    """Skip where a tool is missing, or where nbdkit's plugin is, or runs another Python than the tests."""
    absent = [tool for tool in ("nbdkit", *tools) if not shutil.which(tool)]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    if not has_nbdkit("plugin", "python"):
        pytest.skip("nbdkit's Python plugin is not installed")
    said = nbdkit_says("--dump-plugin", "python")
    version = ".".join(map(str, sys.version_info[:2]))
    if not said["python_version"].startswith(f"{version}.") or (hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled()):
        pytest.skip(f"nbdkit's plugin runs Python {said['python_version']}")


def has_nbdkit(kind: str, name: str) -> bool:
    """Whether a plugin or filter of nbdkit is installed. That it works is another thing: what does not is to fail."""
    return Path(nbdkit_says("--dump-config")[f"{kind}dir"], f"nbdkit-{name}-{kind}.so").exists()


def nbdkit_says(*arguments: str) -> dict[str, str]:
    done = subprocess.run(["nbdkit", *arguments], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


class Server:
    """A process that serves, and its URI. `said` is what it wrote to standard error, when it has ended."""

    def __init__(self, *arguments: str | Path, **options: Any) -> None:
        command = [*SERVE, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        assert self.process.stdout is not None
        self.uri = self.process.stdout.readline().strip()
        self.said = ""

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(signum)
        self.said += self.process.communicate(timeout=SECONDS)[1]
        return self.process.returncode


@contextlib.contextmanager
def served(tmp_path: Path, *arguments: str | Path, **options: Any) -> Iterator[Server]:
    """A server on a socket of its own. If nothing ends it before, it is stopped, and has had nothing to say."""
    server = Server("-k", tmp_path / "nbd", *arguments, **options)
    try:
        assert server.uri, f"it did not start: {server.process.communicate(timeout=SECONDS)[1]}"
        yield server
    finally:
        if server.process.returncode is None:
            code = server.stop()
            assert (code, server.said) == (0, "")


def run(*command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=SECONDS, stdin=subprocess.DEVNULL, **options
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def contents(uri: str, tmp_path: Path) -> bytes:
    """All bytes of the disk, as nbdcopy copies them; what extents say are zeroes it does not read."""
    copy = tmp_path / "copy"
    run("nbdcopy", uri, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


def extents(uri: str) -> list[tuple[int, int, int]]:
    """Start, length and type of the extents, neighbours of one type merged: where answers end is the server's affair."""
    merged: list[tuple[int, int, int]] = []
    for extent in json.loads(run("nbdinfo", "--map", "--json", uri).stdout):
        start, nbytes, kind = (extent[key] for key in ("offset", "length", "type"))
        if merged and merged[-1][2] == kind:
            start, nbytes = merged[-1][0], merged.pop()[1] + nbytes
        merged.append((start, nbytes, kind))
    return merged


@contextlib.contextmanager
def served_by_qemu(tmp_path: Path, *arguments: str | Path) -> Iterator[str]:
    """The URI of qemu-nbd: the oracle."""
    socket, pid = tmp_path / "qemu-nbd", tmp_path / "qemu-nbd.pid"
    run("qemu-nbd", "--fork", "-r", "-t", "-e", "0", "-k", socket, "--pid-file", pid, *arguments, check=True)
    number = int(pid.read_text())
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.kill(number, signal.SIGTERM)
