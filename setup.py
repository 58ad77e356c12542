"""The extension modules; everything else about the package stands in pyproject.toml.

Each module is compiled together with the files of the C core that it uses, so a module is one file that can be loaded
anywhere. Libraries are found by pkg-config alone: it knows where a distribution, Homebrew or a wheel builder has put them.
"""

import os
import subprocess
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

PACKAGES = """\
  Debian, Ubuntu:  apt-get install gcc pkg-config zlib1g-dev libzstd-dev libdeflate-dev libisal-dev
  Fedora, RHEL:    dnf install gcc pkgconf zlib-devel libzstd-devel libdeflate-devel isa-l-devel
  Alpine:          apk add gcc musl-dev pkgconf zlib-dev zstd-dev libdeflate-dev isa-l-dev
  macOS:           brew install pkgconf zlib zstd libdeflate isa-l
"""


def pkg_config(*arguments: str) -> list[str] | None:
    """What pkg-config says, or None where it says that a library is not there."""
    try:
        done = subprocess.run([os.environ.get("PKG_CONFIG", "pkg-config"), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"fastqcow: pkg-config is needed to find the compression libraries, and is not installed. Install:\n{PACKAGES}")
    return done.stdout.split() if done.returncode == 0 else None


def libraries() -> list[str]:
    """The pkg-config names to build with. FASTQCOW_LIBDEFLATE=no leaves libdeflate out, =yes fails without it; so FASTQCOW_ISAL."""
    missing = [name for name in ("zlib", "libzstd") if pkg_config("--exists", name) is None]
    optional = []
    for variable, name in (("FASTQCOW_LIBDEFLATE", "libdeflate"), ("FASTQCOW_ISAL", "libisal")):
        wish = os.environ.get(variable, "auto")
        if wish not in ("auto", "yes", "no"):
            sys.exit(f"fastqcow: {variable} is {wish!r}; it can be auto, yes or no")
        if wish != "no" and pkg_config("--exists", name) is not None:
            optional.append(name)
        elif wish == "yes":
            missing.append(name)
    if missing:
        sys.exit(f"fastqcow: pkg-config does not find {' and '.join(missing)}. Install the headers:\n{PACKAGES}")
    return ["zlib", "libzstd", *optional]


def extensions() -> list[Extension]:
    names = libraries()
    include = [f[2:] for f in pkg_config("--cflags-only-I", *names) or []]
    link = pkg_config("--libs", *(n for n in names if n != "libisal")) or []
    flags = os.environ.get("CFLAGS", "").split()
    symbols = [] if any(f.startswith("-g") for f in flags) else ["-g0"]  # Python's own flags ask for them, at twice the size
    optimization = [] if any(f.startswith("-O") for f in flags) else ["-O2"]
    built_in = {"libdeflate": "FQ_HAVE_LIBDEFLATE", "libisal": "FQ_HAVE_ISAL"}
    macros: list[tuple[str, str | None]] = [(macro, "1") for name, macro in built_in.items() if name in names]
    writing = ["encode", "export", "space", "write"]
    reading = ["ahead", "batch", "cache", "crypt", "inflate", "l2", "pool", "pwrite", "reader", "scratch", "source", "status"]

    def extension(name: str, core: list[str], libraries: list[str] = link) -> Extension:
        return Extension(
            f"fastqcow.{name}",
            sources=[f"src/fastqcow/{name}.pyx", *(f"csrc/{c}.c" for c in core)],
            depends=["csrc/check.h", "csrc/fastqcow.h", "csrc/internal.h", "csrc/layout.h"],
            include_dirs=["csrc", *include],
            define_macros=macros,
            extra_compile_args=["-std=c11", "-pthread", *optimization, *symbols, "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=[*libraries, "-pthread"],
        )

    found = [
        extension("_l2", ["layout", "status"]),
        extension("_inflate", ["inflate", "scratch", "status"]),
        extension("_check", ["check", "refcounts", "source", "status"]),
        extension("_reader", [*reading, *writing]),
        extension("_write", []),  # what it calls is in _reader: the threads and caches of a process are there once
    ]
    if "libisal" in names:
        found.append(extension("_isal", ["isal"], pkg_config("--libs", "libisal") or []))
    return found


if __name__ == "__main__":
    setup(ext_modules=cythonize(extensions(), build_dir="build/cython", language_level=3))
