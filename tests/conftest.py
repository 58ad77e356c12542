"""Fixtures for all tests: QEMU's tools, and the real data where a checkout has it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import mixed, noise, text
from webserver import IMAGE, WebServer, web_server


class Qemu:
    """qemu-img and qemu-io: the oracle."""

    def img(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        for _ in range(10):
            done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
            if "Unable to get accurate CPU usage" not in done.stderr:  # a key cannot be made on a machine as busy as that
                break
        assert not check or done.returncode == 0, f"qemu-img {arguments}: {done.stderr}"
        return done

    def io(self, image: Path, *commands: str, options: tuple[str, ...] = ()) -> None:
        arguments = [argument for command in commands for argument in ("-c", command)]
        done = subprocess.run(["qemu-io", *options, *arguments, str(image)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "rror" not in done.stdout + done.stderr, done.stdout + done.stderr

    def read(self, image: Path, snapshot: str | None = None) -> bytes | None:
        """All bytes of the disk, or of a snapshot; None where QEMU refuses to open it or fails to read it."""
        raw = image.with_name(image.name + ".oracle")
        of_snapshot = () if snapshot is None else ("-l", snapshot)
        done = self.img("convert", *of_snapshot, "-f", "qcow2", "-O", "raw", image, raw, check=False)
        return raw.read_bytes() if done.returncode == 0 else None


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    if not (shutil.which("qemu-img") and shutil.which("qemu-io")):
        pytest.skip("qemu-img and qemu-io are not installed")
    return Qemu()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real Debian image; beside the checkout, or where FASTQCOW_DATA says."""
    folder = Path(os.environ.get("FASTQCOW_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "boot-zlib.qcow2").exists():
        pytest.skip(f"no boot-zlib.qcow2 in {folder}")
    return folder


@pytest.fixture(scope="session")
def demo_image() -> Path:
    return Path(__file__).parent / "data" / "demo.qcow2"


@pytest.fixture(scope="session")
def ext4_files() -> dict[str, bytes]:
    """What is on the disk of `ext4_image`, by path."""
    return {
        "etc/hostname": b"cow\n",
        "srv/a folder/text": text(300_000),
        "srv/noise": noise(1 << 20),
        "srv/mixed": mixed(3_000_000),
        "srv/nothing": b"",
    }


@pytest.fixture(scope="session")
def ext4_image(qemu: Qemu, ext4_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed image of a disk that is an ext4 file system; the raw disk lies beside it."""
    make = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not make:
        pytest.skip("mkfs.ext4 is not installed")
    folder = tmp_path_factory.mktemp("ext4")
    for name, data in ext4_files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    subprocess.run([make, "-q", "-d", folder / "root", folder / "disk.raw", "16M"], check=True)
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", folder / "disk.raw", folder / "disk.qcow2")
    return folder / "disk.qcow2"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture
def url(server: WebServer) -> str:
    """Of an image on that server: webserver.IMAGE."""
    server.files["disk.qcow2"] = IMAGE
    return server.url("disk.qcow2")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What is started in the background by a shell ignores Ctrl-C, and so do its children; the tests are about what it does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-images",
        type=int,
        default=25,
        metavar="N",
        help="how many random images to try, and of damaged ones a third as many of each kind",
    )
    parser.addoption("--damaged-images", type=int, default=8, metavar="N", help="how often to damage each image of test_damage.py")
    parser.addoption("--random-seed", type=int, default=0, metavar="SEED", help="the first of their seeds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, count = (metafunc.config.getoption(name) for name in ("--random-seed", "--random-images"))
    if "random_image_seed" in metafunc.fixturenames:
        metafunc.parametrize("random_image_seed", range(first, first + count))
    if "damage_seed" in metafunc.fixturenames:
        metafunc.parametrize("damage_seed", range(first, first + max(count // 3, 1)))
