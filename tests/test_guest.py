"""Virtual machines with disks over NBD: a Linux that boots with a compressed image served by `fastqcow serve`, below an overlay.

QEMU emulates the CPU, so this takes seconds, and runs wherever QEMU does. Kernel and busybox are those that script/guest fetches.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Qemu
from serving import need, served

BUILT = Path(__file__).parents[1] / "build" / "guest"
SECONDS = 300  # ten times what a slow machine takes
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")  # in this order
FOLDERS = ("bin", "dev", "modules", "proc", "disk")
START = """#!/bin/busybox sh
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in {modules}; do insmod "/modules/$module"; done
until [ -e /dev/vda ]; do sleep 0.1; done
{script}
poweroff -f
"""


class Guest(NamedTuple):
    kernel: Path
    busybox: Path
    modules: dict[str, Path]  # in the order that they are loaded in; none where the kernel has them built in


@pytest.fixture(scope="module")
def guest() -> Guest:
    need("qemu-img")
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("qemu-system-x86_64 is not installed")
    kernels = sorted(BUILT.glob("boot/vmlinuz-*"))
    if not kernels:
        pytest.skip("no kernel: script/guest fetches one")
    modules = {name: next(BUILT.rglob(f"{name}.ko*"), None) for name in MODULES}
    return Guest(kernels[-1], next(BUILT.rglob("bin/busybox")), {name: path for name, path in modules.items() if path})


def initramfs(guest: Guest, script: str) -> bytes:
    """The kernel's first file system, as a cpio archive in the format "newc": it loads the drivers and runs the script."""
    made = bytearray()

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        for part in (f"070701{''.join(f'{field:08x}' for field in fields)}{name}\0".encode(), data):
            made.extend(part)
            made.extend(bytes(-len(made) % 4))

    for folder in FOLDERS:
        add(folder, 0o040755)
    add("dev/console", 0o020600, device=(5, 1))
    add("bin/busybox", 0o100755, guest.busybox.read_bytes())
    for name, path in guest.modules.items():
        packed = path.read_bytes()
        add(f"modules/{name}", 0o100644, lzma.decompress(packed) if path.suffix == ".xz" else packed)
    add("init", 0o100755, START.format(modules=" ".join(guest.modules), script=script).encode())
    add("TRAILER!!!", 0)
    return bytes(made)


def boot(guest: Guest, qemu: Qemu, image: Path, script: str, tmp_path: Path) -> str:
    """What a machine says on its console until it is switched off. What it writes to its disk goes to an overlay of the image."""
    overlay, initrd = tmp_path / "overlay.qcow2", tmp_path / "initrd"
    initrd.write_bytes(initramfs(guest, script))
    machine = ["-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
    # no_timer_check: emulated timers are late on a busy machine.
    command_line = "console=ttyS0 panic=-1 quiet no_timer_check"
    kernel = ["-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", command_line]
    with served(tmp_path, image) as server:
        qemu.img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", server.uri, overlay)
        done = subprocess.run(
            ["qemu-system-x86_64", *machine, *kernel, "-drive", f"file={overlay},if=virtio,format=qcow2"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said + done.stderr.decode(errors="replace")
    return said


def test_a_guest_reads_its_disk_and_writes_to_it(guest: Guest, qemu: Qemu, demo_image: Path, tmp_path: Path) -> None:
    """The digest of the whole disk is right, and so is a copy of all files, read back from the disk."""
    script = """
        echo "digest $(sha256sum </dev/vda)"
        mount -t ext4 /dev/vda /disk
        cp -a /disk/usr /disk/copy
        umount /disk
        echo 3 >/proc/sys/vm/drop_caches
        mount -t ext4 /dev/vda /disk
        diff -r /disk/usr /disk/copy && echo "copied $(find /disk/copy -type f | wc -l) files"
        umount /disk
    """
    digest = demo_image.with_suffix(".sha256").read_text().split()[0]
    said = boot(guest, qemu, demo_image, script, tmp_path)
    assert f"digest {digest}" in said
    (count,) = re.findall(r"copied (\d+) files", said)
    assert int(count) > 500


def test_debian_boots(guest: Guest, qemu: Qemu, real_data: Path, tmp_path: Path) -> None:
    """Up to the line that the image's own last service prints; then it switches the machine off."""
    script = "mount -t ext4 /dev/vda /disk && exec switch_root /disk /sbin/init"
    said = boot(guest, qemu, real_data / "boot-zlib.qcow2", script, tmp_path)
    assert "BOOTDONE" in said
