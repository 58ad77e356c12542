"""What tests need that not every system has, be it macOS or a Linux with musl: they are skipped where it is not."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest


def need_full_device() -> str:
    """The device that never has room, as Linux has it."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    return "/dev/full"


def need_proc() -> None:
    """For the memory of processes, as /proc/PID/status and statm tell it."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say in /proc how much memory a process has")


def need_glibc() -> None:
    """For programs that get between it and its callers, or that know its inside."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this system's C library is not glibc")


def need_holes(folder: Path) -> None:
    """For files in this folder of which the system tells where data is, to the block, and which take no room where it is not."""
    probe = folder / "holes"
    with probe.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(700 << 20)
        file.write(bytes([1] * 65536))
    try:
        with probe.open("rb") as file:
            told = hasattr(os, "SEEK_DATA") and os.lseek(file.fileno(), 0, os.SEEK_DATA) == 700 << 20
            taken = os.fstat(file.fileno()).st_blocks * 512
    finally:
        probe.unlink()
    if not told or taken > 1 << 20:
        pytest.skip("the file system has no holes, or does not tell of them")


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/dev/fd"))


def resident() -> int:
    """Bytes of memory that this process has, where need_proc finds it told."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
