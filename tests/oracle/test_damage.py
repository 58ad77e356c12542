"""Each image of the differential tests, damaged at random places: where QEMU and fastqcow both read bytes, they are the same.

The verdicts may differ: what fastqcow refuses on purpose stands in docs/formats.md, and test_malformed.py and test_verdicts.py
compare them one by one. But nothing comes out of fastqcow than bytes, fastqcow.Error and OSError, and that within seconds.

Some damage is done always; `pytest -s --damaged-images=1000 tests/oracle/test_damage.py` does more, to more images, and tells what
came of it.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_encrypted import PASSWORD, SCHEMES, Encrypted
from test_malformed import SUBCLUSTERS, TABLES
from test_matrix import CODECS, CONTENTS, GEOMETRIES
from test_random import Maker
from test_verdicts import DEFLATE, ZSTD

import fastqcow
from conftest import Qemu
from damage import Damage, Geometry, damaged
from fastqcow.checking import check
from fastqcow.describe import info
from luksmaker import relocked
from storage import Daemon, GoneError, RefusedError

PART = 65536
READ_NBYTES_MAX = 8 << 20
OTHER_PARTS = 6
SECONDS_MAX = 10.0
SECONDS_MAX_ENCRYPTED = 300.0  # the image says how often a password is hashed
# What docs/formats.md gives a reason for where it occurs, and where -s tells of each.
LOOKED_INTO = (
    "opened by fastqcow alone",
    "parts read by fastqcow alone",
    "parts read by the one, parts by the other",
    "QEMU crashed, or did not end",
)

Made = Callable[[Qemu, Path], Path]
Parts = dict[tuple[int, int], bytes | None]  # by offset and length


def of_matrix(geometry: tuple[int, bool], codec: str | None, content: str) -> Made:
    def make(qemu: Qemu, folder: Path) -> Path:
        cluster_size, extended = geometry
        raw, path = folder / "disk.raw", folder / "disk.qcow2"
        raw.write_bytes(CONTENTS[content])
        options = f"cluster_size={cluster_size},extended_l2={'on' if extended else 'off'},compression_type={codec or 'zlib'}"
        qemu.img("convert", *(["-c"] if codec else []), "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        return path

    return make


def of_random(seed: int) -> Made:
    return lambda qemu, folder: Maker(qemu, folder, seed).image()


def of_bytes(image: bytes) -> Made:
    def make(_: Qemu, folder: Path) -> Path:
        path = folder / "disk.qcow2"
        path.write_bytes(image)
        return path

    return make


def of_scheme(scheme: tuple[str, int, str, str]) -> Made:
    def make(qemu: Qemu, folder: Path) -> Path:
        cipher, key_nbytes, mode, hash_name = scheme
        image = Encrypted(qemu, folder / "disk.qcow2")
        image.create("", 3 << 20)
        made = image.path.read_bytes()
        locked = relocked(made, PASSWORD.encode(), cipher=cipher, key_nbytes=key_nbytes, mode=mode, hash_name=hash_name)
        image.path.write_bytes(locked)
        image.fill()
        return image.path

    return make


def legacy(qemu: Qemu, folder: Path) -> Path:
    image = Encrypted(qemu, folder / "disk.qcow2", PASSWORD)
    image.create("", 3 << 20, fmt="aes")
    image.fill()
    return image.path


def with_data_file(qemu: Qemu, folder: Path) -> Path:
    path = folder / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'data.raw'},data_file_raw=off", path, "2M")
    qemu.io(path, "write -P 7 100k 300k", "write -z 1M 100k")
    return path


def all_images() -> dict[str, Made]:
    found: dict[str, Made] = {"data file": with_data_file, "legacy encryption": legacy}
    for geometry, codec, content in itertools.product(GEOMETRIES, CODECS, CONTENTS):
        name = f"matrix-{geometry[0]}{'-ext' if geometry[1] else ''}-{codec}-{content}"
        found[name] = of_matrix(geometry, codec, content)
    found |= {f"random-{seed}": of_random(seed) for seed in range(25)}
    found |= {f"encrypted-{'-'.join(map(str, scheme))}": of_scheme(scheme) for scheme in SCHEMES}
    for kind, cases in (("tables", TABLES), ("subclusters", SUBCLUSTERS), ("deflate", DEFLATE), ("zstd", ZSTD)):
        found |= {f"{kind}-{name}": of_bytes(case.image) for name, case in cases.items()}
    return found


IMAGES = all_images()
QUICK = [name for name in IMAGES if name.endswith("-mixed")] + ["data file", "random-1", "random-7", "tables-data", "tables-zero"]
QUICK += ["legacy encryption"]
QUICK += [name for name in IMAGES if name.startswith(("encrypted-aes-64-xts-plain64-sha256", "encrypted-serpent-32-cbc"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "damage_count" in metafunc.fixturenames:
        count = metafunc.config.getoption("--damaged-images")
        names = list(IMAGES) if count >= 100 else QUICK
        metafunc.parametrize(("image_name", "damage_count"), [(name, count) for name in names], ids=names)


@pytest.fixture(scope="module")
def daemon(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("qemu-storage-daemon is not installed")
    with Daemon(tmp_path_factory.mktemp("daemon"), "--object", f"secret,id=s0,data={PASSWORD}") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def outcomes() -> Iterator[collections.Counter[str]]:
    """How often which of the two has read, and what was damaged."""
    found: collections.Counter[str] = collections.Counter()
    yield found
    print("\n" + "\n".join(f"{count:8} {what}" for what, count in found.most_common()))


@pytest.mark.filterwarnings("ignore::fastqcow.CorruptWarning")
def test_damaged_images(
    qemu: Qemu, daemon: Daemon, outcomes: collections.Counter[str], tmp_path: Path, image_name: str, damage_count: int
) -> None:
    top = IMAGES[image_name](qemu, tmp_path)
    format_name = {"encrypted": "luks", "legacy": "aes"}.get(re.split("[- ]", image_name)[0])
    options = {"encrypt": {"format": format_name, "key-secret": "s0"}} if format_name else {}
    password = PASSWORD if format_name else None
    files = sorted(tmp_path.glob("*.qcow2"))
    sound = {path: path.read_bytes() for path in files}
    geometries = {path: Geometry(path) for path in files}
    rng = random.Random(f"{image_name}")
    before, _ = read_by_us(top, password, rng)
    for _ in range(damage_count):
        path = top if rng.random() < 0.8 else rng.choice(files)
        damages = [geometries[path].damage(rng, sound[path]) for _ in range(rng.choice((1, 1, 1, 1, 2, 4)))]
        with damaged(path, sound[path], damages):
            try:
                asked = [damage.guest_off for damage in damages if damage.guest_off is not None]
                outcome = compare(daemon, top, password, options, rng, before or {}, asked)
                outcomes[outcome] += 1
                outcomes.update(f"damaged: {damage.kind}" for damage in damages)
                if outcome in LOOKED_INTO:
                    print(f"\n{outcome}: {image_name}: {path.name} damaged by {told(damages)}")
            except BaseException:
                print(f"\n{image_name}: {path.name} damaged by {told(damages)}")
                shutil.copy(path, tmp_path / f"damaged-{path.name}")
                raise
    assert all(path.read_bytes() == image for path, image in sound.items())


def told(damages: list[Damage]) -> str:
    return str([(hex(damage.off), damage.replacement and damage.replacement.hex()) for damage in damages])


def compare(
    daemon: Daemon, path: Path, password: str | None, options: dict[str, Any], rng: random.Random, before: Parts, asked: list[int]
) -> str:
    """Who of the two has read how much of the image.

    QEMU is asked for what is not as it was before the damage, for the places where that is likely to show, and for a few others.
    """
    ours, size = read_by_us(path, password, rng)
    others = set(rng.sample(sorted(ours or ()), min(len(ours or ()), OTHER_PARTS)))
    parts = [
        part
        for part, mine in (ours or {}).items()
        if mine is None or mine != before.get(part) or part in others or any(part[0] <= at < sum(part) for at in asked)
    ]
    try:
        their_size, theirs = daemon.read(path, parts, **options)
    except RefusedError as error:
        if ours is not None:
            print(f"\nQEMU refuses: {error}")
        return "opened by fastqcow alone" if ours is not None else "opened by neither"
    except GoneError:
        return "QEMU crashed, or did not end"
    if ours is None:
        return "opened by QEMU alone"
    assert size == their_size
    counts: collections.Counter[str] = collections.Counter()
    for part, found in zip(parts, theirs, strict=True):
        mine = ours[part]
        assert mine is None or found is None or mine == found, f"other bytes than QEMU's at {part[0]:#x}"
        counts[f"{mine is not None}{found is not None}"] += 1
    if counts.total() == counts["TrueTrue"]:
        return "all of it read by both"
    if counts["TrueFalse"] and counts["FalseTrue"]:
        return "parts read by the one, parts by the other"
    alone = "fastqcow alone" if counts["TrueFalse"] else "QEMU alone" if counts["FalseTrue"] else "both"
    return f"parts read by {alone}"


def read_by_us(path: Path, password: str | None, rng: random.Random) -> tuple[Parts | None, int]:
    """The bytes of each part, None where they cannot be read; None for all where the image cannot be opened. And the size."""
    since = time.process_time()
    threads, cache_size = rng.choice((1, 2, 3)), rng.choice((0, 100_000, 1 << 25))
    try:
        with fastqcow.open(path, password=password, threads=threads, cache_size=cache_size) as image:
            found = read_parts(image, rng)
            size = image.size
            if rng.random() < 0.2:
                attempt(lambda: list(itertools.islice(image.map(), 10_000)))
                attempt(lambda: [image.snapshot_of(entry).pread(PART, 0) for entry in image.snapshots[:20]])
    except (fastqcow.Error, OSError):
        found, size = None, 0
    if rng.random() < 0.1:
        attempt(lambda: info(path, password=password))
        attempt(lambda: check(path))
    encrypted = path.read_bytes()[32:36] != bytes(4)
    assert time.process_time() - since < (SECONDS_MAX_ENCRYPTED if encrypted else SECONDS_MAX)
    return found, size


def read_parts(image: fastqcow.Image, rng: random.Random) -> Parts:
    """The whole in one read, and part by part: the same, or an error here and in some part."""
    size, step = min(image.size, READ_NBYTES_MAX), max(PART, image.header.cluster_size // 2)
    parts = [(off, min(step, size - off)) for off in range(0, size, step)]
    whole = attempt(lambda: image.pread(size, 0))
    if image.size > size:
        parts.append((image.size - PART, PART))
    rng.shuffle(parts)
    found = {part: attempt(lambda part=part: image.pread(part[1], part[0])) for part in parts}  # type: ignore[misc]
    if whole is None:
        assert any(part is None for (off, _), part in found.items() if off < size)
    else:
        assert all(part == whole[off : off + nbytes] for (off, nbytes), part in found.items() if off < size)
    return found


def attempt(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except (fastqcow.Error, OSError):
        return None
