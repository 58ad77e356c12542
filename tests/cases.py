"""What an image is to QEMU and to fastqcow: the same bytes and the same verdict, or a reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.cli import main

TRUNCATED = "the file was cut; QEMU takes what is lost for zeroes"


class Place(NamedTuple):
    """Where an error is, as it says itself."""

    guest_off: int | None  # None: the image cannot be opened
    host_off: int | None
    value: int | None


@dataclass(frozen=True)
class Case:
    image: bytes
    expected: bytes | None  # None: an error
    differs: str = ""  # why that is not what QEMU does
    place: Place | None = None  # of the error; where it is not given, it is known to be at guest offset 0
    says: str = ""  # a part of the error's words


def check(qemu: Qemu, tmp_path: Path, case: Case, engine: str | None = None) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(case.image)
    check_verdict(case, qemu.read(path))
    if case.place and case.place.guest_off is None:
        with raises(case, path):
            fastqcow.open(path)
        return
    with fastqcow.open(path, engine=engine) as image:  # type: ignore[arg-type]
        if case.expected is not None:
            assert image.read() == case.expected
            # The part of a cluster goes by another way than the whole.
            assert b"".join(image.pread(1000, o) for o in range(0, image.size, 1000)) == case.expected
            return
        with raises(case, path):
            image.read()
        with raises(case, path):
            image.pread(1, 0)
        with raises(case, path):
            fastqcow.convert(image, tmp_path / "out.raw")
        assert not (tmp_path / "out.raw").exists()


def check_verdict(case: Case, verdict: bytes | None) -> None:
    if case.differs:
        assert verdict != case.expected, "QEMU does the same: the case needs no reason any more"
    else:
        assert verdict == case.expected, "the case does not say what QEMU does"


@contextmanager
def raises(case: Case, path: Path) -> Iterator[None]:
    """An error that says where it is, in its attributes and in words."""
    with pytest.raises(fastqcow.Error) as caught:
        yield
    error = caught.value
    assert error.path == str(path)
    assert str(error).startswith(f"{path}: ")
    assert case.says in str(error)
    if case.place:
        assert Place(error.guest_off, error.host_off, error.value) == case.place
    else:
        assert error.guest_off == 0
    places = (("guest offset", error.guest_off), ("host offset", error.host_off), ("value", error.value))
    for name, number in places:
        assert number is None or f"{name} {number:#x}" in str(error)


def check_map(qemu: Qemu, path: Path, *options: str, differs: str = "") -> None:
    """The map is qemu-img's, field for field, or both fail.

    Newer versions of qemu-img list `compressed`: it is compared where this one does. A disk without bytes has no extents here, and
    one without bytes there.
    """
    theirs, ours = qemu_json(qemu, "map", *options, path), our_json("map", *options, path)
    if theirs is not None:
        theirs = as_in_the_tables([extent for extent in theirs if extent["length"]])
        if ours is not None and theirs and "compressed" not in theirs[0]:
            for extent in ours:
                del extent["compressed"]
    compare(ours, theirs, differs)


def as_in_the_tables(theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """qemu-img's extents without what it adds where it takes an image for preallocated: then it looks for holes in the file, and
    says of the data in them that it is zeroes too."""
    found: list[dict[str, Any]] = []
    for extent in theirs:
        same = extent | {"zero": extent["zero"] and not extent["data"]}
        if found and same.get("offset") == found[-1].get("offset", -1) + found[-1]["length"]:
            joined = same | {key: found[-1][key] for key in ("start", "offset")} | {"length": found[-1]["length"]}
            if joined == found[-1]:
                found[-1]["length"] += same["length"]
                continue
        found.append(same)
    return found


def words(said: str) -> list[list[str]]:
    """What qemu-img says to people, line by line, without what only newer versions say, and how they set it."""
    said = said.split("Child node")[0].replace("VM_SIZE", "VM SIZE").replace("VM_CLOCK", "VM CLOCK")
    said = re.sub(r"\b0*(\d+:\d\d:\d\d\.\d)", r"\1", said)  # hours
    return [line.split() for line in said.splitlines() if line.strip() != "detached header: false"]


def check_info(qemu: Qemu, path: Path, *, differs: str = "") -> None:
    """What is said of the image is what qemu-img says, field for field. What is refused there is refused here, or said to be
    unreadable.

    Newer versions of qemu-img list `children`; ours lists fields that older ones do not have.
    """
    theirs, ours = qemu_json(qemu, "info", path), our_json("info", path)
    if theirs is None:
        ours = None if ours and "unreadable" in ours else ours
    else:
        theirs.pop("children", None)
        ours = ours and {key: value for key, value in ours.items() if key in theirs}
    compare(ours, theirs, differs)


def check_check(qemu: Qemu, path: Path, *, differs: str = "") -> None:
    """What a check counts is what qemu-img counts, field for field, and the exit codes are the same.

    `overlaps` is a field that qemu-img does not have.
    """
    theirs = qemu.img("check", "-f", "qcow2", "--output=json", path, check=False)
    code, out, _ = run("check", path)
    ours = json.loads(out) if out else None
    if ours:
        ours.pop("overlaps", None)
    compare((code, ours), (theirs.returncode, json.loads(theirs.stdout) if theirs.stdout else None), differs)


def check_commands(qemu: Qemu, path: Path) -> None:
    check_map(qemu, path)
    check_info(qemu, path)
    check_check(qemu, path)


def compare(ours: Any, theirs: Any, differs: str) -> None:
    if differs:
        assert ours != theirs, "QEMU says the same: the case needs no reason any more"
    else:
        assert ours == theirs


def qemu_json(qemu: Qemu, command: str, *arguments: str | Path) -> Any:
    """What qemu-img prints, or None where it fails."""
    done = qemu.img(command, "-f", "qcow2", "--output=json", *arguments, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def our_json(command: str, *arguments: str | Path) -> Any:
    code, out, err = run(command, *arguments)
    assert code == 0 or err.startswith("fastqcow: ")
    return json.loads(out) if code == 0 else None


def run(command: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of one of our commands."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([command, "--output=json", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()
