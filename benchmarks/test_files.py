"""Workload: every file of a disk, listed, read and hashed through dissect, by its own qcow2 reader and by fastqcow in its place."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from alternating import Alternating


def test_every_file(alternating: Alternating, zlib_image: Path) -> None:
    container = pytest.importorskip("dissect.target.container")
    filesystem = pytest.importorskip("dissect.target.filesystem")
    pytest.importorskip("dissect.extfs")
    dissect = importlib.import_module("fastqcow.integrations.dissect")
    digests = set()

    def read_all() -> None:
        digest = hashlib.sha256()
        for entry in filesystem.open(container.open(zlib_image)).recurse("/"):
            if not entry.is_symlink() and entry.is_file():
                digest.update(entry.path.encode())
                with entry.open() as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
        digests.add(digest.hexdigest())

    def with_fastqcow() -> None:
        dissect.install()
        try:
            read_all()
        finally:
            dissect.uninstall()

    peers: dict[str, Callable[[], object]] = {"fastqcow": with_fastqcow, "dissect.hypervisor": read_all}
    alternating(peers, rounds=7)
    assert len(digests) == 1
