"""What can be opened: paths and file objects of all kinds."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, noise, text

CLUSTER = 65536
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
STREAM = deflate(TEXT).ljust(CLUSTER, b"\0")
AT = PAYLOAD * CLUSTER
IMAGE = build([compressed_entry(AT, len(deflate(TEXT)), 16), 0, data_entry(AT + CLUSTER)], STREAM + PLAIN)
CONTENTS = TEXT + bytes(CLUSTER) + PLAIN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths(path: Path, kind: Any) -> None:
    with fastqcow.open(kind(path)) as image:
        assert image.read() == CONTENTS
        assert image.name == str(path)


@pytest.mark.parametrize("buffering", [-1, 0])
def test_open_file_is_read_by_its_descriptor_and_left_alone(path: Path, buffering: int) -> None:
    with path.open("rb", buffering=buffering) as file:
        file.seek(100)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS
            assert image.name == str(path)
        assert file.tell() == 100
        assert not file.closed


def test_image_outlives_the_file_it_was_opened_from(path: Path) -> None:
    file = path.open("rb")
    image = fastqcow.open(file)
    file.close()
    with path.open("rb"):  # takes the number of the descriptor that was closed
        assert image.read() == CONTENTS
    image.close()


def test_unflushed_writes_are_seen(tmp_path: Path) -> None:
    with (tmp_path / "new").open("w+b") as file:
        file.write(IMAGE)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS


def test_gzip_is_read_by_its_methods(path: Path) -> None:
    """A GzipFile has a fileno(), of the compressed bytes."""
    packed = path.with_suffix(".gz")
    with gzip.open(packed, "wb") as file:
        file.write(IMAGE)
    with gzip.open(packed) as file, fastqcow.open(file) as image:
        assert image.read() == CONTENTS
        assert image.name == str(packed)
    with gzip.open(packed) as file, fastqcow.open(io.BufferedReader(file)) as image:
        assert image.pread(CLUSTER, 2 * CLUSTER) == PLAIN


def test_other_files() -> None:
    with fastqcow.open(io.BytesIO(IMAGE)) as image:
        assert image.name == "<BytesIO>"
        assert image.read() == CONTENTS
    with tempfile.TemporaryFile() as file:
        file.write(IMAGE)
        with fastqcow.open(file) as image:
            assert image.read() == CONTENTS
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(IMAGE)
        with fastqcow.open(spooled) as image:
            assert image.read() == CONTENTS


def test_image_in_an_image() -> None:
    outer = build([data_entry((PAYLOAD + i) * CLUSTER) for i in range(len(IMAGE) // CLUSTER)], IMAGE)
    with fastqcow.open(io.BytesIO(outer)) as disk, fastqcow.open(disk) as inner:
        assert inner.read() == CONTENTS


class Odd(io.BytesIO):
    """A file whose reads go wrong from a certain place on."""

    def __init__(self, answer: Any, after: int = AT) -> None:
        super().__init__(IMAGE)
        self.answer, self.after = answer, after

    def read(self, size: int | None = -1, /) -> Any:
        if self.tell() < self.after:
            return super().read(size)
        return self.answer(super().read(size))


def test_short_reads_are_carried_on() -> None:
    with fastqcow.open(Odd(lambda data: data[:1000], after=0)) as image:
        assert image.read() == CONTENTS


class BrokenError(RuntimeError):
    pass


def fail(data: bytes) -> bytes:
    raise BrokenError("the cable is out")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (fail, BrokenError),
        (lambda data: data + b"x", ValueError),
        (lambda data: None, TypeError),
        (lambda data: bytearray(data), TypeError),
        (lambda data: "text", TypeError),
    ],
    ids=["raises", "too much", "None", "bytearray", "str"],
)
@pytest.mark.parametrize("nbytes", [3 * CLUSTER, 100], ids=["whole", "part"])
def test_what_a_file_raises_comes_out(answer: Any, error: type[Exception], nbytes: int) -> None:
    with fastqcow.open(Odd(answer)) as image:
        for _ in range(3):
            with pytest.raises(error):
                image.pread(nbytes, 0)
        assert image.pread(CLUSTER, CLUSTER) == bytes(CLUSTER)


def test_file_that_fails_at_once() -> None:
    with pytest.raises(BrokenError):
        fastqcow.open(Odd(fail, after=0))


def test_too_little_at_the_end_is_a_truncated_file() -> None:
    with fastqcow.open(Odd(lambda data: b"")) as image, pytest.raises(fastqcow.FormatError, match="beyond the end"):
        image.read()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fastqcow.open(tmp_path / "none.qcow2")
    assert caught.value.filename == str(tmp_path / "none.qcow2")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        fastqcow.open(tmp_path)


def test_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "fifo").open("r+b", buffering=0), pytest.raises(OSError, match="Not a regular file"):
        fastqcow.open(tmp_path / "fifo")


@pytest.mark.parametrize("thing", [None, 3, [1], io.StringIO("text")], ids=repr)
def test_what_is_no_file(thing: Any) -> None:
    with pytest.raises(TypeError):
        fastqcow.open(thing)


def test_file_that_is_not_for_reading(tmp_path: Path) -> None:
    with (tmp_path / "new").open("wb") as file, pytest.raises(OSError, match="not open for reading"):
        fastqcow.open(file)


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        fastqcow.open(path).close()
        with pytest.raises(fastqcow.FormatError):
            fastqcow.open(__file__)
        with pytest.raises(IsADirectoryError):
            fastqcow.open(path.parent)
    fastqcow.open(path)  # never closed, but nobody has it any more
    assert len(os.listdir("/dev/fd")) == before
