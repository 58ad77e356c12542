"""convert: the bytes, the holes, and what is left of the target when something goes wrong."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import need_full_device, need_holes
from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, ZERO, build, compressed_entry, data_entry, deflate, mixed, noise, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
STREAM = deflate(text(CLUSTER // 2) + bytes(CLUSTER // 2))
PLAIN = noise(8192) + bytes(8192) + noise(CLUSTER - 16384)
IMAGE = build([compressed_entry(AT, len(STREAM), 16), ZERO, data_entry(AT + CLUSTER), 0], STREAM.ljust(CLUSTER, b"\0") + PLAIN)
CONTENTS = text(CLUSTER // 2) + bytes(CLUSTER // 2) + bytes(CLUSTER) + PLAIN + bytes(CLUSTER)
DAMAGED = build([compressed_entry(AT, 3000, 16)] * 3, b"\xff" * 3000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "disk.raw"


@pytest.fixture(autouse=True)
def out_folder(out: Path) -> None:
    out.parent.mkdir()


def test_report(path: Path, out: Path) -> None:
    done = fastqcow.convert(path, out)
    assert out.read_bytes() == CONTENTS
    assert (done.source, done.target, done.virtual_size, done.clusters_inflated) == (str(path), str(out), len(CONTENTS), 1)
    assert done.bytes_written == CLUSTER // 2 + CLUSTER - 8192
    assert done.seconds > 0


@pytest.mark.parametrize(
    "source", [str, Path, lambda p: io.BytesIO(p.read_bytes()), fastqcow.open], ids=["str", "Path", "file", "Image"]
)
def test_sources(path: Path, out: Path, source: Any) -> None:
    fastqcow.convert(source(path), str(out))
    assert out.read_bytes() == CONTENTS


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads(path: Path, out: Path, threads: int) -> None:
    fastqcow.convert(path, out, threads=threads)
    assert out.read_bytes() == CONTENTS


def test_an_open_image_stays_open(path: Path, out: Path) -> None:
    with fastqcow.open(path) as image:
        image.seek(5)
        fastqcow.convert(image, out)
        assert image.tell() == 5
        assert image.pread(10, 0) == CONTENTS[:10]


@pytest.mark.parametrize(("sparse_size", "allocated"), [(0, len(CONTENTS)), (4096, 90112), (65536, 131072)])
def test_holes(path: Path, out: Path, sparse_size: int, allocated: int) -> None:
    fastqcow.convert(path, out, sparse_size=sparse_size)
    assert out.read_bytes() == CONTENTS
    taken = out.stat().st_blocks * 512
    if taken % 4096 == 0 and os.statvfs(out).f_bsize == 4096:
        assert abs(taken - allocated) <= 8192


@pytest.mark.parametrize(("preallocation", "written"), [("off", 90112), ("falloc", 90112), ("full", len(CONTENTS))])
def test_preallocation(path: Path, out: Path, preallocation: Any, written: int) -> None:
    done = fastqcow.convert(path, out, preallocation=preallocation)
    assert out.read_bytes() == CONTENTS
    assert done.bytes_written == written
    if preallocation != "off" and sys.platform == "linux":
        assert out.stat().st_blocks * 512 >= len(CONTENTS)


def test_preallocation_is_for_new_files(path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="'off', 'falloc' or 'full'"):
        fastqcow.convert(path, out, preallocation="metadata")  # type: ignore[arg-type]
    out.write_bytes(bytes(len(CONTENTS)))
    with pytest.raises(ValueError, match="cannot be preallocated"):
        fastqcow.convert(path, out, preallocation="full", in_place=True)


def kernel_copies(folder: Path) -> bool:
    """Whether this system can copy from file to file here."""
    (folder / "from").write_bytes(b"x")
    try:
        with open(folder / "from", "rb") as src, open(folder / "to", "wb") as dst:
            return os.copy_file_range(src.fileno(), dst.fileno(), 1) == 1
    except (AttributeError, OSError):
        return False


@pytest.mark.parametrize("threads", [1, 2])
def test_copy_offload(path: Path, out: Path, tmp_path: Path, threads: int) -> None:
    """Zeroes in plain clusters are copied with them."""
    done = fastqcow.convert(path, out, copy_offload=True, threads=threads)
    assert out.read_bytes() == CONTENTS
    assert done.bytes_written == CLUSTER // 2 + CLUSTER - 8192 + (8192 if kernel_copies(tmp_path) else 0)


def test_copy_offload_where_the_kernel_cannot(path: Path, out: Path) -> None:
    """A file object has no descriptor, and a target in another file system or of another kind is refused by the kernel."""
    fastqcow.convert(io.BytesIO(IMAGE), out, copy_offload=True)
    assert out.read_bytes() == CONTENTS
    fastqcow.convert(path, "/dev/null", copy_offload=True)


def test_copy_offload_of_what_is_cut_off(path: Path, out: Path) -> None:
    """A part of the cluster is copied before that is noticed; the error is that of every other way to read it."""
    path.write_bytes(build([data_entry(AT), data_entry(AT + CLUSTER)], noise(CLUSTER)))
    messages = []
    for copy_offload in (False, True):
        with pytest.raises(fastqcow.FormatError) as caught:
            fastqcow.convert(path, out, copy_offload=copy_offload)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert leftovers(out) == []


@pytest.mark.parametrize("sparse_size", [-512, 1, 1000])
def test_bad_sparse_size(path: Path, out: Path, sparse_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 512"):
        fastqcow.convert(path, out, sparse_size=sparse_size)


def test_other_formats_are_refused(path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="vmdk"):
        fastqcow.convert(path, out, format="vmdk")


def test_progress(path: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    fastqcow.convert(path, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(CONTENTS), len(CONTENTS))
    assert seen == sorted(seen)


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir())


def test_failure_leaves_nothing(path: Path, out: Path) -> None:
    path.write_bytes(DAMAGED)
    with pytest.raises(fastqcow.FormatError):
        fastqcow.convert(path, out)
    assert leftovers(out) == []


def test_failure_leaves_the_old_target(path: Path, out: Path) -> None:
    path.write_bytes(DAMAGED)
    out.write_bytes(b"precious")
    with pytest.raises(fastqcow.FormatError):
        fastqcow.convert(path, out)
    assert out.read_bytes() == b"precious"
    assert leftovers(out) == ["disk.raw"]


def test_progress_that_raises_stops_it(tmp_path: Path, out: Path) -> None:
    class Stop(Exception):  # noqa: N818 - it is no error
        pass

    def progress(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        fastqcow.convert(io.BytesIO(IMAGE), out, progress=progress)
    assert leftovers(out) == []


@pytest.mark.parametrize("what", ["open", "fchmod"])
def test_a_signal_between_a_files_making_and_its_use(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    out.write_bytes(b"old")
    call = getattr(os, what)

    def interrupted(*arguments: Any, **options: Any) -> None:
        made = call(*arguments, **options)
        if what == "fchmod" or str(arguments[0]).endswith(".part"):
            raise KeyboardInterrupt
        return made  # type: ignore[no-any-return]

    monkeypatch.setattr(os, what, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastqcow.convert(path, out)
    monkeypatch.undo()
    assert [file.name for file in out.parent.iterdir() if file.name.endswith(".part")] == []
    assert out.read_bytes() == b"old"


def test_existing_target_is_replaced_and_keeps_its_mode(path: Path, out: Path) -> None:
    out.write_bytes(bytes(99))
    out.chmod(0o640)
    fastqcow.convert(path, out)
    assert out.read_bytes() == CONTENTS
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def test_new_target_gets_the_usual_mode(path: Path, out: Path) -> None:
    mask = os.umask(0o027)
    try:
        fastqcow.convert(path, out)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def test_target_behind_a_link(path: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    fastqcow.convert(path, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert out.read_bytes() == CONTENTS


def test_image_is_not_its_own_target(path: Path) -> None:
    for source in (path, fastqcow.open(path)):
        for in_place in (False, True):
            with pytest.raises(ValueError, match="cannot be the target"):
                fastqcow.convert(source, path, in_place=in_place)
    assert path.read_bytes() == IMAGE


def test_no_file_of_the_chain_is_the_target(path: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    top.write_bytes(build([0], backing=("disk.qcow2", "qcow2")))
    (tmp_path / "link").symlink_to(path)
    for target in (path, tmp_path / "link"):
        with pytest.raises(ValueError, match="the image is read from this file"):
            fastqcow.convert(top, target)
    assert path.read_bytes() == IMAGE


def test_image_that_was_renamed_meanwhile(path: Path, out: Path) -> None:
    out.write_bytes(b"old")
    with fastqcow.open(path) as image:
        path.rename(path.with_name("renamed"))
        fastqcow.convert(image, out)
    assert out.read_bytes() == CONTENTS


def test_long_name(path: Path, out: Path) -> None:
    target = out.with_name("\N{GREEK SMALL LETTER ALPHA}" * 125)
    fastqcow.convert(path, target)
    assert target.read_bytes() == CONTENTS


def test_no_such_directory(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fastqcow.convert(path, tmp_path / "none" / "disk.raw")
    assert caught.value.filename == str(tmp_path / "none" / "disk.raw")


def test_in_place_overwrites_everything(path: Path, out: Path) -> None:
    out.write_bytes(b"\xaa" * (len(CONTENTS) + 1000))
    inode = out.stat().st_ino
    fastqcow.convert(path, out, in_place=True)
    assert out.read_bytes() == CONTENTS + b"\xaa" * 1000
    assert out.stat().st_ino == inode
    out.write_bytes(b"\xaa" * len(CONTENTS))
    fastqcow.convert(path, out, in_place=True, sparse_size=0)
    assert out.read_bytes() == CONTENTS


def test_in_place_needs_room_and_a_target(path: Path, out: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fastqcow.convert(path, out, in_place=True)
    out.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="has 1000 bytes"):
        fastqcow.convert(path, out, in_place=True)
    assert out.read_bytes() == bytes(1000)


def test_devices_are_written_in_place(path: Path) -> None:
    fastqcow.convert(path, "/dev/null")
    full = need_full_device()
    with pytest.raises(OSError, match="No space left") as caught:
        fastqcow.convert(path, full)
    assert caught.value.filename == full


@contextlib.contextmanager
def loop_device(disk: Path) -> Iterator[str]:
    """A block device, where the machine lets one be made."""
    made = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "device.img"
    disk.write_bytes(b"\xaa" * (len(CONTENTS) + CLUSTER))
    with loop_device(disk) as device:
        fastqcow.convert(path, device)
        assert stat.S_ISBLK(Path(device).stat().st_mode)
        assert Path(device).read_bytes() == CONTENTS + b"\xaa" * CLUSTER


def test_disk_without_room(path: Path, out: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fastqcow.convert(path, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert leftovers(out) == []


def test_errors_of_the_source_keep_their_own_name(out: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= AT:
                raise OSError(5, "Input/output error", "the source")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output") as caught:
        fastqcow.convert(Failing(IMAGE), out)
    assert caught.value.filename == "the source"


@pytest.mark.parametrize("sparse_size", [0, 4096])
def test_writing_zeroes_can_be_interrupted(tmp_path: Path, sparse_size: int) -> None:
    """A petabyte of them, to a target that has no holes."""
    path = tmp_path / "empty.qcow2"
    path.write_bytes(build([], size=1 << 50, cluster_bits=21, l1=[0] * 2048))
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastqcow.convert(path, "/dev/null", sparse_size=sparse_size, progress=progress)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_half_done(tmp_path: Path, out: Path, number: signal.Signals, code: int) -> None:
    """A conversion of some gigabytes, stopped in the middle: at once, with one line, and without a trace."""
    entries = [compressed_entry(AT, len(STREAM), 16)] * 8192
    path = tmp_path / "large.qcow2"
    path.write_bytes(build(entries, STREAM, size=1 << 33, l1=[(1 << 63) | 3 * CLUSTER] * 16))
    out.write_bytes(b"precious")
    command = [sys.executable, "-m", "fastqcow", "convert", str(path), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 20
            while len(leftovers(out)) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            process.send_signal(number)
            started = time.monotonic()
            _, stderr = process.communicate(timeout=20)
            assert time.monotonic() - started < 5
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert stderr.count("\n") <= 1
    assert out.read_bytes() == b"precious"
    assert leftovers(out) == ["disk.raw"]


def test_empty_disk_of_8_tib(tmp_path: Path, out: Path) -> None:
    """Nothing is read, and nothing written, for what nobody wrote. (ext4 has files of up to 16 TiB.)"""
    need_holes(tmp_path)
    path = tmp_path / "empty.qcow2"
    path.write_bytes(build([], size=8 << 40, cluster_bits=21, l1=[0] * 16))
    done = fastqcow.convert(path, out)
    assert (done.bytes_written, out.stat().st_size, out.stat().st_blocks) == (0, 8 << 40, 0)


@pytest.mark.parametrize("nbytes", [0, 1, 511, 512, 70_001, (3 << 20) + 5])
def test_raw_as_qemu_copies_it(qemu: Qemu, tmp_path: Path, out: Path, nbytes: int) -> None:
    """A disk has whole sectors, for QEMU and for the command."""
    raw, theirs = tmp_path / "disk.raw", tmp_path / "theirs.raw"
    raw.write_bytes(mixed(nbytes))
    qemu.img("convert", "-f", "raw", "-O", "raw", raw, theirs)
    assert main(["convert", "-f", "raw", str(raw), str(out)]) == 0
    assert out.read_bytes() == theirs.read_bytes()
    assert out.stat().st_blocks <= theirs.stat().st_blocks + 8
    with fastqcow.open_raw(raw) as disk:
        done = fastqcow.convert(disk, out)
    assert out.read_bytes() == raw.read_bytes()
    assert (done.source, done.virtual_size, done.clusters_inflated) == (str(raw), nbytes, 0)


def test_raw_holes_are_not_read(tmp_path: Path, out: Path) -> None:
    need_holes(tmp_path)
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as f:
        f.truncate(1 << 40)
        f.seek(700 << 30)
        f.write(PLAIN)
    assert main(["convert", "-f", "raw", str(raw), str(out)]) == 0
    assert out.stat().st_size == 1 << 40
    with out.open("rb") as f:
        assert f.seek(0, os.SEEK_DATA) == 700 << 30
        assert f.read(CLUSTER) == PLAIN


def test_raw_that_looks_like_qcow2(qemu: Qemu, path: Path, tmp_path: Path, out: Path) -> None:
    """Whoever writes to a raw disk can make it look like anything: said to be raw, it is."""
    theirs = tmp_path / "theirs.raw"
    qemu.img("convert", "-f", "raw", "-O", "raw", path, theirs)
    assert main(["convert", "-f", "raw", str(path), str(out)]) == 0
    assert out.read_bytes() == theirs.read_bytes() == IMAGE
    fastqcow.convert(fastqcow.open_raw(io.BytesIO(IMAGE)), out)
    assert out.read_bytes() == IMAGE


def test_raw_is_not_its_own_target(path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the target"):
        fastqcow.convert(fastqcow.open_raw(path), path)
    assert path.read_bytes() == IMAGE


def test_raw_block_device(tmp_path: Path, out: Path) -> None:
    disk = tmp_path / "device.img"
    disk.write_bytes(CONTENTS)
    with loop_device(disk) as device:
        assert main(["convert", "-f", "raw", device, str(out)]) == 0
    assert out.read_bytes() == CONTENTS


def test_raw_has_to_be_said(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(PLAIN)
    assert main(["convert", str(raw), str(out)]) == 1
    assert capsys.readouterr().err == f"fastqcow: {raw}: not a qcow2 image; if this is a raw image, say so with -f raw\n"
    with pytest.raises(fastqcow.FormatError, match="not a qcow2 image"):
        fastqcow.convert(raw, out)
    assert main(["convert", "-f", "raw", "-l", "before", str(raw), str(out)]) == 1
    assert capsys.readouterr().err == f"fastqcow: {raw}: a raw image has no snapshots\n"
    assert leftovers(out) == []


def test_state_of_a_machine_is_no_disk(qemu: Qemu, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    qemu.img("snapshot", "-c", "before", path)
    with fastqcow.open(path) as image, image.snapshot("before") as snapshot, pytest.raises(fastqcow.FormatError, match="empty"):
        fastqcow.convert(snapshot.vm_state, out)
