"""Images as file systems of fsspec: the protocol qcow2."""

from __future__ import annotations

import importlib.metadata
import io
import pickle
import struct
from pathlib import Path

import pytest

import fastqcow
from conftest import Qemu
from images import L1, L2, PAYLOAD, build, compressed_entry, data_entry, deflate, noise, patched, snapshot_entry, text
from webserver import WebServer

fsspec = pytest.importorskip("fsspec")

from fastqcow.integrations.filesystem import Qcow2FileSystem  # noqa: E402

CLUSTER = 65536
AT = PAYLOAD * CLUSTER
TEXT, PLAIN = text(CLUSTER), noise(CLUSTER)
IMAGE = build([compressed_entry(AT, len(deflate(TEXT)), 16), data_entry(AT + CLUSTER)], deflate(TEXT).ljust(CLUSTER, b"\0") + PLAIN)
CONTENTS = TEXT + PLAIN


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """As the installed package does by its entry point."""
    fsspec.register_implementation("qcow2", Qcow2FileSystem, clobber=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE)
    return path


def with_snapshots(names: list[bytes]) -> bytes:
    """Snapshots of these names, all of the disk as it is, but each with a size of its own."""
    entries = [
        snapshot_entry(b"%d" % (i + 1), name, l1_off=L1 * CLUSTER, extra=struct.pack(">QQ", 0, 512 * (i + 1)))
        for i, name in enumerate(names)
    ]
    at = len(IMAGE) + -len(IMAGE) % CLUSTER
    return patched(IMAGE.ljust(at, b"\0"), 60, struct.pack(">IQ", len(names), at)) + b"".join(entries)


def test_entry_point() -> None:
    """Where the package is installed; fsspec finds it by that."""
    found = importlib.metadata.distribution("fastqcow").entry_points.select(group="fsspec.specs")
    assert [(each.name, each.load()) for each in found] == [("qcow2", Qcow2FileSystem)]


def test_disk(path: Path) -> None:
    fs = fsspec.filesystem("qcow2", fo=str(path))
    assert fs.ls("", detail=False) == fs.ls("/", detail=False) == ["disk.raw"]
    assert fs.info("disk.raw") == fs.info("qcow2://disk.raw") == {"name": "disk.raw", "size": 2 * CLUSTER, "type": "file"}
    assert fs.size("disk.raw") == 2 * CLUSTER
    assert fs.isfile("disk.raw")
    assert fs.isdir("")
    assert not fs.exists("snapshots")
    assert fs.find("") == ["disk.raw"]
    assert fs.cat("disk.raw") == CONTENTS
    fs.close()


@pytest.mark.parametrize(
    "span", [(None, None), (0, 10), (5, None), (None, 7), (-10, None), (-20, -5), (10, 5), (1 << 40, None), (100, 1 << 40)]
)
def test_cat_file(path: Path, span: tuple[int | None, int | None]) -> None:
    fs = Qcow2FileSystem(str(path))
    assert fs.cat_file("disk.raw", *span) == CONTENTS[slice(*span)]


def test_cat_ranges(path: Path) -> None:
    fs = Qcow2FileSystem(str(path))
    assert fs.cat_ranges(["disk.raw"] * 3, [0, 5, CLUSTER - 1], [3, 5, CLUSTER + 9]) == [
        CONTENTS[:3],
        b"",
        CONTENTS[CLUSTER - 1 : CLUSTER + 9],
    ]


def test_open(path: Path) -> None:
    fs = Qcow2FileSystem(str(path))
    with fs.open("disk.raw") as one, fs.open("disk.raw") as other:
        assert one.read(100) == CONTENTS[:100]
        assert other.read() == CONTENTS
        assert one.seek(-10, io.SEEK_END) == 2 * CLUSTER - 10
        assert one.read() == CONTENTS[-10:]
    with fs.open("disk.raw") as after_others_were_closed:
        assert after_others_were_closed.read(5) == CONTENTS[:5]
    file = fs.open("disk.raw")
    fs.close()
    assert file.read() == CONTENTS
    with pytest.raises(ValueError, match="closed"):
        fs.cat_file("disk.raw")


def test_text(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(build([data_entry(AT)], b"line\n" * 100))
    with fsspec.open(f"qcow2://disk.raw::{tmp_path}/disk.qcow2", "rt") as file:
        assert file.readline() == "line\n"


def test_read_only(path: Path) -> None:
    fs = Qcow2FileSystem(str(path))
    with pytest.raises(NotImplementedError):
        fs.open("disk.raw", "wb")
    with pytest.raises(ValueError, match="read-only"):
        Qcow2FileSystem(str(path), mode="w")


@pytest.mark.parametrize("name", ["other", "disk.raw/x", "snapshots", "snapshots/x.raw", "../disk.raw"])
def test_what_is_not_there(path: Path, name: str) -> None:
    fs = Qcow2FileSystem(str(path))
    for call in (fs.info, fs.ls, fs.open, fs.cat_file):
        with pytest.raises(FileNotFoundError):
            call(name)


def test_folders_have_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(with_snapshots([b"x"]))
    fs = Qcow2FileSystem(str(tmp_path / "disk.qcow2"))
    for name in ("", "snapshots"):
        with pytest.raises(IsADirectoryError):
            fs.cat_file(name)


def test_snapshots_are_what_qemu_goes_back_to(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "1M")
    expected = {}
    for i, name in enumerate(("before", "after"), 1):
        qemu.io(path, f"write -P {i} {i * 100}k 70k")
        qemu.img("snapshot", "-c", name, path)
        expected[f"snapshots/{name}.raw"] = qemu.read(path)
    qemu.io(path, "write -P 9 0 1M")
    fs = Qcow2FileSystem(str(path))
    assert fs.find("") == ["disk.raw", "snapshots/after.raw", "snapshots/before.raw"]
    assert fs.ls("snapshots", detail=False) == ["snapshots/after.raw", "snapshots/before.raw"]
    assert fs.info("snapshots/after.raw")["snapshot_id"] == "2"
    assert fs.cat("snapshots/*.raw") == expected
    assert fs.cat("disk.raw") == b"\t" * (1 << 20)
    with fs.open("snapshots/before.raw") as file:
        assert file.read() == expected["snapshots/before.raw"]


NAMES = {
    b"plain": "plain",
    b"with space-1.0_x": "with space-1.0_x",
    b"": "",
    b"/": "%2F",
    b"../../etc/passwd": "..%2F..%2Fetc%2Fpasswd",
    b"a*?[b]": "a%2A%3F%5Bb%5D",
    b"a::b://c": "a%3A%3Ab%3A%2F%2Fc",
    b"100%": "100%25",
    b"%2F": "%252F",
    b"tab\tline\nbell\x07": "tab%09line%0Abell%07",
    "größe".encode(): "größe",
    b"no utf-8 \xff": "no utf-8 %FF",
    "\u202egnp.exe".encode(): "%E2%80%AEgnp.exe",
}


def test_names_are_safe(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(with_snapshots(list(NAMES)))
    fs = Qcow2FileSystem(str(path))
    assert sorted(fs.ls("snapshots", detail=False)) == sorted(f"snapshots/{name}.raw" for name in NAMES.values())
    for i, (name, safe) in enumerate(NAMES.items()):
        info = fs.info(f"snapshots/{safe}.raw")
        assert (info["snapshot_name"], info["size"]) == (name.decode(errors="surrogateescape"), 512 * (i + 1))
        assert fs.cat_file(f"qcow2://snapshots/{safe}.raw") == CONTENTS[: 512 * (i + 1)]
        with fsspec.open(f"qcow2://snapshots/{safe}.raw::{path}") as file:
            assert file.read() == CONTENTS[: 512 * (i + 1)]


def test_names_that_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(with_snapshots([b"x", b"x", b"x~2", b"x", b"y"]))
    fs = Qcow2FileSystem(str(path))
    sizes = {name: fs.info(name)["size"] // 512 for name in fs.ls("snapshots", detail=False)}
    assert sizes == {f"snapshots/{name}.raw": size for name, size in {"x": 1, "x~2": 2, "x~2~2": 3, "x~3": 4, "y": 5}.items()}
    assert all(len(fs.cat_file(name)) == 512 * size for name, size in sizes.items())


def test_damaged_snapshot_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = with_snapshots([b"good", b"bad"])
    at = image.rindex(b"bad") - 1 - 16 - 40  # name, id, extra data, entry
    path.write_bytes(patched(image, at, (L2 * CLUSTER + 9).to_bytes(8, "big")))
    fs = Qcow2FileSystem(str(path))
    assert fs.cat_file("snapshots/good.raw") == CONTENTS[:512]
    with pytest.raises(fastqcow.FormatError):
        fs.cat_file("snapshots/bad.raw")
    assert fs.cat_file("disk.raw") == CONTENTS


def test_pickle(path: Path) -> None:
    fs = Qcow2FileSystem(str(path), threads=1)
    again = pickle.loads(pickle.dumps(fs))
    assert again.cat("disk.raw") == CONTENTS
    assert again.storage_options == fs.storage_options
    opened = pickle.loads(pickle.dumps(fsspec.open(f"qcow2://disk.raw::file://{path}")))
    with opened as file:
        assert file.read() == CONTENTS
    with fs.open("disk.raw") as file, pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(file.raw)


def test_password(path: Path) -> None:
    pytest.importorskip("cryptography")
    path.write_bytes(patched(build([data_entry(AT)], PLAIN), 32, b"\0\0\0\1"))
    with pytest.raises(fastqcow.PasswordError):
        fsspec.open(f"qcow2://disk.raw::{path}")
    with fastqcow.open(path, password="x") as image, fsspec.open(f"qcow2://disk.raw::{path}", qcow2={"password": "x"}) as file:
        assert file.read() == image.read()


def test_backing_file_beside_a_local_image(path: Path) -> None:
    overlay = path.with_name("overlay")
    overlay.write_bytes(build([0, 0], backing=("disk.qcow2", "qcow2")))
    for url in (f"qcow2://disk.raw::{overlay}", f"qcow2://disk.raw::file://{overlay}"):
        with fsspec.open(url) as file:
            assert file.read() == CONTENTS


def test_other_kinds_of_files(path: Path) -> None:
    assert Qcow2FileSystem(io.BytesIO(IMAGE)).cat("disk.raw") == CONTENTS
    assert Qcow2FileSystem(path).cat("disk.raw") == CONTENTS
    assert Qcow2FileSystem(fsspec.open(f"file://{path}")).cat("disk.raw") == CONTENTS
    with pytest.raises(FileNotFoundError):
        Qcow2FileSystem(str(path) + "x")
    with pytest.raises(TypeError):
        Qcow2FileSystem(3)


@pytest.fixture
def url(server: WebServer) -> str:
    pytest.importorskip("aiohttp")
    server.files["disk.qcow2"] = IMAGE
    return server.url("disk.qcow2")


def test_chain_over_http(server: WebServer, url: str) -> None:
    url = f"qcow2://disk.raw::{url}"
    with fsspec.open(url) as file:
        assert file.read(10) == CONTENTS[:10]
        assert {method for method, *_ in server.requests} == {"GET"}
        assert file.seek(0) == 0
        assert file.read() == CONTENTS
    fs, path = fsspec.core.url_to_fs(url)
    assert path == "disk.raw"
    assert pickle.loads(pickle.dumps(fs)).cat(path) == CONTENTS


def test_chain_over_a_chain(url: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/folder/disk.qcow2", IMAGE)
    with fsspec.open("qcow2://disk.raw::memory://folder/disk.qcow2") as file:
        assert file.read() == CONTENTS
    fs.rm("/folder", recursive=True)
    with fsspec.open(f"qcow2://disk.raw::simplecache::{url}") as file:
        assert file.read() == CONTENTS


def test_image_in_an_image(path: Path) -> None:
    outer = path.with_name("outer.qcow2")
    outer.write_bytes(build([data_entry((PAYLOAD + i) * CLUSTER) for i in range(len(IMAGE) // CLUSTER)], IMAGE))
    with fastqcow.open(f"qcow2://disk.raw::{outer}") as image:
        assert image.read() == CONTENTS
    with fsspec.open(f"qcow2://disk.raw::qcow2://disk.raw::{outer}") as file:
        assert file.read() == CONTENTS
