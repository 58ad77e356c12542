"""Counts the instructions of fastqcow's own modules in a few fixed workloads, under valgrind's callgrind.

    python benchmarks/instructions.py             counts, and compares with the figures in instructions.json
    python benchmarks/instructions.py --update    writes them anew

A machine that is busy with other things does not change these counts, so a slowdown of a few per cent is seen where no clock would
show it. What is counted is what our modules do themselves, on one thread: not the codecs, nor libc's memcpy, nor Python. Compilers
differ, so figures are only compared with those that were counted with the same one and the same flags, of which instructions.json
has several sets; with others the counts are printed, and that is all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

FIGURES = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.03
COUNTS_AT_A_TIME = 2
CLUSTER = 65536
CLUSTERS = 512


def disk(folder: Path, kind: str, cluster_bits: int = 16, clusters: int = CLUSTERS) -> Path:
    """An image with one L2 table of one kind of clusters: compressed, plain, or the two in turn with zeroes and nothing."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from images import PAYLOAD, ZERO, build, compressed_entry, data_entry, text

    size = 1 << cluster_bits
    encoder = zlib.compressobj(6, zlib.DEFLATED, -12)
    data = text(min(size, 4096)).ljust(size, b"\0")
    stream = encoder.compress(data) + encoder.flush()
    step = len(stream) + 8
    at = PAYLOAD * size
    plain_at = -(-(at + clusters * step) // size) * size
    compressed = [compressed_entry(at + i * step, len(stream), cluster_bits) for i in range(clusters)]
    plain = [data_entry(plain_at + i * size) for i in range(clusters)]
    entries = {
        "compressed": compressed,
        "plain": plain,
        "mixed": [(compressed, plain, [ZERO] * clusters, [0] * clusters)[i % 4][i] for i in range(clusters)],
    }[kind]
    payload = (stream + bytes(8)) * clusters
    if kind != "compressed":
        payload = payload.ljust(plain_at - at, b"\0") + data * clusters
    path = folder / "disk.qcow2"
    path.write_bytes(build(entries, payload, cluster_bits=cluster_bits))
    return path


def opening(folder: Path) -> None:
    import fastqcow

    path = disk(folder, "compressed")
    for _ in range(200):
        fastqcow.open(path, threads=1).close()


def cached_reads(folder: Path) -> None:
    import fastqcow

    with fastqcow.open(disk(folder, "compressed"), threads=1) as image:
        for i in range(20_000):
            image.pread(4096, i % 64 * CLUSTER)


def first_reads(folder: Path) -> None:
    import fastqcow

    with fastqcow.open(disk(folder, "compressed"), threads=1, cache_size=8 << 20) as image:
        for i in range(8 * CLUSTERS):
            image.pread(4096, i * 37 % CLUSTERS * CLUSTER)


def whole_clusters(folder: Path) -> None:
    import fastqcow

    with fastqcow.open(disk(folder, "compressed"), threads=1) as image:
        buffer = bytearray(4 << 20)
        for i in range(64):
            image.preadv([buffer], i % 8 * len(buffer))


def small_clusters(folder: Path) -> None:
    import fastqcow

    with fastqcow.open(disk(folder, "compressed", 9, 64), threads=1) as image:
        for _ in range(400):
            image.pread(64 * 512, 0)


def mapping(folder: Path) -> None:
    import fastqcow

    with fastqcow.open(disk(folder, "mixed"), threads=1) as image:
        for _ in range(50):
            list(image.map())


def conversion(folder: Path) -> None:
    import fastqcow

    for _ in range(4):
        fastqcow.convert(disk(folder, "mixed"), folder / "disk.raw", threads=1)


def checking(folder: Path) -> None:
    import fastqcow

    path = disk(folder, "mixed")
    for _ in range(20):
        fastqcow.check(path)


WORKLOADS: dict[str, Callable[[Path], None]] = {
    "open and close": opening,
    "4 KiB, cached": cached_reads,
    "4 KiB, first time": first_reads,
    "4 MiB": whole_clusters,
    "32 KiB in clusters of 512 bytes": small_clusters,
    "map": mapping,
    "convert": conversion,
    "check": checking,
}


def costs(profile: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Of a callgrind file: the objects, and what they themselves cost, piece by piece."""
    names: dict[str, str] = {}
    current = ""
    of_a_call = False
    for line in profile:
        if found := re.match(r"ob=\((\d+)\)(?: (.*))?", line):
            if found[2]:
                names[found[1]] = found[2]
            current = names[found[1]]
        elif found := re.match(r"cob=\((\d+)\) (.*)", line):
            names[found[1]] = found[2]
        elif line.startswith("calls="):
            of_a_call = True  # the next line is what was called, which counts there
        elif line[:1] in "0123456789+-*" and line.strip():
            if not of_a_call:
                yield current, int(line.split()[1])
            of_a_call = False


def count(name: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        command = ["valgrind", "--tool=callgrind", "--quiet", f"--callgrind-out-file={profile}", "--compress-pos=no"]
        done = subprocess.run(
            [*command, sys.executable, "-X", "faulthandler", __file__, "--run", name, folder],
            env={"PYTHONHASHSEED": "0", "PYTHONPATH": ":".join(p for p in sys.path if p), "PYTHONMALLOC": "malloc"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stdout}")
        with open(profile) as lines:
            return sum(cost for where, cost in costs(lines) if re.search(r"/fastqcow/_\w+\..*so$", where))


def counted_with() -> dict[str, str]:
    """What the counts depend on besides the source."""
    flags = sysconfig.get_config_var("CFLAGS") or ""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return {
        "compiler": said[0] if said else "unknown",
        "flags": " ".join(f for f in [*flags.split(), *os.environ.get("CFLAGS", "").split()] if f.startswith(("-O", "-f", "-m"))),
        "cython": metadata.version("Cython"),
        "machine": platform.machine(),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Count instructions in fixed workloads.")
    parser.add_argument("--update", action="store_true", help=f"write {FIGURES.name} anew")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        WORKLOADS[arguments.run[0]](Path(arguments.run[1]))
        return 0
    if not shutil.which("valgrind"):
        print("instructions: not counted: valgrind is not installed")
        return 0
    with ThreadPoolExecutor(COUNTS_AT_A_TIME) as pool:
        found = dict(zip(WORKLOADS, pool.map(count, WORKLOADS), strict=True))
    counted, sets = counted_with(), json.loads(FIGURES.read_text())
    if arguments.update:
        others = [each for each in sets if each["counted with"] != counted]
        sets = [*others, {"counted with": counted, "instructions": found}]
        FIGURES.write_text(json.dumps(sets, indent=4) + "\n")
    committed: dict[str, int] = next((each["instructions"] for each in sets if each["counted with"] == counted), {})
    worse = []
    for name, instructions in found.items():
        ratio = instructions / committed.get(name, instructions)
        compared = f"  {ratio:6.3f} of the committed figure" if name in committed else ""
        print(f"instructions: {name:<34} {instructions:>14,}{compared}")
        if abs(ratio - 1) > TOLERANCE:
            worse.append(name)
    if not committed:
        print(f"instructions: not compared: no figures were counted with {counted}")
    elif worse:
        print(f"instructions: more than {TOLERANCE:.0%} off: {', '.join(worse)}. If that is meant: {__file__} --update")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
