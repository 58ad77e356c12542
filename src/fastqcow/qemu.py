"""QEMU's tools as peers of a benchmark: what of them is installed, and how they are called.

They open the files that an image names by rules of their own. So they are only given an image that fastqcow has opened before by
the names in it, under its rules: see `why_not`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastqcow.image import Snapshot
from fastqcow.libnbd import Client, is_installed

if TYPE_CHECKING:
    from fastqcow.image import Image

__all__ = ["PeerError", "Qemu", "why_not"]


class PeerError(Exception):
    """A peer cannot do the work; the benchmark goes on without it."""


def why_not(image: Image) -> str | None:
    """Why QEMU cannot be asked for the same bytes; None if it can."""
    if isinstance(image, Snapshot):
        return "a snapshot is measured, which qemu-img bench and qemu-nbd do not read"
    if image.header.encrypted:
        return "the image is encrypted, and passwords are not handed on"
    if any(rule is not None and rule != "follow" for rule in (image._options.backing, image._options.data_file)):
        return "its backing or data file was given, and QEMU would take the one that the image names"
    if not image._open_reader().source.has_path:
        return "the image was opened from a file object without a path"
    return None


class Qemu:
    """The tools, for one image. timeout_s: what one call may take at most."""

    def __init__(self, image: Image, timeout_s: float) -> None:
        self.path = os.path.abspath(image.name)  # which no tool takes for an option, or for a protocol
        self.timeout_s = timeout_s
        self.img = shutil.which("qemu-img")
        self.nbd = shutil.which("qemu-nbd")

    def version(self) -> str | None:
        if self.img is None:
            return None
        with contextlib.suppress(PeerError):
            found = re.search(r"version (\S+)", self._run(self.img, "--version"))
            return found[1] if found else None
        return None

    def bench(self, start: int, nbytes: int, step: int, count: int, depth: int) -> float:
        """Seconds that `qemu-img bench` reads for, its own start not counted.

        Raises:
            PeerError: it fails, or takes too long.
        """
        assert self.img is not None
        numbers = {"-c": count, "-d": depth, "-s": nbytes, "-S": step, "-o": start}
        options = [text for option, number in numbers.items() for text in (option, str(number))]
        said = self._run(self.img, "bench", "-U", "-f", "qcow2", *options, self.path)
        found = re.search(r"Run completed in ([0-9.]+) seconds", said)
        if not found:
            raise PeerError("qemu-img bench does not say how long it took")
        if not float(found[1]):
            raise PeerError("qemu-img bench is done in less time than it can tell")
        return float(found[1])

    def convert(self, target: str, *options: str) -> float:
        """Seconds that `qemu-img convert` takes as a process. Errors as of `bench`."""
        assert self.img is not None
        started = time.perf_counter()
        self._run(self.img, "convert", "-U", *options, "-f", "qcow2", "-O", "raw", self.path, target)
        return time.perf_counter() - started

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self.timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"took more than {self.timeout_s:.0f} seconds") from None
        except OSError as e:
            raise PeerError(f"{command[0]}: {e.strerror}") from None
        if done.returncode:
            raise PeerError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0])
        return done.stdout

    @contextlib.contextmanager
    def served(self) -> Iterator[Client]:
        """A client of a qemu-nbd that ends with the block.

        Raises:
            PeerError: qemu-nbd or libnbd is missing, or does not start.
        """
        if self.nbd is None:
            raise PeerError("qemu-nbd is not installed")
        if not is_installed():
            raise PeerError("libnbd is not installed")
        try:
            client = Client.of_command([self.nbd, "--read-only", "--format=qcow2", self.path])
        except OSError as e:
            raise PeerError(f"qemu-nbd does not start: {e}") from None
        with contextlib.closing(client):
            yield client
