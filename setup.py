"""The extension modules; everything else about the package stands in pyproject.toml.

Each module is compiled together with the files of the C core that it uses, so a module is one file that can be loaded
anywhere. Libraries are found by pkg-config alone: it knows where a distribution, Homebrew or a wheel builder has put them.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

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


def accepts(*flags: str) -> bool:
    """Whether the compiler and its linker make a module with these flags, and have nothing to say against them."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <string.h>\nint probe(char *to, const char *from);\n")
        with source.open("a") as f:
            f.write("int probe(char *to, const char *from) { strcpy(to, from); return 0; }\n")
        command = [*compiler, "-shared", "-fPIC", "-O2", "-Werror", *flags, "probe.c", "-o", "probe.so"]
        try:
            return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


def hardening(given: list[str]) -> tuple[list[str], list[str]]:
    """What makes it harder to make use of an error in the core: flags for the compiler and for the linker, those that they know.

    given: flags of the one who builds, who may have a say on _FORTIFY_SOURCE. It needs optimization, and takes calls away from
    sanitizers that they want to see.
    """
    flow = {"x86_64": "-fcf-protection=full", "aarch64": "-mbranch-protection=standard", "arm64": "-mbranch-protection=standard"}
    wanted = ["-fstack-protector-strong", "-fstack-clash-protection", *filter(None, [flow.get(platform.machine())])]
    compiling = [flag for flag in wanted if accepts(flag)]
    if not any("FORTIFY_SOURCE" in flag or flag == "-O0" or flag.startswith("-fsanitize") for flag in given):
        fortified = (["-U_FORTIFY_SOURCE", f"-D_FORTIFY_SOURCE={level}"] for level in (3, 2))
        compiling += next((flags for flags in fortified if accepts(*flags)), [])
    # Start files of some systems are without the mark that says so, and would take it from the module. They do nothing against it.
    shadow_stack = ["-Wl,-z,shstk"] if "-fcf-protection=full" in compiling else []
    linking = [flag for flag in ("-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", *shadow_stack) if accepts(flag)]
    return compiling, linking


def extensions() -> list[Extension]:
    names = libraries()
    include = [f[2:] for f in pkg_config("--cflags-only-I", *names) or []]
    link = pkg_config("--libs", *(n for n in names if n != "libisal")) or []
    flags = os.environ.get("CFLAGS", "").split()
    symbols = [] if any(f.startswith("-g") for f in flags) else ["-g0"]  # Python's own flags ask for them, at twice the size
    optimization = [] if any(f.startswith("-O") for f in flags) else ["-O2"]
    hardened, hardened_linking = hardening(flags)
    built_in = {"libdeflate": "FQ_HAVE_LIBDEFLATE", "libisal": "FQ_HAVE_ISAL"}
    macros: list[tuple[str, str | None]] = [(macro, "1") for name, macro in built_in.items() if name in names]
    writing = ["digest", "encode", "export", "space", "write"]
    reading = ["ahead", "batch", "cache", "codes", "crypt", "deflate", "inflate", "l2", "reader", "remote"]
    shared = ["pool", "pwrite", "scratch", "source", "status"]

    def extension(name: str, core: list[str], libraries: list[str] = link) -> Extension:
        return Extension(
            f"fastqcow.{name}",
            sources=[f"src/fastqcow/{name}.pyx", *(f"csrc/{c}.c" for c in core)],
            depends=["csrc/check.h", "csrc/deflate.h", "csrc/fastqcow.h", "csrc/internal.h", "csrc/layout.h"],
            include_dirs=["csrc", *include],
            define_macros=macros,
            extra_compile_args=[
                "-std=c11",
                "-pthread",
                *optimization,
                *symbols,
                *hardened,
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=[*libraries, "-pthread", *hardened_linking],
        )

    found = [
        extension("_l2", ["layout", "status"]),
        extension("_inflate", ["codes", "deflate", "inflate", "scratch", "status"]),
        extension("_check", ["check", "refcounts", "source", "status"]),
        extension("_reader", [*reading, *writing, *shared]),
        extension("_write", []),  # what it calls is in _reader: the threads and caches of a process are there once
    ]
    if "libisal" in names:
        found.append(extension("_isal", ["isal"], pkg_config("--libs", "libisal") or []))
    return found


if __name__ == "__main__":
    setup(ext_modules=cythonize(extensions(), build_dir="build/cython", language_level=3))
