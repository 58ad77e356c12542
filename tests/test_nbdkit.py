"""What nbdkit serves by our plugin: bytes, extents and errors, by NBD's own clients, with QEMU as the oracle."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastqcow
from capabilities import need_proc
from conftest import Qemu
from fastqcow.integrations import __file__ as integrations
from fastqcow.libnbd import Client
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, mixed, noise, patched, text
from serving import Server, contents, extents, need, run, served, served_by_qemu

PLUGIN = Path(integrations).with_name("nbdkit.py")
CLUSTER = 65536
DATA, HOLE_ZERO = 0, 3


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    need("nbdcopy", "nbdinfo", "qemu-img", "qemu-io", "qemu-nbd")


@pytest.fixture(scope="module")
def images(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind, of the same contents, with the options that each is served with."""
    folder = tmp_path_factory.mktemp("images")
    raw = folder / "raw"
    raw.write_bytes(mixed(3 << 20) + bytes(1 << 20) + mixed(700_416, 1))
    os.truncate(raw, 9 << 20)
    for name, options in {
        "zlib": ["-c"],
        "zstd": ["-c", "-o", "compression_type=zstd"],
        "plain": ["-o", "cluster_size=4k"],
        "subclusters": ["-c", "-o", "extended_l2=on,cluster_size=16k"],
    }.items():
        qemu.img("convert", "-f", "raw", "-O", "qcow2", *options, raw, folder / name)
    qemu.img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "zlib", folder / "overlay")
    qemu.io(folder / "overlay", "write -P 5 1M 100k", "write -z 64k 64k", "write -P 6 8M 4k")
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'data'},data_file_raw=off", folder / "outside", "9M")
    qemu.io(folder / "outside", "write -P 7 64k 1M", "write -P 8 3M 512")
    return folder


@pytest.mark.parametrize("name", ["zlib", "zstd", "plain", "subclusters", "overlay", "outside"])
def test_bytes_and_extents_are_those_of_qemu_nbd(images: Path, tmp_path: Path, name: str) -> None:
    path = images / name
    with served(tmp_path, path) as server, served_by_qemu(tmp_path, "-f", "qcow2", path) as oracle:
        assert extents(server.uri) == extents(oracle)
        assert contents(server.uri, tmp_path) == contents(oracle, tmp_path)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, path)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, oracle)


def test_map_of_qemu_img(images: Path, tmp_path: Path) -> None:
    """It asks for one extent at a time."""
    with served(tmp_path, images / "overlay") as server, served_by_qemu(tmp_path, "-f", "qcow2", images / "overlay") as oracle:
        command = ("qemu-img", "map", "--output=json", "-f", "raw")
        assert run(*command, server.uri).stdout == run(*command, oracle).stdout


def test_extents_are_those_of_map(images: Path, tmp_path: Path) -> None:
    expected: list[tuple[int, int, int]] = []
    with fastqcow.open(images / "zlib") as image, served(tmp_path, images / "zlib") as server:
        for extent in image.map():
            kind = DATA if extent.data else HOLE_ZERO
            if expected and expected[-1][2] == kind:
                expected[-1] = (expected[-1][0], expected[-1][1] + extent.length, kind)
            else:
                expected.append((extent.start, extent.length, kind))
        assert extents(server.uri) == expected
        assert {kind for _, _, kind in expected} == {DATA, HOLE_ZERO}


def test_more_extents_than_fit_an_answer(tmp_path: Path) -> None:
    """8,191 of them, of one cluster each, all data of the same cluster."""
    path, count = tmp_path / "disk.qcow2", 8191
    path.write_bytes(build([data_entry(PAYLOAD * CLUSTER) * (i % 2) for i in range(count)], noise(CLUSTER)))
    with served(tmp_path, path) as server:
        assert extents(server.uri) == [(i * CLUSTER, CLUSTER, DATA if i % 2 else HOLE_ZERO) for i in range(count)]


@pytest.mark.parametrize("size", [0, 512, 1 << 20])
def test_sizes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([0] * 16, size=size))
    with served(tmp_path, path) as server:
        assert run("nbdinfo", "--size", server.uri).stdout == f"{size}\n"


def test_raw_images_end_with_a_sector(tmp_path: Path) -> None:
    """As qemu-nbd's do."""
    path, data = tmp_path / "disk.raw", noise(1000)
    path.write_bytes(data)
    with served(tmp_path, "-f", "raw", path) as server:
        assert contents(server.uri, tmp_path) == data.ljust(1024, b"\0")


def test_what_clients_are_told(images: Path, tmp_path: Path) -> None:
    with served(tmp_path, images / "zlib") as server:
        for question in ("--is=read-only", "--can=multi-conn", "--can=structured-reply", "--can=connect"):
            run("nbdinfo", question, server.uri)
        for question in ("--can=write", "--can=trim", "--can=zero", "--is=rotational"):
            assert run("nbdinfo", question, server.uri, check=False).returncode == 2


def test_requests_run_at_once() -> None:
    done = run(str(shutil.which("nbdkit")), "--dump-plugin", "python", PLUGIN, env={**os.environ, "PATH": os.devnull})
    assert "\nthread_model=parallel\n" in done.stdout


def test_many_clients_and_requests_at_once(images: Path, tmp_path: Path) -> None:
    expected = (images / "raw").read_bytes()
    with served(tmp_path, images / "zlib", "-m", "3") as server:

        def copy(number: int) -> bytes:
            target = tmp_path / f"copy{number}"
            run("nbdcopy", "--connections=3", "--requests=9", "--request-size=16384", server.uri, target)
            return target.read_bytes()

        with ThreadPoolExecutor(4) as pool:
            assert all(data == expected for data in pool.map(copy, range(4)))


def test_reads_of_any_place_and_length(images: Path, tmp_path: Path) -> None:
    rng, expected = random.Random(1), (images / "raw").read_bytes()
    with served(tmp_path, images / "zstd"):
        client = Client.of_socket(str(tmp_path / "nbd"))
        for _ in range(200):
            start, nbytes = rng.randrange(5 << 20), rng.choice((1, 512, 700, 4096, 70_000, 1_000_000))
            assert client.pread(nbytes, start) == expected[start : start + nbytes]
        client.close()


def test_damage_is_an_error_where_it_is(tmp_path: Path) -> None:
    """And two lines of the log, without a traceback. The rest is served."""
    path, data = tmp_path / "disk.qcow2", text(CLUSTER)
    stream = deflate(data)
    cut = PAYLOAD * CLUSTER + CLUSTER
    entries = [compressed_entry(PAYLOAD * CLUSTER, len(stream), 16), compressed_entry(cut, 600, 16)]
    path.write_bytes(build(entries, stream.ljust(CLUSTER, b"\0") + noise(CLUSTER)))
    with served(tmp_path, path) as server:
        client = Client.of_socket(str(tmp_path / "nbd"))
        for _ in range(2):
            assert client.pread(CLUSTER, 0) == data
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                client.pread(512, CLUSTER)
        client.close()
        assert server.stop() == 0
    assert server.said.count(f"{path}: ") == 2
    assert server.said.count("(guest offset 0x10000") == 2
    assert "File" not in server.said


def test_a_corrupt_image_is_served_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(patched(build([0]), 72, (2).to_bytes(8, "big")))
    with served(tmp_path, path) as server:
        assert contents(server.uri, tmp_path) == bytes(CLUSTER)
        server.stop()
    assert server.said == f"fastqcow: warning: {path}: the image is marked as corrupt\n"


# Without `fastqcow serve`


def nbdkit(*parameters: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """nbdkit with the plugin, as long as it takes to ask for the size. No python3 on the PATH: see cli/serve.py."""
    command = [str(shutil.which("nbdkit")), "--unix=-", "--run", f'{shutil.which("nbdinfo")} --size "$uri"']
    environment = {**os.environ, "PATH": os.devnull}
    return run(*command, "python", PLUGIN, *parameters, check=check, env=environment)


def test_alone(images: Path) -> None:
    assert nbdkit(f"file={images / 'zlib'}", "threads=1", "cache-size=1M", "backing=none").stdout == f"{9 << 20}\n"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ([], "no image is given; write file=PATH"),
        (["file=none"], "none: No such file or directory"),
        (["file=.", "format=raw"], ".: Is a directory"),
        (["file=a", "format=vmdk"], "a: the format vmdk is not supported; qcow2 and raw are"),
        (["image=a"], "image is not a parameter; there are file, format, snapshot, "),
        (["file=zlib", "threads=0"], "threads is 0; at least one is needed"),
        (["file=zlib", "snapshot=x"], "zlib: no snapshot has the id or name 'x'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(images: Path, monkeypatch: pytest.MonkeyPatch, parameters: list[str], said: str) -> None:
    monkeypatch.chdir(images)
    done = nbdkit(*parameters, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"fastqcow: {said}")
    assert done.stderr.count("\n") == 1


def test_a_package_for_another_python_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fastqcow"
    shutil.copytree(PLUGIN.parents[1], folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    plugin = folder / "integrations" / "nbdkit.py"
    done = run("nbdkit", "--unix=-", "--run", "true", "python", plugin, "file=x", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fastqcow: {folder} cannot be loaded by Python 3.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_connections_leave_nothing_behind(images: Path, tmp_path: Path, threads: int) -> None:
    """Their threads keep their Python thread states, which weigh 5 KiB at least, to the end of the connection and no longer."""
    need_proc()

    def connect(server: Server, count: int) -> int:
        for _ in range(count):
            client = Client.of_socket(str(tmp_path / "nbd"))
            assert client.pread(512, 0) == client.pread(512, 0)
            client.close()
        return int(Path(f"/proc/{server.process.pid}/status").read_text().partition("RssAnon:")[2].split()[0])

    with served(tmp_path, images / "zlib", "-m", str(threads)) as server:
        before = connect(server, 50)
        assert connect(server, 400) - before < 400 * threads * 2
