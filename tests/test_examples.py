"""The examples of README and of the pages of docs/ that are pieces of programs, and commands, run where the files lie that they
name. Whole programs are for test_recipes.py.

What a page takes for granted is made here: the files, a server in place of those of the network, and `image`, which is open.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastqcow
from conftest import Qemu
from images import build
from serving import SECONDS, need, run
from webserver import WebServer

TOP = Path(__file__).parents[1]
PYTHON = ["README.md", "docs/index.md", "docs/guide.md", "docs/integrations/urls.md", "docs/writing.md"]
SHELL = ["README.md", "docs/integrations/nbd.md", "docs/integrations/urls.md", "docs/writing.md"]

# How commands start that are not run, and why.
NOT_RUN = {
    "script/": "what runs these tests",
    "pip install": "it is installed",
    "apt-get install": "it is installed",
    "fastqcow bench": "takes seconds; test_benchmark.py runs it",
    "qemu-system-x86_64": "test_guest.py boots a machine",
    "modprobe nbd": "needs the kernel's module",
    "nbd-client": "needs the kernel's module",
    "mount": "needs the kernel's module",
    "fastqcow serve -b 0.0.0.0": "needs certificates",
    "fastqcow: ": "is what a command says",
}


@pytest.fixture
def here(qemu: Qemu, ext4_image: Path, tmp_path: Path) -> Path:
    """A folder with what the pages name. What they say lies in /srv and /tmp lies beside it."""
    here, base = tmp_path / "here", tmp_path / "srv" / "base.qcow2"
    for folder in (here, base.parent, tmp_path / "tmp"):
        folder.mkdir()
    disk, raw = here / "disk.qcow2", ext4_image.with_suffix(".raw")
    shutil.copy(ext4_image, disk)
    qemu.img("snapshot", "-c", "before-upgrade", disk)
    qemu.img("bitmap", "--add", disk, "backup")
    shutil.copy(raw, here / "disk.raw")
    shutil.copy(raw, here / "other.raw")
    for path in (base, here / "base.qcow2"):
        shutil.copy(ext4_image, path)
    qemu.img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, here / "top.qcow2")
    secret = ["--object", "secret,id=key,data=...", "-o", "encrypt.format=aes,encrypt.key-secret=key"]
    qemu.img("create", "-q", "-f", "qcow2", *secret, here / "secret.qcow2", "1M")
    return here


def adapted(text: str, here: Path, server: WebServer) -> str:
    """With a server of ours in place of all others. s3:// stands for any file system that takes options."""
    overlay = build([0], backing=("base.qcow2", "qcow2"))
    data = (here / "disk.qcow2").read_bytes()
    server.files |= {"disk.qcow2": data, "debian-12.qcow2": data, "base.qcow2": data, "overlay.qcow2": overlay}
    text = re.sub(r"https://(cloud\.example\.org|host)/", server.url(""), text)
    text = re.sub(r"(?<=[\s'\"=])/(srv|tmp)/", lambda found: f"{here.parent}/{found[1]}/", text).replace("s3://", "memory://")
    return text.replace("/path/to/site-packages", str(Path(fastqcow.__file__).parents[1]))


def need_fsspec(page: str) -> None:
    if "urls" in page and not (find_spec("fsspec") and find_spec("aiohttp")):
        pytest.skip("fsspec or aiohttp is not installed")


@pytest.mark.parametrize("page", PYTHON)
def test_python(page: str, here: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    need_fsspec(page)
    if "password=" in (text := adapted((TOP / page).read_text(), here, server)):
        pytest.importorskip("cryptography")
    monkeypatch.chdir(here)
    contents = {name: (here / name).read_bytes() for name in ("disk.qcow2", "disk.raw")}
    if "memory://" in text:
        importlib.import_module("fsspec").filesystem("memory").pipe("/bucket/disk.qcow2", contents["disk.qcow2"])
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert programs
    for program in programs:
        with fastqcow.open("disk.qcow2") as image:
            names = {"fastqcow": fastqcow, "image": image}
            exec(compile(program, page, "exec"), names)
        if "done" in names:
            assert names["done"].checksum == hashlib.sha256(contents["disk.raw"]).hexdigest()  # type: ignore[attr-defined]
        names.clear()
        gc.collect()  # which some examples leave it to to close an image
    assert {name: (here / name).read_bytes() for name in contents} == contents


def commands(page: str, here: Path, server: WebServer) -> list[str]:
    """The lines of the page's blocks that are set in by four spaces."""
    text = re.sub(r"^```.*?^```$", "", adapted((TOP / page).read_text(), here, server), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE)


@contextlib.contextmanager
def serving(command: str, environment: dict[str, str]) -> Iterator[str]:
    """Started by a shell; gives the first line that it says."""
    process = subprocess.Popen(["sh", "-c", f"exec {command}"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


@pytest.mark.parametrize("page", SHELL)
def test_shell(page: str, here: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server runs until the next one is started; what it says follows on the page, if anything does."""
    need_fsspec(page)
    lines = commands(page, here, server)
    if any("nbd" in line or "fastqcow serve" in line for line in lines):
        need("nbdcopy", "nbdinfo", "qemu-img")
    monkeypatch.chdir(here)
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    ran = 0
    with contextlib.ExitStack() as running:
        uri = ""
        for line in lines:
            if line.startswith("nbd+unix:"):
                assert line == uri
            elif line.startswith(tuple(NOT_RUN)):
                continue
            elif line.startswith("fastqcow serve") and "--run" not in line:
                running.close()
                uri = running.enter_context(serving(line, environment))
                assert uri.startswith("nbd+unix://")
            else:
                done = run("sh", "-c", line, check=False, env=environment)
                assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
            ran += 1
    assert ran
