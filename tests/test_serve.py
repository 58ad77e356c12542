"""`fastqcow serve`: where it listens, what it hands on, how it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest

from conftest import Qemu
from fastqcow.cli import main
from images import PAYLOAD, build, data_entry, noise
from serving import SERVE, Server, contents, need, run, served
from webserver import web_server

CLUSTER = 65536
DATA = noise(CLUSTER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([data_entry(PAYLOAD * CLUSTER), 0], DATA))
    return path


@pytest.fixture
def clients() -> None:
    need("nbdcopy", "nbdinfo", "qemu-io")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# Where it listens


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_socket_is_there_until_the_end(path: Path, tmp_path: Path, signum: int) -> None:
    with served(tmp_path, path) as server:
        assert server.uri == f"nbd+unix:///?socket={tmp_path}/nbd"
        assert stat.S_ISSOCK((tmp_path / "nbd").stat().st_mode)
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)
        assert server.stop(signum) == 0
    assert server.said == ""
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("clients")
def test_names_of_any_sort(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b=c&d\u00e9?\n"
    folder.mkdir()
    path.rename(folder / "-disk = 1")
    monkeypatch.chdir(folder)
    server = Server("--socket=so ck&et?", "./-disk = 1")
    try:
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)
    finally:
        assert server.stop() == 0
    assert os.listdir(folder) == ["-disk = 1"]


def test_names_that_nbdkit_does_not_hand_on(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need()
    other = path.with_name(os.fsdecode(b"\xff.qcow2"))
    path.rename(other)
    assert main(["serve", str(other)]) == 1
    assert "nbdkit hands on names in UTF-8 only\n" in capsys.readouterr().err


@pytest.mark.usefixtures("clients")
def test_a_socket_that_was_left_behind_is_replaced(path: Path, tmp_path: Path) -> None:
    server = Server("-k", tmp_path / "nbd", path)
    server.stop(signal.SIGKILL)
    assert (tmp_path / "nbd").exists()
    with served(tmp_path, path) as server:
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)


@pytest.mark.usefixtures("clients")
def test_a_socket_in_use_is_not(path: Path, tmp_path: Path) -> None:
    with served(tmp_path, path) as server:
        done = run(*SERVE, "-k", tmp_path / "nbd", path, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"fastqcow: {tmp_path}/nbd: a server listens on this socket already\n"
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)
        server.stop()  # which has seen a client that went away at once, and says so


def test_a_file_is_not_taken_for_a_socket(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need()
    before = path.read_bytes()
    assert main(["serve", "-k", str(path), str(path)]) == 1
    assert capsys.readouterr().err == f"fastqcow: {path}: exists, and is not a socket\n"
    assert path.read_bytes() == before


@pytest.mark.usefixtures("clients")
def test_tcp(path: Path, tmp_path: Path) -> None:
    port = free_port()
    server = Server("-p", str(port), path)
    try:
        assert server.uri == f"nbd://127.0.0.1:{port}"
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)
    finally:
        assert server.stop() == 0


@pytest.mark.usefixtures("clients")
def test_bind(path: Path, tmp_path: Path) -> None:
    """To another address than the usual one."""
    port = free_port()
    server = Server("-b", "127.0.0.2", "-p", str(port), path)
    try:
        assert server.uri == f"nbd://127.0.0.2:{port}"
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)
        assert run("nbdinfo", f"nbd://127.0.0.1:{port}", check=False).returncode == 1
    finally:
        assert server.stop() == 0


@pytest.mark.usefixtures("clients")
def test_by_a_client_that_has_a_socket(path: Path, tmp_path: Path) -> None:
    """As systemd has it; nothing is printed."""
    done = run("nbdcopy", "--", "[", *SERVE, path, "]", tmp_path / "copy")
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "copy").read_bytes() == DATA + bytes(CLUSTER)
    done = run("nbdinfo", "--size", "--", "[", *SERVE, "-k", tmp_path / "nbd", path, "]", check=False)
    assert done.returncode == 1
    assert "fastqcow: there is a socket to listen on from who started this, and -k, -p and -b name another\n" in done.stderr


# What is served


@pytest.mark.usefixtures("clients")
def test_snapshot(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "128k")
    qemu.io(path, "write -P 1 0 64k")
    qemu.img("snapshot", "-c", "before", path)
    qemu.io(path, "write -P 2 0 64k")
    for options, pattern in (["-l", "before"], b"\1"), (["--snapshot=1"], b"\1"), ([], b"\2"):
        with served(tmp_path, *options, path) as server:
            assert contents(server.uri, tmp_path) == pattern * CLUSTER + bytes(CLUSTER)


@pytest.mark.usefixtures("clients")
def test_backing(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "inner" / "top.qcow2"
    base.write_bytes(DATA)
    top.parent.mkdir()
    top.write_bytes(build([0], backing=("../base.raw", "raw")))
    done = run(*SERVE, top, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "--backing=follow" in done.stderr
    for rule, expected in (("follow", DATA), (str(base), DATA), ("none", bytes(CLUSTER))):
        with served(tmp_path, "--backing", rule, top) as server:
            assert contents(server.uri, tmp_path) == expected


@pytest.mark.usefixtures("clients")
def test_encrypted(qemu: Qemu, tmp_path: Path) -> None:
    """The package that decrypts is that of the command's own environment."""
    pytest.importorskip("cryptography")
    path, password = tmp_path / "disk.qcow2", tmp_path / "password"
    password.write_bytes(b"x")
    secret = ("--object", "secret,id=key,data=x")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    for _ in range(20):  # it times its own hashing, and gives up where the clock does not move meanwhile
        made = qemu.img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M", check=False)
        if "CPU usage" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    name = f"driver=qcow2,encrypt.key-secret=key,file.driver=file,file.filename={path}"
    qemu.io(Path(name), "write -P 3 64k 100k", options=(*secret, "--image-opts"))
    with served(tmp_path, "--password-file", password, path) as server:
        assert contents(server.uri, tmp_path) == (bytes(CLUSTER) + b"\3" * (100 << 10)).ljust(1 << 20, b"\0")
    done = run(*SERVE, path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "password" in done.stderr


@pytest.mark.usefixtures("clients")
def test_url(path: Path, tmp_path: Path) -> None:
    """By packages of the command's own environment, as for encrypted images."""
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with web_server() as server:
        server.files["disk.qcow2"] = path.read_bytes()
        with served(tmp_path, server.url("disk.qcow2")) as nbd:
            assert contents(nbd.uri, tmp_path) == DATA + bytes(CLUSTER)
    assert server.sent


# What is handed on


@pytest.mark.usefixtures("clients")
def test_what_follows_two_dashes_is_nbdkits(path: Path) -> None:
    """A client may write with a filter of nbdkit's, and sees what it wrote; the image stays as it is."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    client = "qemu-io -f raw -c 'read -P 0 64k 64k' -c 'write -P 1 4k 100k' -c 'read -P 1 4k 100k' $uri"
    done = run(*SERVE, path, "--", "--filter=cow", "--run", client)
    assert "wrote 102400/102400 bytes at offset 4096\n" in done.stdout
    assert "verification failed" not in done.stdout
    assert hashlib.sha256(path.read_bytes()).digest() == digest


@pytest.mark.usefixtures("clients")
def test_run_ends_with_its_command(path: Path, tmp_path: Path) -> None:
    done = run(*SERVE, path, "--", "--run", "echo $uri; exit 7", check=False)
    assert done.returncode == 7
    assert done.stdout.startswith("nbd+unix://")
    assert done.stdout.count("\n") == 1
    done = run(*SERVE, "-k", tmp_path / "nbd", path, "--", "--run", "nbdinfo --size $uri")
    assert done.stdout == f"{2 * CLUSTER}\n"
    assert not (tmp_path / "nbd").exists()


@pytest.mark.usefixtures("clients")
def test_two_dashes_without_anything(path: Path, tmp_path: Path) -> None:
    with served(tmp_path, path, "--") as server:
        assert contents(server.uri, tmp_path) == DATA + bytes(CLUSTER)


@pytest.mark.usefixtures("clients")
def test_a_python3_on_the_path_is_not_taken_for_the_plugins(path: Path, tmp_path: Path) -> None:
    """As that of a virtual environment: here one whose standard library would not even start. Commands get the PATH as it is."""
    version = ".".join(map(str, sys.version_info[:2]))
    library = tmp_path / "home" / "lib" / f"python{version}"
    for folder in (library / "lib-dynload", tmp_path / "venv" / "bin", tmp_path / "home" / "bin"):
        folder.mkdir(parents=True)
    for name in ("os", "encodings"):
        (library / f"{name}.py").write_text("raise SystemError('this is not the library of the plugin')\n")
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {tmp_path}/home/bin\n")
    (tmp_path / "venv" / "bin" / "python3").symlink_to(sys.executable)
    search = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    alone = run("nbdkit", "--unix=-", "--run", "true", "python", path, check=False, env={**os.environ, "PATH": search})
    assert alone.returncode != 0
    assert "SystemError" in alone.stderr, "the library is not taken anyway: there is nothing to test"
    done = run(*SERVE, path, "--", "--run", "echo $PATH", env={**os.environ, "PATH": search})
    assert done.stdout == f"{search}\n"


# What is missing or wrong


def test_without_nbdkit(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert main(["serve", str(path)]) == 1
    said = "nbdkit is not installed; on Debian and Ubuntu it is in nbdkit and nbdkit-plugin-python"
    assert capsys.readouterr().err == f"fastqcow: {said}\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("exit 1", "nbdkit has no Python plugin; on Debian and Ubuntu it is in nbdkit-plugin-python\n"),
        ("echo name=python", "nbdkit has no Python plugin; on Debian and Ubuntu it is in nbdkit-plugin-python\n"),
        ("echo python_version=3.9.18", "nbdkit's plugin runs Python 3.9, and this fastqcow is built for another ("),
        ("echo python_version=3.1.1", "nbdkit's plugin runs Python 3.1, and this fastqcow is built for another ("),
    ],
)
def test_without_its_plugin(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, said: str
) -> None:
    """By a program in nbdkit's place."""
    nbdkit = tmp_path / "bin" / "nbdkit"
    nbdkit.parent.mkdir()
    nbdkit.write_text(f'#!/bin/sh\n[ "$*" = "--dump-plugin python" ] || exit 9\n{answer}\n')
    nbdkit.chmod(0o755)
    monkeypatch.setenv("PATH", str(nbdkit.parent))
    assert main(["serve", str(path)]) == 1
    found = capsys.readouterr().err
    assert found.startswith(f"fastqcow: {said}")
    assert found.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-k", "x", "-p", "1"], "a Unix socket (-k) and a TCP port or address (-p, -b) exclude each other"),
        (["-k", "x", "-b", "::1"], "a Unix socket (-k) and a TCP port or address (-p, -b) exclude each other"),
        (["-m", "0"], "threads is 0; at least one is needed"),
    ],
)
def test_bad_options(path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    need()
    assert main(["serve", *arguments, str(path)]) == 1
    assert capsys.readouterr().err == f"fastqcow: {said}\n"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "nbd"])
def test_bad_ports(path: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", f"--port={port}", str(path)])
    assert ended.value.code == 1
    assert f"'{port}' is not a port; write a number from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "reason"), [("none", "No such file"), (".", "Is a directory"), ("text", "not a qcow2 image")])
def test_bad_images(tmp_path: Path, bad: str, reason: str) -> None:
    need()
    (tmp_path / "text").write_text("hello\n")
    done = run(*SERVE, "-k", "nbd", bad, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"fastqcow: {bad}: {reason}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "nbd").exists()
