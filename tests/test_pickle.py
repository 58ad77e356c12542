"""Images go to other processes: as how they were opened."""

from __future__ import annotations

import copy
import functools
import gzip
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from conftest import Qemu
from fastqcow.diskfile import DiskFile
from images import PAYLOAD, build, compressed_entry, data_entry, deflate, noise, patched, text

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
IMAGE = build([compressed_entry(AT, len(deflate(TEXT)), 16), data_entry(AT + CLUSTER)], deflate(TEXT).ljust(CLUSTER, b"\0") + PLAIN)
CONTENTS = TEXT + PLAIN
PASSWORD = "pass phrase of a test"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


def again(disk: DiskFile) -> Any:
    return pickle.loads(pickle.dumps(disk))


def test_image(path: Path) -> None:
    with fastqcow.open(path) as image:
        image.seek(1000)
        pickled = pickle.dumps(image)
        image.close()
        assert len(pickled) < 1000
        with pickle.loads(pickled) as other:
            assert type(other) is fastqcow.Image
            assert other.tell() == 0
            assert other.read() == CONTENTS
            assert other.name == str(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(path: Path, protocol: int) -> None:
    with fastqcow.open(path) as image, pickle.loads(pickle.dumps(image, protocol)) as other:
        assert other.pread(100, CLUSTER) == PLAIN[:100]


def test_what_was_unpickled_pickles(path: Path) -> None:
    with fastqcow.open(path) as image, again(image) as second, again(second) as third, copy.copy(third) as fourth:
        assert fourth.read() == CONTENTS


def test_options_come_along(path: Path) -> None:
    with fastqcow.open(path, threads=3, cache_size=12345, engine="libz") as image, again(image) as other:
        assert (other._options.threads, other._options.cache_size, other._options.engine) == (3, 12345, "libz")


def test_number_of_threads_is_that_of_the_machine_it_comes_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastqcow.open(path) as image:
        monkeypatch.setattr("fastqcow.chain.available_cpus", lambda: 7)
        with again(image) as other:
            assert other._options.threads == 7


def test_relative_paths_mean_the_same_in_another_directory(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, base = tmp_path / "overlay.qcow2", tmp_path / "base.qcow2"
    overlay.write_bytes(build([0, 0], backing=("elsewhere", "qcow2")))
    base.write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)
    with fastqcow.open("overlay.qcow2", backing="base.qcow2") as image, fastqcow.open(b"disk.qcow2") as plain:
        monkeypatch.chdir("/")
        with again(image) as other:
            assert other.read() == CONTENTS
            assert other.name == str(overlay)
        with again(plain) as other:
            assert other.read() == CONTENTS


def choose(name: str, fmt: str | None, path: str) -> str:
    """A gate, and as a function of a module one that pickles."""
    return os.path.join(os.path.dirname(path), "base.qcow2")


@pytest.mark.parametrize("rule", [False, "follow", choose, None], ids=["False", "follow", "gate", "None"])
def test_rules_come_along(path: Path, tmp_path: Path, rule: Any) -> None:
    (tmp_path / "base.qcow2").write_bytes(IMAGE)
    overlay = tmp_path / "sub" / "overlay.qcow2"
    overlay.parent.mkdir()
    overlay.write_bytes(build([0, 0], backing=("../base.qcow2", "qcow2")))
    if rule is choose:
        (tmp_path / "base.qcow2").rename(overlay.parent / "base.qcow2")
    if rule is None:
        overlay.rename(tmp_path / "overlay.qcow2")
        overlay = tmp_path / "overlay.qcow2"
        overlay.write_bytes(build([0, 0], backing=("base.qcow2", "qcow2")))
    with fastqcow.open(overlay, backing=rule) as image, again(image) as other:
        assert other.read() == (bytes(2 * CLUSTER) if rule is False else CONTENTS)


def test_policy_holds_where_it_is_unpickled(path: Path, tmp_path: Path) -> None:
    """What the image names is judged again: it may be another by then."""
    with fastqcow.open(path) as image:
        pickled = pickle.dumps(image)
    path.write_bytes(build([0], backing=("../../etc/passwd", "raw")))
    with pytest.raises(fastqcow.PolicyError):
        pickle.loads(pickled)


def test_file_objects_pickle_as_they_do() -> None:
    with fastqcow.open(io.BytesIO(IMAGE)) as image, again(image) as other:
        assert other.read() == CONTENTS


def unpicklable_files(path: Path) -> Iterator[Any]:
    yield path.open("rb")
    yield path.open("rb", buffering=0)
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(IMAGE))
    yield gzip.open(packed)  # noqa: SIM115 - the caller closes it
    temporary = tempfile.NamedTemporaryFile()  # noqa: SIM115
    temporary.write(IMAGE)
    temporary.flush()
    yield temporary


def test_file_objects_that_do_not_pickle(path: Path) -> None:
    kinds = set()
    for file in unpicklable_files(path):
        with file, fastqcow.open(file) as image:
            kinds.add(type(file))
            with pytest.raises(TypeError, match=r"file object that does not pickle \(.*; open it by its path"):
                pickle.dumps(image)
            assert image.read() == CONTENTS
    assert len(kinds) == 4


def test_backing_file_object_that_does_not_pickle(path: Path) -> None:
    overlay = io.BytesIO(build([0, 0], backing=("base", "qcow2")))
    with path.open("rb") as base, fastqcow.open(overlay, backing=base) as image:
        assert image.read() == CONTENTS
        with pytest.raises(TypeError, match="file object that does not pickle"):
            pickle.dumps(image)


def test_closed_image(path: Path) -> None:
    image = fastqcow.open(path)
    image.close()
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(image)


def test_unpickling_raises_what_opening_does(path: Path) -> None:
    with fastqcow.open(path) as image:
        pickled = pickle.dumps(image)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)
    path.write_bytes(b"no image")
    with pytest.raises(fastqcow.FormatError):
        pickle.loads(pickled)


def test_warning_comes_again(path: Path) -> None:
    path.write_bytes(patched(IMAGE, 79, b"\2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastqcow.CorruptWarning)
        image = fastqcow.open(path)
    with image, pytest.warns(fastqcow.CorruptWarning):
        again(image).close()


def test_raw_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 700)
    with fastqcow.open_raw(path, whole_sectors=True) as disk, again(disk) as other:
        assert other.read() == b"x" * 700 + bytes(324)


def test_reopened_image_pickles(path: Path) -> None:
    with fastqcow.open(path) as image, image.reopened() as reopened, again(reopened) as other:
        assert other.read() == CONTENTS


@pytest.fixture
def with_snapshots(qemu: Qemu, tmp_path: Path) -> Path:
    path = tmp_path / "snapshots.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    for i, name in enumerate(("first", "second"), 1):
        qemu.io(path, f"write -P {i} 0 64k")
        qemu.img("snapshot", "-c", name, path)
    qemu.io(path, "write -P 9 0 64k")
    return path


def test_snapshot(with_snapshots: Path) -> None:
    with fastqcow.open(with_snapshots, cache_size=54321) as image, image.snapshot("second") as snapshot:
        with again(snapshot) as other:
            assert type(other) is fastqcow.Snapshot
            assert other.entry == snapshot.entry
            assert other.pread(2, 0) == b"\2\2"
            assert other._options.cache_size == 54321
        with snapshot.reopened() as reopened, again(reopened) as other:
            assert other.pread(2, 0) == b"\2\2"


def test_snapshot_that_is_gone(qemu: Qemu, with_snapshots: Path) -> None:
    with fastqcow.open(with_snapshots) as image, image.snapshot("second") as snapshot:
        pickled = pickle.dumps(snapshot)
    qemu.img("snapshot", "-d", "first", with_snapshots)
    with pickle.loads(pickled) as other:  # the table has moved up, and the snapshot is the same one
        assert other.pread(2, 0) == b"\2\2"
    qemu.img("snapshot", "-d", "second", with_snapshots)
    qemu.img("snapshot", "-c", "second", with_snapshots)
    with pytest.raises(KeyError, match=r"the snapshot 'second' .* is not there any more"):
        pickle.loads(pickled)


def test_closed_snapshot(with_snapshots: Path) -> None:
    with fastqcow.open(with_snapshots) as image:
        snapshot = image.snapshot("first")
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(snapshot)


def test_vm_state(with_snapshots: Path) -> None:
    with (
        fastqcow.open(with_snapshots) as image,
        image.snapshot("first") as snapshot,
        snapshot.vm_state as state,
        again(state) as other,
    ):
        assert other.size == state.size == snapshot.entry.vm_state_size
        assert other.read() == state.read()


def ask(path: str, *, answer: str = PASSWORD) -> str:
    return answer


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """By the legacy encryption: any password opens it, and another one shows other bytes."""
    pytest.importorskip("cryptography")
    path = tmp_path / "aes.qcow2"
    path.write_bytes(patched(build([data_entry(AT)], PLAIN), 32, (1).to_bytes(4, "big")))
    return path


@pytest.mark.parametrize("function", [ask, functools.partial(ask, answer="another")], ids=["function", "partial"])
def test_password_function_is_called_again(encrypted: Path, function: Callable[[str], str]) -> None:
    with fastqcow.open(encrypted, password=function) as image, again(image) as other:
        assert PASSWORD.encode() not in pickle.dumps(image)
        assert other.read() == image.read()
        with fastqcow.open(encrypted, password="not this one") as third:
            assert third.read() != image.read()


@pytest.mark.parametrize("password", [PASSWORD, PASSWORD.encode()], ids=["str", "bytes"])
def test_no_pickle_holds_a_password(encrypted: Path, password: str | bytes) -> None:
    with fastqcow.open(encrypted, password=password) as image:
        with pytest.raises(TypeError, match="password=FUNCTION") as caught:
            pickle.dumps(image)
        assert PASSWORD not in str(caught.value)
        with image.reopened() as reopened, pytest.raises(TypeError, match="password=FUNCTION"):
            pickle.dumps(reopened)
        assert PASSWORD not in repr(image._origin)


def test_backing_file_with_a_password(encrypted: Path) -> None:
    overlay = encrypted.with_name("overlay.qcow2")
    overlay.write_bytes(build([0], backing=(encrypted.name, "qcow2")))
    with fastqcow.open(overlay, password=PASSWORD) as image, pytest.raises(TypeError, match="password=FUNCTION"):
        pickle.dumps(image)
    with fastqcow.open(overlay, password=ask) as image, again(image) as other:
        assert other.read() == image.read()


def test_password_that_was_not_needed(path: Path) -> None:
    with fastqcow.open(path, password=PASSWORD) as image:
        assert PASSWORD.encode() not in pickle.dumps(image)
        with again(image) as other:
            assert other.read() == CONTENTS


def part(image: fastqcow.Image, at: int) -> bytes:
    return image.pread(1000, at)


@pytest.mark.parametrize("method", [m for m in ("spawn", "forkserver") if m in multiprocessing.get_all_start_methods()])
def test_worker_processes(path: Path, method: str) -> None:
    offsets = [0, 1000, CLUSTER - 500, CLUSTER + 700]
    context = multiprocessing.get_context(method)
    with fastqcow.open(path) as image, ProcessPoolExecutor(1, mp_context=context) as pool:
        found = list(pool.map(functools.partial(part, image), offsets))
    assert found == [CONTENTS[at : at + 1000] for at in offsets]


def test_process_that_has_imported_nothing(path: Path) -> None:
    """A pickle alone says what is to be imported."""
    with fastqcow.open(path) as image:
        code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).pread(50, 65536 + 7).hex())"
        done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(image), capture_output=True, check=True)
    assert bytes.fromhex(done.stdout.decode()) == PLAIN[7:57]
