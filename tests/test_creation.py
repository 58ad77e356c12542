"""convert to qcow2: the same bytes for QEMU and other readers, sound tables, and one file for one disk."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import need_full_device
from conftest import Qemu
from creating import check, digest, needs_isal, out, raw, write
from fastqcow.cli import main
from images import mixed
from serving import has_nbdkit

__all__ = ["out", "raw"]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"compression_level": 1},
    {"compression_level": 9},
    {"compression_type": "zstd"},
    {"compression_type": "zstd", "compression_level": "fast"},
    {"compression_type": "zstd", "compression_level": 7, "extended_l2": True},
    {"compat": "0.10"},
    {"compat": "0.10", "cluster_size": 4096},
    {"extended_l2": True},
    {"extended_l2": True, "compress": False},
    {"compress": False},
    {"compress": False, "refcount_bits": 64},
    {"sparse_size": 0},
    {"sparse_size": 0, "compress": False},
    *({"cluster_size": 1 << bits} for bits in (9, 12, 18, 21)),
    *({"refcount_bits": 1 << order} for order in range(7)),
    {"refcount_bits": 1, "cluster_size": 512},
    {"refcount_bits": 2, "cluster_size": 1 << 20, "compression_type": "zstd"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_every_option(qemu: Qemu, raw: Path, out: Path, options: dict[str, Any]) -> None:
    done = write(raw, out, **options)
    said = check(qemu, raw, out)
    data = said["format-specific"]["data"]
    assert said["virtual-size"] == done.virtual_size == raw.stat().st_size
    assert said["cluster-size"] == options.get("cluster_size", 65536)
    assert data["compat"] == options.get("compat", "1.1")
    assert data["refcount-bits"] == options.get("refcount_bits", 16)
    assert data.get("extended-l2", False) == options.get("extended_l2", False)
    assert data.get("compression-type", "zlib") == options.get("compression_type", "zlib")
    compressed = fastqcow.check(out).compressed_clusters
    assert (compressed > 0) == options.get("compress", True)


@needs_isal
def test_fast(qemu: Qemu, raw: Path, out: Path) -> None:
    write(raw, out, compression_level="fast")
    check(qemu, raw, out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression_type": "zstd"},
        {"compression_type": "zstd", "cluster_size": 2 << 20},
        {"cluster_size": 512},
        pytest.param({"compression_level": "fast"}, marks=needs_isal),
    ],
    ids=str,
)
def test_the_same_file_on_any_number_of_threads(raw: Path, out: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """And from a source that is compressed, from one without holes, and from a stream."""
    found = set()
    for threads in (1, 2, 8):
        write(raw, out, threads=threads, **options)
        found.add(digest(out))
        other = tmp_path / f"from{threads}.qcow2"
        fastqcow.convert(out, other, format="qcow2", compress=True, threads=threads, **options)
        found.add(digest(other))
    with open(raw, "rb") as file:
        fastqcow.convert(fastqcow.RawStream(file), out, format="qcow2", compress=True, **options)
    found.add(digest(out))
    fastqcow.convert(fastqcow.open_raw(io.BytesIO(raw.read_bytes())), out, format="qcow2", compress=True, **options)
    found.add(digest(out))
    assert len(found) == 1


def test_as_small_as_qemu_makes_it(qemu: Qemu, raw: Path, out: Path, tmp_path: Path) -> None:
    """Its files end where the data does, ours with a table."""
    for method in ("zlib", "zstd"):
        theirs = tmp_path / f"{method}.qcow2"
        qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={method}", raw, theirs)
        write(raw, out, compression_type=method)
        assert out.stat().st_size <= theirs.stat().st_size * 1.005 + 65536


@pytest.mark.parametrize("cluster_size", [65536, 2 << 20])
def test_64_tib_with_little_data(qemu: Qemu, tmp_path: Path, out: Path, cluster_size: int) -> None:
    source = tmp_path / "large.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", source, "64T")
    qemu.io(source, "write -P 7 50T 3M", "write -P 9 70368744112128 64k")
    fastqcow.convert(source, out, format="qcow2", compress=True, cluster_size=cluster_size)
    assert out.stat().st_size < 16 << 20
    qemu.img("check", out)
    with fastqcow.open(out) as image:
        assert image.size == 64 << 40
        assert image.pread(4 << 20, 50 << 40) == b"\7" * (3 << 20) + bytes(1 << 20)
        assert image.pread(65536, 70368744112128) == b"\t" * 65536


def test_disk_that_is_too_large(qemu: Qemu, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "large.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", source, "129G")
    with pytest.raises(ValueError, match="an image can have 137438953472"):
        fastqcow.convert(source, out, format="qcow2", cluster_size=512)


def test_random(qemu: Qemu, tmp_path: Path, out: Path, random_image_seed: int) -> None:
    """Sizes, geometries, contents and options of all kinds, over a backing file or not."""
    rng = random.Random(random_image_seed)
    raw = tmp_path / "disk.raw"
    with open(raw, "wb") as file:
        file.truncate(rng.randrange(1, 6000) * 512)
        for i in range(rng.randrange(6)):
            file.seek(rng.randrange(raw.stat().st_size))
            file.write(mixed(rng.randrange(1, 400_000), seed=i)[: raw.stat().st_size - file.tell()])
    version2 = rng.random() < 0.2
    options: dict[str, Any] = {"cluster_size": 1 << rng.choice((9, 10, 12, 14, 16, 17, 21)), "compress": rng.random() < 0.8}
    if version2:
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = 1 << rng.randrange(7)
        options["compression_type"] = rng.choice(("zlib", "zstd"))
        options["extended_l2"] = options["cluster_size"] >= 16384 and rng.random() < 0.3
    if rng.random() < 0.4:
        changed = bytearray(raw.read_bytes())
        for _ in range(3):
            at = rng.randrange(len(changed))
            changed[at : at + 50_000] = bytes(len(changed[at : at + 50_000]))
        out.with_name("base").write_bytes(changed)
        options |= {"backing_file": "base", "backing_format": "raw"}
    write(raw, out, sparse_size=rng.choice((0, 4096)), threads=rng.choice((1, 3)), **options)
    check(qemu, raw, out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cluster_size": 1000}, "cluster_size is 1000"),
        ({"cluster_size": 4 << 20}, "cluster_size is 4194304"),
        ({"compat": "2"}, "compat is '2'"),
        ({"compat": "0.10", "compression_type": "zstd"}, "compression_type=zstd needs compat='1.1'"),
        ({"compat": "0.10", "extended_l2": True}, "extended_l2 needs compat='1.1'"),
        ({"compat": "0.10", "refcount_bits": 8}, "refcount_bits needs compat='1.1'"),
        ({"compression_type": "lz4"}, "compression_type is 'lz4'"),
        ({"compression_level": 10}, "compression_level is 10; for zlib it can be 1 to 9"),
        ({"compression_type": "zstd", "compression_level": 20}, "for zstd it can be 1 to 19"),
        ({"refcount_bits": 3}, "refcount_bits is 3"),
        ({"extended_l2": True, "cluster_size": 8192}, "extended_l2 needs clusters of 16384"),
        ({"backing_file": "base"}, "go together"),
        ({"backing_file": "base", "backing_format": "vmdk"}, "backing_format is 'vmdk'"),
        ({"backing_file": "nbd:host", "backing_format": "raw"}, "plain path"),
        ({"backing_file": "b" * 400, "backing_format": "raw", "cluster_size": 512}, "there is room for"),
        ({"lazy_refcounts": True}, "'lazy_refcounts' is not supported"),
        ({"preallocation": "falloc"}, "preallocation is for raw"),
        ({"copy_offload": True}, "copy_offload is for raw"),
        ({"in_place": True}, "in_place is for raw"),
    ],
    ids=str,
)
def test_refused_by_name(raw: Path, out: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write(raw, out, **options)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(
            (["-O", "qcow2", "-o", f"{name}=on"], f"{name!r} is not an option of the format qcow2")
            for name in ("size", "data_file", "data_file_raw", "encryption", "encrypt.format", "preallocation", "lazy_refcounts")
        ),
        (["-O", "qcow2", "-S", "32M"], "for a qcow2 image it can be up to 16777216"),
        (["-O", "qcow2", "-o", "cluster_size=many"], "cluster_size cannot be 'many'"),
        (["-O", "qcow2", "-o", "extended_l2=maybe"], "extended_l2 cannot be 'maybe'"),
        (["-O", "raw", "-o", "cluster_size=4k"], "'cluster_size' is not an option of the format raw"),
        (["-c"], "compress is for qcow2 targets"),
        (["-B", "base", "-F", "raw"], "backing_file is for qcow2 targets"),
        (["-O", "qcow2", "-n"], "in_place is for raw targets"),
    ],
    ids=str,
)
def test_refused_by_the_command(raw: Path, out: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["convert", "-f", "raw", *arguments, str(raw), str(out)])
    except SystemExit as e:  # as argparse ends
        code = int(str(e.code))
    assert code == 1
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_disk_without_room(raw: Path, out: Path) -> None:
    import resource

    out.write_bytes(b"precious")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(raw, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(out)
    assert [(p.name, p.read_bytes()) for p in out.parent.iterdir()] == [("disk.qcow2", b"precious")]


def test_devices(raw: Path) -> None:
    write(raw, Path("/dev/null"))
    full = need_full_device()
    with pytest.raises(OSError, match="No space left") as caught:
        write(raw, Path(full))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, full)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_writes_while_its_parent_reads(raw: Path, out: Path, tmp_path: Path) -> None:
    """From a reader of the parent's, in whose cache clusters were being inflated when the child was forked."""
    source = tmp_path / "disk.qcow2"
    write(raw, source)
    expected = digest(source)
    with fastqcow.open(source, cache_size=4 << 20) as image:
        stop = threading.Event()

        def read_on() -> None:
            while not stop.is_set():
                for off in range(0, image.size, 65536):
                    image.pread(512, off)

        readers = [threading.Thread(target=read_on) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(10):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(20)
                    fastqcow.convert(image, out, format="qcow2", compress=True)
                    os._exit(0 if digest(out) == expected else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            for reader in readers:
                reader.join()


def test_progress(raw: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(raw, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (raw.stat().st_size, raw.stat().st_size)
    assert seen == sorted(seen)


@pytest.mark.parametrize("options", [{}, {"compression_type": "zstd"}, {"compress": False}], ids=str)
def test_dissect_reads_it(raw: Path, out: Path, options: dict[str, Any]) -> None:
    if not importlib.util.find_spec("dissect") or not importlib.util.find_spec("dissect.hypervisor"):
        pytest.skip("dissect.hypervisor is not installed")
    if options.get("compression_type") == "zstd":
        pytest.importorskip("backports.zstd")
    qcow2 = importlib.import_module("dissect.hypervisor.disk.qcow2")
    write(raw, out, **options)
    with open(out, "rb") as file:
        assert qcow2.QCow2(file).open().read() == raw.read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": 4096}, pytest.param({"compression_level": "fast"}, marks=needs_isal)], ids=str
)
def test_7zip_reads_it(raw: Path, out: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    tool = shutil.which("7zz") or shutil.which("7z")
    if not tool:
        pytest.skip("7-Zip is not installed")
    write(raw, out, **options)
    done = subprocess.run([tool, "x", "-so", "-tqcow", out], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == raw.read_bytes()


def test_nbdkit_reads_it(raw: Path, out: Path, tmp_path: Path) -> None:
    """By a filter that inflates with a window of its own."""
    if not (shutil.which("nbdkit") and shutil.which("nbdcopy")):
        pytest.skip("nbdkit and nbdcopy are not installed")
    if not has_nbdkit("filter", "qcow2dec"):
        pytest.skip("nbdkit has no filter qcow2dec")
    write(raw, out)
    copied = tmp_path / "copied.raw"
    subprocess.run(["nbdkit", "-U", "-", "--filter=qcow2dec", "file", str(out), "--run", f'nbdcopy "$uri" {copied}'], check=True)
    assert copied.read_bytes() == raw.read_bytes()
