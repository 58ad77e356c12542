"""dissect.hypervisor's own tests of its qcow2 reader, with fastqcow in its place, and with itself as the control.

They come from its source distribution, by pip, and are changed in nothing but two digests.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import chdir
from pathlib import Path

import pytest

from conftest import Qemu
from dissecting import module
from images import noise


@pytest.fixture(scope="module")
def upstream(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the installed version's source distribution, whose images are made here: it has none."""
    folder = tmp_path_factory.mktemp("upstream")
    wanted = f"dissect.hypervisor=={importlib.metadata.version('dissect.hypervisor')}"
    line = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", "dissect.hypervisor", "--retries", "0", "--timeout", "10"]
    done = subprocess.run([sys.executable, *line, "-d", str(folder), wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        assert re.search("No matching distribution|Connection|Temporary failure|timed out", done.stderr), done.stderr
        pytest.skip(f"pip cannot download the source distribution of {wanted}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11.2 does not have
        sdist.extractall(folder)
    (tests,) = folder.glob("*/tests")
    if not (tests / "disk" / "test_qcow2.py").exists():
        pytest.skip(f"the source distribution of {wanted} has no test_qcow2.py any more")
    images = tests / "_data" / "disk" / "qcow2"
    images.mkdir(parents=True)
    before, after = make_upstream_images(qemu, images)
    # The digests of the snapshots' bytes are the one thing in there that goes with the images, and not with how they are read.
    source = (tests / "disk" / "test_qcow2.py").read_text()
    snapshots = re.findall(r'snapshots\[(\d)\]\.open\(\).*\n.*stream\.read\((\d+)\).*"([0-9a-f]{40})"', source)
    assert len(snapshots) == len(re.findall("[0-9a-f]{40}", source)) == 2
    for number, nbytes, digest in snapshots:
        source = source.replace(digest, hashlib.sha1((before, after)[int(number)][: int(nbytes)]).hexdigest())
    (tests / "disk" / "test_qcow2.py").write_text(source)
    return tests.parent


def make_upstream_images(qemu: Qemu, folder: Path) -> tuple[bytes, bytes]:
    """What those tests expect to find; returns the first bytes of the two snapshots."""
    mib = 1 << 20
    before, after = noise(4 * mib, 1), noise(4 * mib, 2)
    chain = (
        {0: "Something here", 1: "Something here too", 2: "Something here three"},
        {0: "Nothing here", 3: "Something here four"},
        {1: "Nothing here two", 4: "Something here five"},
    )
    with chdir(folder):
        with open("raw", "wb") as file:
            for i in range(255):
                file.write(bytes([i]) * mib)
            file.truncate(512 * mib)
        for options in (
            "-c basic.qcow2",
            "-c -o compression_type=zstd basic-zstd.qcow2",
            "-o data_file=data-file.bin data-file.qcow2",
        ):
            *options_of, name = options.split()
            qemu.img("convert", "-f", "raw", "-O", "qcow2", *options_of, "raw", name)
        Path("raw").unlink()
        for number, words in zip((3, 2, 1), chain, strict=True):
            path = Path(f"backing-chain-{number}.qcow2")
            base = ["512M"] if number == 3 else ["-F", "qcow2", "-b", f"backing-chain-{number + 1}.qcow2"]
            qemu.img("create", "-q", "-f", "qcow2", path, *base)
            for at, word in words.items():
                Path("piece").write_bytes(word.encode().ljust(mib, b"\0"))
                qemu.io(path, f"write -s piece {at}M 1M")
        path = Path("snapshot.qcow2")
        qemu.img("create", "-q", "-f", "qcow2", path, "512M")
        for name, data in (("you can't see me", before), ("confused", after), ("", bytes(4 * mib))):
            Path("piece").write_bytes(data)
            qemu.io(path, "write -s piece 0 4M")
            if name:
                qemu.img("snapshot", "-c", name, path)
        Path("piece").unlink()
        for path in list(Path().iterdir()):
            with path.open("rb") as file, gzip.open(f"{path}.gz", "wb", 1) as packed:
                shutil.copyfileobj(file, packed, mib)
            path.unlink()
    return before, after


INSTALLS = "from fastqcow.integrations import dissect; dissect.install()"


@pytest.mark.parametrize("installs", ["", INSTALLS], ids=["dissect", "fastqcow"])
def test_tests_of_dissect(upstream: Path, installs: str) -> None:
    if not installs and not module.HAS_ZSTD:
        pytest.skip("dissect needs backports.zstd")
    (upstream / "whose.py").write_text(installs)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "whose", "-p", "no:cacheprovider", "tests/disk/test_qcow2.py"]
    done = subprocess.run(line, cwd=upstream, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^[5-9] passed", done.stdout.splitlines()[-1])
