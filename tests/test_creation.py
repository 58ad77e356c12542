"""convert to qcow2: the same bytes for QEMU and other readers, sound tables, and one file for one disk."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main
from images import mixed, noise, text
from serving import has_nbdkit

needs_isal = pytest.mark.skipif(fastqcow.build_info().isal is None, reason="built without ISA-L")
CONTENTS = mixed(5_000_000) + bytes(3_000_000) + noise(300_000) + text(700_000) + bytes(1024)
SMALL = text(40_000) + bytes(70_000) + noise(20_000) + text(69_616)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENTS[: len(CONTENTS) & ~511])
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.qcow2"


def write(raw: Path, out: Path, *, compress: bool = True, **options: Any) -> fastqcow.Conversion:
    with fastqcow.open_raw(raw, threads=options.pop("threads", 2)) as disk:
        return fastqcow.convert(disk, out, format="qcow2", compress=compress, **options)


def check(qemu: Qemu, raw: Path, out: Path) -> dict[str, Any]:
    """The image is sound, for QEMU and for us, and its disk is this one; returns what is said of it."""
    done = qemu.img("check", "-f", "qcow2", "--output=json", out)
    found = json.loads(done.stdout)
    assert not any(found.get(what) for what in ("corruptions", "leaks", "check-errors"))
    qemu.img("compare", "-f", "raw", "-F", "qcow2", raw, out)
    counts = fastqcow.check(out)
    assert (counts.corruptions, counts.leaks, counts.check_errors, counts.overlaps) == (0, 0, 0, 0)
    with fastqcow.open(out) as ours, fastqcow.open_raw(raw, whole_sectors=True) as theirs:
        assert fastqcow.compare(ours, theirs) is None
    said: dict[str, Any] = json.loads(qemu.img("info", "-f", "qcow2", "--output=json", out).stdout)
    return said


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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def streams(path: Path) -> list[bytes]:
    """The compressed clusters of an image, with what follows them in their last sector."""
    data = path.read_bytes()
    with fastqcow.open(path) as image:
        head = image.header
    found = []
    for i in range(head.l1_entries):
        off = int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
        if off:
            table = fastqcow.parse_l2(data[off : off + head.cluster_size], cluster_bits=head.cluster_bits)
            found += [data[at : at + n] for at, n in zip(table.host_off, table.in_nbytes, strict=True) if n]
    return found


@pytest.mark.parametrize("level", [1, 6, 9, pytest.param("fast", marks=needs_isal)])
def test_distances_stay_within_4_kib(tmp_path: Path, out: Path, level: Any) -> None:
    """Readers that inflate by streaming, with the window that QEMU writes with, see every distance that is too far: the bytes
    repeat themselves after 5,000, which an encoder with a larger window would find."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(5000) * 26 + text(131_072))
    write(raw, out, compression_level=level)

    def inflate_streaming(stream: bytes, window_bits: int) -> int:
        decoder, nbytes, left = zlib.decompressobj(-window_bits), 0, stream
        while not decoder.eof and left:
            nbytes += len(decoder.decompress(left, 256))
            left = decoder.unconsumed_tail
        return nbytes

    found = streams(out)
    assert len(found) >= 2
    assert [inflate_streaming(stream, 12) for stream in found] == [65536] * len(found)
    encoder = zlib.compressobj(6, zlib.DEFLATED, -15)
    far = encoder.compress(noise(5000) * 13) + encoder.flush()
    with pytest.raises(zlib.error, match="too far back"):
        inflate_streaming(far, 12)


def run(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([sys.executable, "-m", "fastqcow", *map(str, arguments)], capture_output=True, check=False, **options)
    assert done.returncode == code, done.stderr.decode()
    return done


def test_standard_input(qemu: Qemu, raw: Path, out: Path) -> None:
    """A pipe, a file, and nothing at all."""
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=raw.read_bytes())
    check(qemu, raw, out)
    from_pipe = digest(out)
    with open(raw, "rb") as file:
        run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, stdin=file)
    assert digest(out) == from_pipe
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=b"")
    assert fastqcow.info(out)["virtual-size"] == 0
    qemu.img("check", out)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-", out, input=b"x" * 70_001)
    with fastqcow.open(out) as image:
        assert image.read() == (b"x" * 70_001).ljust(70_144, b"\0")


def test_stream_to_raw_is_refused(out: Path) -> None:
    done = run("convert", "-f", "raw", "-", out, input=b"x" * 512, code=1)
    assert done.stderr == b"fastqcow: a stream can be written to a qcow2 image only\n"
    assert not out.exists()


def cluster_at(disk: bytes | bytearray, off: int) -> bytes:
    return bytes(disk[off : off + 65536]).ljust(65536, b"\0")


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": True}, {"compress": False}], ids=str)
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@pytest.mark.parametrize("longer", [-100_000, 0, 200_000])
def test_backing_file(qemu: Qemu, tmp_path: Path, out: Path, options: dict[str, Any], backing_format: str, longer: int) -> None:
    """Only what differs is written; and zeroes over data are zeroes."""
    base, raw = out.with_name("base"), tmp_path / "disk.raw"
    below = (SMALL + text(200_000, seed=9))[: len(SMALL) + longer & ~511]
    disk = bytearray(SMALL)
    disk[1000:1010] = b"0123456789"
    disk[131_072:] = bytes(len(SMALL) - 131_072)
    raw.write_bytes(disk[: len(disk) & ~511])
    (tmp_path / "base.raw").write_bytes(below)
    qemu.img("convert", "-f", "raw", "-O", backing_format, tmp_path / "base.raw", base)
    write(raw, out, backing_file="base", backing_format=backing_format, **options)
    said = check(qemu, raw, out)
    assert said["backing-filename"] == "base"
    assert said["backing-filename-format"] == backing_format
    pairs = [(cluster_at(disk, i), cluster_at(below, i)) for i in range(0, len(disk), 65536)]
    stored = [ours for ours, theirs in pairs if ours != theirs and (any(ours) or options.get("compat") == "0.10")]
    assert fastqcow.check(out).allocated_clusters == len(stored) < len(pairs)


def test_backing_file_by_the_command(qemu: Qemu, raw: Path, out: Path) -> None:
    base = out.with_name("ba,se")
    shutil.copy(raw, base)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-B", "ba,se", "-F", "raw", raw, out)
    check(qemu, raw, out)
    by_letters = digest(out)
    run("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "backing_file=ba,,se,backing_fmt=raw", raw, out)
    assert digest(out) == by_letters
    assert fastqcow.check(out).allocated_clusters == 0


def test_errors_of_a_backing_file_bear_its_name(raw: Path, out: Path) -> None:
    base = out.with_name("base.qcow2")
    write(raw, base)
    with fastqcow.open(base) as image:
        l2_off = int.from_bytes(base.read_bytes()[image.header.l1_off :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
    data = bytearray(base.read_bytes())
    data[l2_off : l2_off + 8] = (0x101).to_bytes(8, "big")
    data[l2_off : l2_off + 8] = (1 << 63 | 0x200).to_bytes(8, "big")
    base.write_bytes(data)
    with pytest.raises(fastqcow.FormatError) as caught:
        write(raw, out, backing_file="base.qcow2", backing_format="qcow2")
    assert caught.value.path == str(base)
    assert sorted(p.name for p in out.parent.iterdir()) == ["base.qcow2"]


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


@pytest.mark.parametrize("name", ["snapshot", "chain"])
def test_sources(qemu: Qemu, raw: Path, out: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "disk.qcow2"
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, source)
    if name == "snapshot":
        qemu.img("snapshot", "-c", "before", source)
        qemu.io(source, "write -P 3 0 1M")
        run("convert", "-c", "-l", "before", "-O", "qcow2", source, out)
        check(qemu, raw, out)
        return
    top, flat = tmp_path / "top.qcow2", tmp_path / "flat.raw"
    qemu.img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
    qemu.io(top, "write -P 3 70000 100000", "write -z 1M 256k")
    qemu.img("convert", "-O", "raw", top, flat)
    run("convert", "-c", "-O", "qcow2", "-o", "cluster_size=16k", top, out)
    check(qemu, flat, out)


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
        (["-O", "qcow2", "-o", "encryption=on"], "'encryption' is not an option of the format qcow2"),
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
    with pytest.raises(OSError, match="No space left") as caught:
        write(raw, Path("/dev/full"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_a_stream_that_never_ends_can_be_interrupted(out: Path) -> None:
    """The writer of the pipe is silent: a signal ends it all the same, and nothing is left."""
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "fastqcow", "convert", "-c", "-f", "raw", "-O", "qcow2", "-", str(out)],
        stdin=read_end,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(read_end)
        os.write(write_end, noise(60_000))
        for _ in range(1000):
            if list(out.parent.iterdir()):
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    os.close(write_end)
    assert (process.returncode, stderr) == (130, b"fastqcow: interrupted\n")
    assert list(out.parent.iterdir()) == []


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


def test_tables_lie_side_by_side_behind_the_data(raw: Path, out: Path) -> None:
    write(raw, out, cluster_size=512)
    data = out.read_bytes()
    with fastqcow.open(out) as image:
        head = image.header
    l2 = [
        int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
        for i in range(head.l1_entries)
        if data[head.l1_off + 8 * i :][:8] != bytes(8)
    ]
    l1_end = head.l1_off + (head.l1_entries * 8 + 511 & ~511)
    assert l2 == list(range(l1_end, l1_end + 512 * len(l2), 512))
    assert head.refcount_table_off == l1_end + 512 * len(l2)


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
