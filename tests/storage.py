"""QEMU's storage daemon: opens images one after the other, and reads them part by part, without a new process for each.

What it says of a part is what qemu-img would say, which reads by the same code; but a part that cannot be read does not keep it
from the others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT = 60.0
IN_FLIGHT = 16


class RefusedError(Exception):
    """What QEMU says of an image that it does not open."""


class GoneError(Exception):
    """The daemon has crashed, or did not answer in time."""


class Daemon:
    """One process, started when it is needed, and anew after it has gone."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = str(folder / "nbd.sock")
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.received = b""
        self.deleted: set[str] = set()  # exports
        self.names = itertools.count()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        server = f"addr.type=unix,addr.path={self.socket},max-connections=4"
        command = [
            "qemu-storage-daemon",
            "--chardev",
            "stdio,id=m",
            "--monitor",
            "chardev=m",
            "--nbd-server",
            server,
            *self.options,
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.received = b""
        self.line()
        self.command("qmp_capabilities")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
        self.process = None

    def line(self) -> Any:
        assert self.process
        assert self.process.stdout
        until = time.monotonic() + TIMEOUT
        while b"\n" not in self.received:
            if not select.select([self.process.stdout], [], [], max(until - time.monotonic(), 0))[0]:
                raise GoneError("no answer in time")
            more = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not more:
                raise GoneError(f"exit code {self.process.wait()}")
            self.received += more
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def command(self, execute: str, /, **arguments: Any) -> None:
        assert self.process
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise GoneError("exit") from None
        while "return" not in (answer := self.line()):
            if "error" in answer:
                raise RefusedError(answer["error"]["desc"])
            self.note(answer)

    def note(self, answer: Any) -> None:
        if answer.get("event") == "BLOCK_EXPORT_DELETED":
            self.deleted.add(answer["data"]["id"])

    @contextlib.contextmanager
    def opened(self, path: Path, **options: Any) -> Iterator[Export]:
        """An image, to be read.

        Raises:
            RefusedError, GoneError
        """
        try:
            if self.process is None:
                self.start()
            name = f"n{next(self.names)}"
            file = {"driver": "file", "filename": str(path), "locking": "off"}
            self.command("blockdev-add", **{"driver": "qcow2", "node-name": name, "read-only": True, "file": file, **options})
            self.command("block-export-add", **{"type": "nbd", "id": name, "node-name": name, "name": name})
            with Export(self.socket, name) as export:
                yield export
            self.command("block-export-del", id=name, mode="hard")
            while name not in self.deleted:
                self.note(self.line())
            self.deleted.remove(name)
            self.command("blockdev-del", **{"node-name": name})
        except (GoneError, ConnectionError, TimeoutError) as e:
            self.stop()
            raise GoneError(str(e)) from None

    def read(self, path: Path, parts: Sequence[tuple[int, int]], **options: Any) -> tuple[int, list[bytes | None]]:
        """The size of an image's disk, and its bytes at (offset, length); None where they cannot be read.

        Of an image that it finds damaged QEMU reads nothing more, so it is opened anew for what comes after that: some times.
        """
        with self.opened(path, **options) as export:
            found = export.read(parts)
            size = export.size
        for _ in range(6):
            missing = [i for i, part in enumerate(found) if part is None and parts[i][0] + parts[i][1] <= size]
            if len(missing) < 2:
                break
            # The one that failed first is likely to be to blame: the others are asked without it.
            with self.opened(path, **options) as export:
                again = export.read([parts[i] for i in missing[1:]])
            if not any(part is not None for part in again):
                break
            for i, part in zip(missing[1:], again, strict=True):
                found[i] = part
        return size, found


class Export:
    """A client of what the daemon offers over NBD."""

    def __init__(self, address: str, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.size = self.connect(address, name)
        except BaseException:
            self.socket.close()
            raise

    def connect(self, address: str, name: str) -> int:
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(address)
        assert self.get(18)[:16] == b"NBDMAGICIHAVEOPT"
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name.encode())
        return int.from_bytes(self.get(10)[:8], "big")

    def __enter__(self) -> Export:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def get(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            more = self.socket.recv(nbytes - len(data))
            if not more:
                raise ConnectionError("the daemon has closed the connection")
            data += more
        return bytes(data)

    def read(self, parts: Sequence[tuple[int, int]]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(parts)
        wanted = [i for i, (off, nbytes) in enumerate(parts) if off + nbytes <= self.size]
        for at in range(len(wanted) + IN_FLIGHT):
            if at < len(wanted):
                off, nbytes = parts[wanted[at]]
                self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, wanted[at], off, nbytes))
            if at >= IN_FLIGHT:
                magic, error, i = struct.unpack(">IIQ", self.get(16))
                assert magic == 0x67446698
                if not error:
                    found[i] = self.get(parts[i][1])
        return found
