"""Where dissect.hypervisor's reader is wrong, and fastqcow in its place: install(), the command, and tools at work."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import Qemu
from dissecting import (
    AS_DISSECT,
    BASE,
    CLUSTER,
    DISSECT,
    FASTQCOW,
    NAMES,
    TOP,
    WITH_DATA_FILE,
    integration,
    module,
    overlay,
    snapshots_image,
    write,
)
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, extension, mixed, noise

# Where dissect is wrong


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def differs(path: Path, expected: bytes | None, snapshot: int | None = None) -> None:
    """fastqcow reads what QEMU does, and dissect does not."""
    assert expected is not None

    def read(reader: Any) -> bytes:
        with path.open("rb") as file:
            backing = path.with_name("base")
            qcow2 = reader.QCow2(file, backing_file=io.BytesIO(backing.read_bytes()) if backing.exists() else None)
            data: bytes = (qcow2 if snapshot is None else qcow2.snapshots[snapshot]).open().read()
            return data

    assert read(FASTQCOW) == expected
    try:
        with alarm(0.5):  # some of what is wrong has no end
            found = read(DISSECT)
    except Exception as e:  # whatever it is, it is not the bytes
        found = repr(e).encode()
    assert found != expected, AS_DISSECT


def test_extended_l2_entries(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "1M")
    qemu.io(path, "write -P 1 0 2k", "write -P 2 10k 4k", "write -P 3 70k 200k")
    differs(path, qemu.read(path))


def test_short_backing_file(qemu: Qemu, tmp_path: Path) -> None:
    write(tmp_path, BASE[: CLUSTER + 512], "base")
    path = write(tmp_path, overlay("base", "raw"))
    differs(path, qemu.read(path))


def test_version_2_with_extensions(qemu: Qemu, tmp_path: Path) -> None:
    """The extensions lie where version 3 has its features: this one says that there is an external data file."""
    image = build([data_entry(PAYLOAD * CLUSTER)], TOP, version=2, extensions=extension(4, b"\0\0\0\4"))
    differs(write(tmp_path, image), TOP)
    assert qemu.read(tmp_path / "disk.qcow2") == TOP


def test_snapshot_of_another_size(qemu: Qemu, tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", mixed(2 * CLUSTER)
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", write(tmp_path, data, "disk.raw"), path)
    qemu.img("snapshot", "-c", "before", path)
    qemu.img("resize", "-q", path, "2M")
    differs(path, data, snapshot=0)


def test_extra_data_that_is_not_known() -> None:
    """dissect takes the identifier for part of it."""

    def read(reader: Any) -> tuple[Any, ...]:
        (snapshot,) = reader.QCow2(io.BytesIO(snapshots_image(CLUSTER, 1, struct.pack(">QQQ", 0, 512, 9) + b"more"))).snapshots
        return snapshot.extra.disk_size, snapshot.extra.icount, snapshot.unknown_extra, snapshot.id, snapshot.name

    assert read(FASTQCOW) == (512, 9, b"more", "1", "x")
    assert read(DISSECT) != read(FASTQCOW), AS_DISSECT


def test_several_zstd_frames_in_a_cluster(qemu: Qemu, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = b"".join(zstandard.compress(part) for part in (TOP[:100], TOP[100:]))
    stream = frames.ljust(-(-len(frames) // 512) * 512, b"\0")
    path = write(tmp_path, build([compressed_entry(PAYLOAD * CLUSTER, len(frames), 16)], stream, zstd=True))
    assert qemu.read(path) == TOP
    differs(path, TOP)


def test_deflate_with_a_large_window(tmp_path: Path) -> None:
    """QEMU does not read it either; other writers make it."""
    data = noise(30_000) * 3
    data = data[:CLUSTER]
    stream = deflate(data, window_bits=15)
    image = build([compressed_entry(PAYLOAD * CLUSTER, len(stream), 16)], stream.ljust(-(-len(stream) // 512) * 512, b"\0"))
    differs(write(tmp_path, image), data)


def test_absent_data_file_is_allowed_by_a_path_too(tmp_path: Path) -> None:
    path = write(tmp_path, WITH_DATA_FILE)
    assert FASTQCOW.QCow2(path, allow_no_data_file=True).data_file is None


# In the place of dissect's


def test_install() -> None:
    integration.install()
    try:
        assert [getattr(module, name) for name in NAMES] == [getattr(FASTQCOW, name) for name in NAMES]
        integration.install()  # does nothing
    finally:
        integration.uninstall()
    assert [getattr(module, name) for name in NAMES] == [getattr(DISSECT, name) for name in NAMES]
    integration.uninstall()  # does nothing


def test_import_that_installs() -> None:
    code = """if True:
        import fastqcow.integrations.dissect.auto
        from dissect.hypervisor.disk import qcow2
        from fastqcow.integrations import dissect
        print(qcow2.QCow2 is dissect.QCow2)
        dissect.uninstall()
        print(qcow2.QCow2 is dissect.QCow2)"""
    assert run(code).split() == ["True", "False"]


def test_install_reaches_those_who_have_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    user: Any = ModuleType("some_tool")
    other: Any = ModuleType("dissect.some_tool")
    user.Disk, user.own = DISSECT.QCow2, FASTQCOW.QCow2
    monkeypatch.setitem(sys.modules, "some_tool", user)
    monkeypatch.setitem(sys.modules, "some_object", "no module")
    pretends = type("Pretends", (), {"__slots__": (), "__class__": ModuleType})()  # as libraries of cffi do
    monkeypatch.setitem(sys.modules, "some_library", pretends)
    integration.install()
    try:
        monkeypatch.setitem(sys.modules, "dissect.some_tool", other)
        other.QCow2 = module.QCow2
        assert user.Disk is other.QCow2 is FASTQCOW.QCow2
    finally:
        integration.uninstall()
    assert user.Disk is other.QCow2 is DISSECT.QCow2
    assert user.own is FASTQCOW.QCow2


def test_install_imports_nothing() -> None:
    """Modules that wait for their first use go on waiting."""
    code = """if True:
        import importlib.util, sys
        from fastqcow.integrations import dissect
        spec = importlib.util.find_spec("this")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules["this"] = this = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(this)
        dissect.install()
        dissect.uninstall()
    """
    assert run(code) == ""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_without_dissect() -> None:
    code = """if True:
        import sys
        sys.modules["dissect.hypervisor"] = None
        try:
            import fastqcow.integrations.dissect
        except ImportError as e:
            print(e)
    """
    assert run(code) == "fastqcow.integrations.dissect needs dissect.hypervisor: pip install fastqcow[dissect]\n"


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "ignore", "-m", "fastqcow.integrations.dissect", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--help"], 0, "usage: python -m fastqcow.integrations.dissect COMMAND", ""),
        ([], 1, "", "usage: python -m fastqcow.integrations.dissect COMMAND"),
        (["no-such-tool"], 1, "", "fastqcow: there is no command 'no-such-tool' in this Python's packages\n"),
    ],
)
def test_command(arguments: list[str], code: int, out: str, err: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout[: len(out)], done.stderr[: len(err)]) == (code, out, err)
    assert bool(done.stdout) == bool(out)
    assert bool(done.stderr) == bool(err)


# Tools of dissect at work

READ_ALL = """if True:
    import hashlib, json, sys
    from pathlib import Path
    from dissect.target import Target
    from fastqcow.integrations import dissect

    def read_all():
        target = Target.open(Path(sys.argv[1]))
        found = {}
        for fs in target.filesystems:
            for entry in fs.recurse("/"):
                if entry.is_file():
                    found[entry.path] = hashlib.sha256(entry.open().read()).hexdigest()
        return type(target.disks[0].stream).__module__, found

    slow = read_all()
    dissect.install()
    print(json.dumps([slow, read_all()]))
"""


def test_files_of_a_target(ext4_image: Path, ext4_files: dict[str, bytes]) -> None:
    """By dissect.target, which has imported dissect's reader already."""
    pytest.importorskip("dissect.target")
    pytest.importorskip("dissect.extfs")
    line = [sys.executable, "-W", "ignore", "-c", READ_ALL, str(ext4_image)]
    (slow, before), (fast, after) = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert (slow, fast) == ("dissect.hypervisor.disk.qcow2", "fastqcow.integrations.dissect")
    assert before == after
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in ext4_files.items()}
    assert {name.strip("/"): digest for name, digest in after.items()} == expected


def test_command_of_dissect(qemu: Qemu, ext4_image: Path, tmp_path: Path) -> None:
    """With an image that dissect cannot read, so that fastqcow must have."""
    pytest.importorskip("dissect.target")
    pytest.importorskip("dissect.extfs")
    path = tmp_path / "disk.qcow2"
    qemu.img("convert", "-O", "qcow2", "-o", "extended_l2=on", ext4_image, path)
    done = command("target-fs", "-q", path, "cat", "/etc/hostname")
    assert (done.returncode, done.stdout) == (0, "cow\n"), done.stderr
