"""Who else reads these images, and the limit: their streams inflated from memory, with nothing around it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import zstandard

import fastqcow

Pread = Callable[[int, int], bytes]  # (bytes, guest offset)


def readers(image: Path, raw: Path) -> dict[str, Callable[[], Pread]]:
    """How to open the image anew by each reader in Python that is installed, fastqcow first; and the same bytes uncompressed."""
    found: dict[str, Callable[[], Pread]] = {"fastqcow": lambda: fastqcow.open(image).pread}
    found["fastqcow, 1 thread"] = lambda: fastqcow.open(image, threads=1).pread
    if importlib.util.find_spec("dissect") and importlib.util.find_spec("dissect.hypervisor"):
        found["dissect.hypervisor"] = lambda: _dissect(image)
    if importlib.util.find_spec("pyqcow") and fastqcow.info(image)["format-specific"]["data"]["compression-type"] == "zlib":
        found["libqcow"] = lambda: _libqcow(image)
    found["raw file"] = lambda: _raw(raw)
    return found


def _dissect(image: Path) -> Pread:
    qcow2 = importlib.import_module("dissect.hypervisor.disk.qcow2")
    stream = qcow2.QCow2(image.open("rb")).open()

    def pread(nbytes: int, guest_off: int) -> bytes:
        stream.seek(guest_off)
        data: bytes = stream.read(nbytes)
        return data

    return pread


def _libqcow(image: Path) -> Pread:
    file = importlib.import_module("pyqcow").file()
    file.open(str(image))
    read: Pread = file.read_buffer_at_offset
    return read


def _raw(raw: Path) -> Pread:
    fd = os.open(raw, os.O_RDONLY)
    return lambda nbytes, guest_off: os.pread(fd, nbytes, guest_off)


class Streams:
    """The compressed clusters of an image, in memory, by their number on the disk."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        with fastqcow.open(path) as disk:
            header = disk.header
        self.cluster_size = header.cluster_size
        self.method: Literal["zlib", "zstd"] = "zstd" if header.compression_type == "zstd" else "zlib"
        self.by_cluster: dict[int, bytes] = {}
        entries = header.cluster_size // 8
        for i in range(header.l1_entries):
            l2_off = int.from_bytes(raw[header.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
            if l2_off:
                table = fastqcow.parse_l2(raw[l2_off : l2_off + header.cluster_size], cluster_bits=header.cluster_bits)
                places = enumerate(zip(table.host_off, table.in_nbytes, strict=True), i * entries)
                self.by_cluster.update((cluster, raw[off : off + n]) for cluster, (off, n) in places if n)

    def inflate(self, clusters: list[int], threads: int = 1) -> Callable[[], object]:
        """Inflates these, each once, by so many threads."""
        streams = [self.by_cluster[cluster] for cluster in clusters if cluster in self.by_cluster]

        def inflate(share: list[bytes]) -> None:
            out = bytearray(self.cluster_size)
            for stream in share:
                fastqcow.inflate_into(stream, out, self.method)

        if threads == 1:
            return lambda: inflate(streams)
        shares, pool = [streams[i::threads] for i in range(threads)], ThreadPoolExecutor(threads)
        return lambda: list(pool.map(inflate, shares))

    def inflate_by_python(self, clusters: list[int]) -> tuple[str, Callable[[], object]]:
        """The same by one thread in Python, by what everybody has: its module zlib, or the package zstandard."""
        streams = [self.by_cluster[cluster] for cluster in clusters if cluster in self.by_cluster]
        if self.method == "zlib":

            def inflate() -> None:
                for stream in streams:
                    zlib.decompressobj(-15).decompress(stream, self.cluster_size)

            return "module zlib, 1 thread", inflate
        decoder = zstandard.ZstdDecompressor()

        def decompress() -> None:
            for stream in streams:
                decoder.decompressobj().decompress(stream)

        return "package zstandard, 1 thread", decompress
