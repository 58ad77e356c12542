"""The two readers that test_dissect*.py compare, and images for both."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from images import PAYLOAD, build, compressed_entry, data_entry, deflate, extension, noise, patched, snapshot_entry, text

pytest.importorskip("dissect.hypervisor")
module: Any = importlib.import_module("dissect.hypervisor.disk.qcow2")
integration: Any = importlib.import_module("fastqcow.integrations.dissect")
Error, InvalidHeaderError = module.Error, module.InvalidHeaderError

NAMES = ("QCow2", "QCow2Stream", "QCow2Snapshot")
# In namespaces, not as names of this module: those would be replaced by install().
DISSECT = SimpleNamespace(**{name: getattr(module, name) for name in NAMES})
FASTQCOW = SimpleNamespace(**{name: getattr(integration, name) for name in NAMES})
AS_DISSECT = "dissect does the same: what is said of it needs to be changed"
CLUSTER = 65536
WITH_DATA_FILE = patched(build([0], extensions=extension(0x44415441, b"data.bin")), 72, struct.pack(">Q", 4))


def compressed(*parts: bytes, **options: Any) -> bytes:
    """An image of these clusters, compressed with zlib."""
    bits = options.get("cluster_bits", 16)
    at, entries, streams = PAYLOAD << bits, [], b""
    for part in parts:
        stream = deflate(part)
        entries.append(compressed_entry(at + len(streams), len(stream), bits))
        streams += stream
    return build(entries, streams.ljust(-(-len(streams) // 512) * 512, b"\0"), **options)


def write(folder: Path, image: bytes, name: str = "disk.qcow2") -> Path:
    path = folder / name
    path.write_bytes(image)
    return path


BASE = text(3 * CLUSTER, 1)
OVER = [0, data_entry(PAYLOAD * CLUSTER), 0]
TOP = noise(CLUSTER, 2)
EXPECTED = BASE[:CLUSTER] + TOP + BASE[2 * CLUSTER :]
BASES = {"raw": BASE, "qcow2": compressed(*[BASE[i : i + CLUSTER] for i in range(0, len(BASE), CLUSTER)])}


def overlay(name: str, fmt: str | None) -> bytes:
    return build(OVER, TOP, backing=(name, fmt))


def snapshots_image(l1_off: int, l1_entries: int, extra: bytes = b"") -> bytes:
    table = snapshot_entry(b"1", b"x", l1_off=l1_off, l1_entries=l1_entries, extra=extra)
    return patched(build([0], table.ljust(CLUSTER, b"\0")), 60, struct.pack(">IQ", 1, PAYLOAD * CLUSTER))
