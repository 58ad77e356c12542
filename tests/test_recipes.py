"""The programs in docs/cookbook.md and docs/integrations/dissect.md do what is said there: each is run, as it stands, where
disk.qcow2 lies."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MIB = 1 << 20


class Recipe(NamedTuple):
    page: str
    title: str
    program: str


def recipes(page: str) -> list[Recipe]:
    """The blocks of Python in a page, by the headings that they stand under."""
    found = []
    for section in (DOCS / page).read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        found += [Recipe(page, title, program) for program in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    return found


RECIPES = recipes("cookbook.md") + recipes("integrations/dissect.md")


class Disk(NamedTuple):
    data: bytes
    files: dict[str, bytes]
    folder: Path


def zero_sectors_and_values(disk: Disk) -> str:
    zeroes = sum(not any(disk.data[i : i + 512]) for i in range(0, MIB, 512))
    return (
        f"sectors of zeroes in the first MiB: {zeroes}\nbytes of each value: {len(disk.data)} in all, {disk.data.count(0)} zeroes\n"
    )


def crcs(disk: Disk) -> str:
    pieces = enumerate(range(0, len(disk.data), MIB))
    return "".join(f"{i:3} MiB {zlib.crc32(disk.data[off : off + MIB]):08x}\n" for i, off in pieces)


def long_words(disk: Disk) -> str:
    pieces = (disk.data[i : i + MIB] for i in range(0, len(disk.data), MIB))
    return f"{sum(len(re.findall(rb'[a-z]{8,}', piece)) for piece in pieces)}\n"


def digests(disk: Disk) -> str:
    return "".join(f"/{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in disk.files.items())


def copied(disk: Disk) -> str:
    assert (disk.folder / "copy.raw").read_bytes() == disk.data
    return ""


EXPECTED: dict[str, Callable[[Disk], str]] = {
    "The digest of a disk": lambda disk: hashlib.sha256(disk.data).hexdigest() + "\n",
    "A copy as a raw file": copied,
    "NumPy": zero_sectors_and_values,
    "Many threads on one image": crcs,
    "Many processes": long_words,
    "Files of an ext4 file system": digests,
    "Files by The Sleuth Kit": lambda disk: disk.files["etc/hostname"].decode() + "\n",
    "In a program": digests,
    "Without installing it": lambda disk: hashlib.sha256(disk.data).hexdigest() + "\n",
    "An image that is open": lambda disk: disk.files["etc/hostname"].decode() + "\n",
}


# What a program may need that is not here; what else it imports has to be.
OPTIONAL = ("dask", "dissect.extfs", "dissect.target", "distributed", "fsspec", "numpy", "pytsk3")


def test_every_program_is_tested() -> None:
    assert [recipe.title for recipe in RECIPES] == list(EXPECTED)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)
def test_recipe(recipe: Recipe, ext4_image: Path, ext4_files: dict[str, bytes], tmp_path: Path) -> None:
    for name in re.findall(r"^ *(?:import|from) ([\w.]+)", recipe.program, re.MULTILINE):
        package = name if name.startswith("dissect") else name.split(".")[0]
        if package in OPTIONAL and (not find_spec(package.split(".")[0]) or not find_spec(package)):
            pytest.skip(f"{package} is not installed")
    if "dissect" in recipe.page:
        pytest.importorskip("dissect.hypervisor")
    shutil.copy(ext4_image, tmp_path / "disk.qcow2")
    (tmp_path / "recipe.py").write_text(recipe.program)
    line = [sys.executable, "-W", "default::ResourceWarning", "recipe.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "dissect.target" in recipe.program  # which leaves files open
    disk = Disk(ext4_image.with_suffix(".raw").read_bytes(), ext4_files, tmp_path)
    assert sorted(done.stdout.splitlines()) == sorted(EXPECTED[recipe.title](disk).splitlines())
