"""Programs that run while calls of libc fail: see shim.c. And what is left after them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from capabilities import need_glibc

HERE = Path(__file__).parent
UNDER_ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
UNDER_TSAN = "libtsan" in os.environ.get("LD_PRELOAD", "")


def run(script: str, *arguments: str | Path, folder: Path, preload: bool = True) -> str:
    """Run one of the programs beside this file, which has to end well; what it said."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    if preload:
        need_glibc()
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
        if not compiler:
            pytest.skip("a C compiler is needed")
        shim = folder / "shim.so"
        clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, HERE / "shim.c", "-ldl"], check=True, env=clean)
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(shim)]))
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def tell(injected: Counter[str]) -> None:
    """What a program prints at its end: how many faults of each class there were."""
    for what, count in sorted(injected.items()):
        print(f"{count:8} {what}")


def told(said: str) -> Counter[str]:
    """What `tell` has printed."""
    lines = (line.split(maxsplit=1) for line in said.splitlines())
    return Counter({what: int(count) for count, what in lines})


class Fault:
    """In a program that is run so: `with Fault("pwrite", 3, errno.ENOSPC, "out") as fault: ...`, and then fault.calls."""

    shim = ctypes.CDLL(None)

    def __init__(self, call: str, nth: int, error: int, where: str = "") -> None:
        self.armed = call.encode(), ctypes.c_long(nth), error, where.encode()
        self.nth = abs(nth)
        self.calls = 0

    def __enter__(self) -> Fault:
        self.shim.fault_arm(*self.armed)
        return self

    def __exit__(self, *_: object) -> None:
        self.calls = self.shim.fault_calls()

    @property
    def struck(self) -> bool:
        return self.calls >= self.nth


class Mallinfo2(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def allocated_by_c() -> int:
    """Bytes; 0 where libc cannot tell, or is not what allocates."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None or UNDER_ASAN or UNDER_TSAN:
        return 0
    mallinfo.restype = Mallinfo2
    found = mallinfo()
    return int(found.field_4 + found.field_7)  # hblkhd: mapped, and uordblks: the others
