"""Disks as arrays of Dask, in this process and in others."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from capabilities import descriptors
from fastqcow.chain import open_chain
from images import L1, PAYLOAD, build, compressed_entry, data_entry, deflate, noise, patched, snapshot_entry, text

dask: Any = pytest.importorskip("dask")
pytest.importorskip("dask.array")
numpy = pytest.importorskip("numpy")

from fastqcow.integrations import dask as integration  # noqa: E402
from fastqcow.integrations.dask import to_array  # noqa: E402

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
IMAGE = build(
    [compressed_entry(AT, len(deflate(TEXT)), 16), 0, data_entry(AT + CLUSTER)], deflate(TEXT).ljust(CLUSTER, b"\0") + PLAIN
)
CONTENTS = TEXT + bytes(CLUSTER) + PLAIN
PAGE = Path(__file__).parents[1] / "docs" / "integrations" / "dask.md"


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    integration._disks.clear()
    with dask.config.set(scheduler="threads", num_workers=2):
        yield
    integration._disks.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


def array_of(path: Path, *arguments: Any, **options: Any) -> Any:
    with fastqcow.open(path) as image:
        return to_array(image, *arguments, **options)


def computed(disk: Any) -> bytes:
    found: bytes = disk.compute().tobytes()
    return found


def test_array(path: Path) -> None:
    disk = array_of(path)
    assert (disk.shape, disk.dtype, disk.chunks) == ((3 * CLUSTER,), numpy.uint8, ((3 * CLUSTER,),))
    assert disk.compute().tobytes() == CONTENTS
    assert disk.sum().compute() == sum(CONTENTS)


@pytest.mark.parametrize("chunks", [1000, CLUSTER, "50kB", (3 * CLUSTER,), ((5, CLUSTER, 2 * CLUSTER - 5),), -1])
def test_chunks(path: Path, chunks: Any) -> None:
    disk = array_of(path, chunks)
    assert sum(disk.chunks[0]) == len(CONTENTS)
    assert b"".join(chunk.compute().tobytes() for chunk in disk.to_delayed()) == CONTENTS


SLICES = [
    slice(None),
    slice(100, 70_000),
    slice(-5, None),
    slice(None, None, 1000),
    slice(None, None, -1),
    slice(9, 2, -3),
    slice(9, 9),
]


@pytest.mark.parametrize("chunks", [CLUSTER, 10_000_000])
@pytest.mark.parametrize("span", SLICES, ids=str)
def test_slices(path: Path, span: slice, chunks: int) -> None:
    assert array_of(path, chunks)[span].compute().tobytes() == CONTENTS[span]
    assert array_of(path, chunks)[span][::2].compute().tobytes() == CONTENTS[span][::2]


def test_single_bytes_and_lists_of_them(path: Path) -> None:
    for chunks in (50_000, -1):
        disk = array_of(path, chunks)
        assert disk[0].compute() == CONTENTS[0]
        assert disk[-1].compute() == CONTENTS[-1]
        places = [5, 130_000, 7, 7, -1]
        assert disk[places].compute().tolist() == [CONTENTS[i] for i in places]
        mask = numpy.zeros(len(CONTENTS), bool)
        mask[[3, 70_000]] = True
        assert disk[mask].compute().tolist() == [CONTENTS[3], CONTENTS[70_000]]


def test_what_dask_takes_chunks_of_is_indexed_as_an_array(path: Path) -> None:
    with fastqcow.open(path) as image:
        reopen, arguments = image.__reduce__()
    disk, array = integration._Disk("x", reopen, arguments, image.size), numpy.frombuffer(CONTENTS, numpy.uint8)
    mask = numpy.arange(len(CONTENTS)) % 1000 == 7
    for index in (3, -3, numpy.int64(9), [1, -1, 5], [], numpy.array([70_000, 2]), mask, slice(5, 1, -2), slice(5, 5)):
        for each in (index, (index,)):
            expected = array[index]
            assert disk[each].tolist() == expected.tolist()
    for index in (len(CONTENTS), -len(CONTENTS) - 1, [0, len(CONTENTS)]):
        with pytest.raises(IndexError):
            disk[index]


def test_a_slice_is_all_that_is_read(path: Path) -> None:
    disk = array_of(path)
    assert disk[2 * CLUSTER + 10 : 2 * CLUSTER + 20].compute().tobytes() == PLAIN[10:20]
    (opened,) = integration._disks.values()
    assert isinstance(opened, fastqcow.Image)
    assert opened.stats()["bytes_returned"] == 10


def test_nothing_is_read_before_it_is_computed(path: Path) -> None:
    disk = array_of(path)
    assert not integration._disks
    path.unlink()
    with pytest.raises(FileNotFoundError):
        disk.compute()


def test_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    path.write_bytes(build([], size=0))
    assert array_of(path).compute().tobytes() == b""


def test_results_may_be_written_to(path: Path) -> None:
    found = array_of(path, CLUSTER).compute()
    found[:] = 1
    assert array_of(path, CLUSTER).compute().tobytes() == CONTENTS


def test_opened_once_for_all_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counting(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return open_chain(*arguments, **options)

    monkeypatch.setattr("fastqcow.image.open_chain", counting)
    disk = array_of(path, 1000)
    assert len(opened) == 1
    # Tasks come pickled, each for itself.
    tasks = [pickle.loads(pickle.dumps(chunk)) for chunk in disk.to_delayed()[:20]]
    assert b"".join(chunk.tobytes() for chunk in dask.compute(*tasks)) == CONTENTS[:20_000]
    assert disk.compute().tobytes() == CONTENTS
    assert len(opened) == 2


def test_disks_that_are_kept_are_few(path: Path) -> None:
    before = descriptors()
    disks = [array_of(path) for _ in range(7)]
    for disk in [*disks, *disks]:
        assert disk[:5].compute().tobytes() == CONTENTS[:5]
    assert descriptors() - before == len(integration._disks) == integration.KEPT


def test_another_array_opens_the_file_anew(path: Path) -> None:
    """It may be another file by then."""
    first = array_of(path)
    assert first.compute().tobytes() == CONTENTS
    path.unlink()
    path.write_bytes(build([data_entry(AT)], PLAIN))
    assert array_of(path).compute().tobytes() == PLAIN
    assert first.compute().tobytes() == CONTENTS


def test_threads(path: Path) -> None:
    for threads in (1, 3):
        array_of(path, threads=threads)[:1].compute()
        assert next(reversed(integration._disks.values()))._options.threads == threads  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="threads is 0"):
        array_of(path, threads=0)


def test_snapshot(tmp_path: Path) -> None:
    at = len(IMAGE) + -len(IMAGE) % CLUSTER
    entry = snapshot_entry(b"1", b"then", l1_off=L1 * CLUSTER, extra=struct.pack(">QQ", 0, 2048))
    (tmp_path / "disk.qcow2").write_bytes(patched(IMAGE.ljust(at, b"\0"), 60, struct.pack(">IQ", 1, at)) + entry)
    with fastqcow.open(tmp_path / "disk.qcow2") as image, image.snapshot("then") as snapshot:
        disk = to_array(snapshot, 700)
    assert computed(disk) == CONTENTS[:2048]


def test_raw_image(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(PLAIN)
    with fastqcow.open_raw(tmp_path / "disk.raw") as disk:
        assert computed(to_array(disk, 1000)) == PLAIN


def test_what_does_not_pickle(path: Path) -> None:
    with path.open("rb") as file, fastqcow.open(file) as image, pytest.raises(TypeError, match="does not pickle"):
        to_array(image)
    image.close()
    with pytest.raises(ValueError, match="closed"):
        to_array(image)


# Other processes


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of the page, as a program."""
    pytest.importorskip("distributed")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("page") / "scan.py"
    path.write_text(code)
    return path


def run(program: Path, *arguments: object) -> str:
    done = subprocess.run([sys.executable, program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example(scan: Path, demo_image: Path) -> None:
    """Two processes find what one finds without Dask."""
    with fastqcow.open(demo_image) as image:
        contents = image.read()
    needle = re.findall(rb"[a-z]{9}", contents)[-1]
    digests = [hashlib.sha256(contents[i : i + (16 << 20)]).digest() for i in range(0, len(contents), 16 << 20)]
    places = [found.start() for found in re.finditer(re.escape(needle), contents)]
    assert run(scan, demo_image, needle.decode()) == f"{hashlib.sha256(b''.join(digests)).hexdigest()} {places}\n"


def test_workers_open_an_image_once(scan: Path, path: Path) -> None:
    """And find what lies across the borders of chunks."""
    program = scan.with_name("count.py")
    program.write_text(
        """
import contextlib, json, os, sys
from distributed import Client, LocalCluster
from scan import scan
from fastqcow.integrations.dask import to_array
import fastqcow

def descriptors(path):
    wanted, found = os.stat(path), 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            found += os.path.samestat(os.fstat(int(name)), wanted)
    return found

if __name__ == "__main__":
    path, needle = sys.argv[1], bytes.fromhex(sys.argv[2])
    options = {"n_workers": 2, "threads_per_worker": 2, "processes": True, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        found = scan(path, needle, 1000)
        with fastqcow.open(path) as image:
            total = int(to_array(image, 1000).sum().compute())
        counts = client.run(descriptors, path)
        here = descriptors(path)
    print(json.dumps([*found, total, list(counts.values()), here]))
"""
    )
    needle = CONTENTS[990:1010]
    digest, places, total, counts, here = json.loads(run(program, path, needle.hex()))
    pieces = [hashlib.sha256(CONTENTS[i : i + 1000]).digest() for i in range(0, len(CONTENTS), 1000)]
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert places == [found.start() for found in re.finditer(re.escape(needle), CONTENTS)]
    assert 990 in places
    assert total == sum(CONTENTS)
    assert counts == [2, 2]  # one for each array, of 400 chunks and more
    assert here == 0
