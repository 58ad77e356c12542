"""Encrypted images: every cipher, mode, IV generator and hash that QEMU makes images with, read as QEMU reads them."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import NoReturn

import pytest

import fastqcow
from cases import words
from conftest import Qemu
from fastqcow.chain import make_options
from fastqcow.cli import main
from fastqcow.describe import info
from images import mixed, patched
from luksmaker import (
    CIPHER,
    DIGEST,
    HASH,
    ITERATIONS,
    KEY_NBYTES,
    KEY_SECTOR,
    MODE,
    PAYLOAD,
    SLOT_NBYTES,
    SLOTS,
    STRIPES_AT,
    VERSION,
    header_off,
    name,
    relocked,
    u32,
)

PASSWORD = "correct horse"
SIZE = 3 << 20

MADE_BY_QEMU = ["", "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1", "cipher-alg=twofish-192"]

# Cipher, bytes of its key, mode and IV generator, hash.
SCHEMES = [("aes", n, f"{mode}-plain64", "sha256") for n in (16, 32) for mode in ("cbc", "ecb", "ctr")]
SCHEMES += [("aes", 64, f"xts-{vectors}", "sha256") for vectors in ("plain", "plain64", "essiv:sha256", "essiv:md5")]
SCHEMES += [("aes", 32, f"cbc-{vectors}", "sha256") for vectors in ("plain", "plain64:sha1", "essiv:sha256", "essiv:md5")]
SCHEMES += [(cipher, n, "xts-plain64", "sha256") for cipher in ("serpent", "twofish", "aes") for n in (32, 48)]
SCHEMES += [(cipher, 32, mode, "sha256") for cipher in ("serpent", "twofish") for mode in ("cbc-essiv:sha256", "ctr-plain")]
SCHEMES += [("cast5", 16, f"{mode}-plain64", "sha256") for mode in ("cbc", "ecb", "ctr")]
SCHEMES += [("aes", 64, "xts-plain64", name) for name in ("md5", "sha1", "sha224", "sha384", "sha512", "ripemd160")]


class Encrypted:
    """An image and its password, and QEMU's tools with both."""

    def __init__(self, qemu: Qemu, path: Path, password: str = PASSWORD) -> None:
        self.qemu = qemu
        self.path = path
        self.secret = ("--object", f"secret,id=s0,data={password}")

    def create(self, options: str, size: int = SIZE, *, fmt: str = "luks", more: tuple[str, ...] = ()) -> None:
        options = ",".join(o if "=" not in o or o.startswith("+") else f"encrypt.{o}" for o in options.split(",") if o)
        options = options.replace("+", "")
        given = [f"encrypt.format={fmt}", "encrypt.key-secret=s0"]
        if fmt == "luks":
            given.append("encrypt.iter-time=20")
        arguments = ("create", "-q", *self.secret, "-f", "qcow2", "-o", ",".join([*given, options]).strip(","), *more)
        for _ in range(20):  # it times its own hashing, and gives up where the clock does not move meanwhile
            done = self.qemu.img(*arguments, self.path, str(size), check=False)
            if "CPU usage" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr

    def options(self) -> str:
        return f"driver=qcow2,encrypt.key-secret=s0,file.driver=file,file.filename={self.path}"

    def io(self, *commands: str) -> None:
        # qemu-io takes an image's options in the place of its name.
        self.qemu.io(Path(self.options()), *commands, options=(*self.secret, "--image-opts"))

    def read(self) -> bytes | None:
        raw = self.path.with_suffix(".oracle")
        done = self.qemu.img("convert", *self.secret, "--image-opts", self.options(), "-O", "raw", raw, check=False)
        return raw.read_bytes() if done.returncode == 0 else None

    def fill(self, seed: int = 0) -> None:
        """Data with borders anywhere, zeroes, and a compressed cluster."""
        pattern = self.path.with_suffix(".pattern")
        pattern.write_bytes(mixed(1_500_160, seed))
        self.io(f"write -s {pattern} 0 1500160", "write -P 3 1600k 512", "write -z 64k 70k", f"write -c -s {pattern} 2M 64k")


@pytest.fixture
def image(qemu: Qemu, tmp_path: Path) -> Encrypted:
    return Encrypted(qemu, tmp_path / "disk.qcow2")


def check(image: Encrypted, capsys: pytest.CaptureFixture[str]) -> None:
    expected = image.read()
    assert expected is not None
    rng = random.Random(1)
    with fastqcow.open(image.path, password=PASSWORD) as disk:
        assert disk.read() == expected
        for _ in range(50):
            offset, nbytes = rng.randrange(len(expected)), rng.choice((1, 15, 512, 700, 5000, 70_000))
            assert disk.pread(nbytes, offset) == expected[offset : offset + nbytes]
        buffers = [bytearray(n) for n in (1, 510, 513, 40_000, 0, 32_768, 33_000, 512)]
        disk.preadv(buffers, 1023)
        assert b"".join(buffers) == expected[1023 : 1023 + sum(map(len, buffers))]
        fastqcow.convert(disk, image.path.with_suffix(".out"))
    assert image.path.with_suffix(".out").read_bytes() == expected
    theirs = image.qemu.img("check", "--output=json", *image.secret, "--image-opts", image.options())
    assert main(["check", "--output=json", str(image.path)]) == 0
    assert json.loads(capsys.readouterr().out) == {**json.loads(theirs.stdout), "filename": str(image.path)}


@pytest.fixture(scope="module")
def empty(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image that QEMU has made, without data: to make others of, as it takes its time."""
    image = Encrypted(qemu, tmp_path_factory.mktemp("empty") / "disk.qcow2")
    image.create("")
    return image.path.read_bytes()


def check_info(image: Encrypted, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = json.loads(image.qemu.img("info", "--output=json", image.path).stdout)
    theirs.pop("children", None)  # these two, newer versions of qemu-img say
    theirs["format-specific"]["data"]["encrypt"].pop("detached-header", None)
    assert info(image.path, password=PASSWORD) == theirs
    secret = image.path.with_name("secret")
    secret.write_text(PASSWORD)
    assert main(["info", "--password-file", str(secret), str(image.path)]) == 0
    assert words(capsys.readouterr().out) == words(image.qemu.img("info", image.path).stdout)


@pytest.mark.parametrize("options", MADE_BY_QEMU)
def test_made_by_qemu(image: Encrypted, capsys: pytest.CaptureFixture[str], options: str) -> None:
    image.create(options)
    image.fill()
    check(image, capsys)
    check_info(image, capsys)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(image: Encrypted, empty: bytes, capsys: pytest.CaptureFixture[str], scheme: tuple[str, int, str, str]) -> None:
    cipher, key_nbytes, mode, hash_name = scheme
    image.path.write_bytes(relocked(empty, PASSWORD.encode(), cipher=cipher, key_nbytes=key_nbytes, mode=mode, hash_name=hash_name))
    image.fill()
    check(image, capsys)
    check_info(image, capsys)


@pytest.mark.parametrize(
    "geometry", ["+cluster_size=512", "+cluster_size=4k", "+cluster_size=2M", "+extended_l2=on", "+compat=0.10"]
)
@pytest.mark.parametrize("fmt", ["luks", "aes"])
def test_geometries(image: Encrypted, capsys: pytest.CaptureFixture[str], geometry: str, fmt: str) -> None:
    image.create(geometry, fmt=fmt)
    pattern = image.path.with_suffix(".pattern")
    pattern.write_bytes(mixed(600_064))
    image.io(f"write -s {pattern} 1536 600064", "write -P 9 2M 3k", "write -z 100k 8k")
    check(image, capsys)
    check_info(image, capsys)


def test_map(image: Encrypted, empty: bytes) -> None:
    image.path.write_bytes(empty)
    image.io("write 0 200k", "write -z 1M 64k", "write 2M 512")
    theirs = json.loads(image.qemu.img("map", "--output=json", *image.secret, "--image-opts", image.options()).stdout)
    with fastqcow.open(image.path, password=PASSWORD) as disk:
        ours = [extent._asdict() for extent in disk.map()]
    assert [{key: value for key, value in extent.items() if key in theirs[0]} for extent in ours] == theirs


@pytest.mark.parametrize("fmt", ["luks", "aes"])
def test_snapshots_and_their_vm_state(image: Encrypted, capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    image.create("+cluster_size=4k", fmt=fmt)
    image.io("write -P 1 0 1M", "write -b -P 2 0 100k")
    opts = ("--image-opts", image.options())
    image.qemu.img("snapshot", *image.secret, *opts, "-c", "before")
    before = image.read()
    image.qemu.img("resize", *image.secret, "-q", "--image-opts", image.options(), "6M")
    image.io("write -P 3 512k 5M", "write -b -P 4 0 50k")
    check(image, capsys)
    # Outside of a machine, a snapshot is taken of what was saved of it, but not told of its length.
    raw = image.path.read_bytes()
    (table_off,) = struct.unpack_from(">Q", raw, 64)
    image.path.write_bytes(patched(raw, table_off + 40, struct.pack(">Q", 100 << 10)))
    with fastqcow.open(image.path, password=PASSWORD) as disk, disk.snapshot("before") as then:
        assert then.size == SIZE
        assert then.read() == before
        with then.vm_state as state:
            assert state.read() == b"\2" * (100 << 10)


def test_backing_files_with_passwords_of_their_own(qemu: Qemu, tmp_path: Path) -> None:
    base, overlay = Encrypted(qemu, tmp_path / "base.qcow2", "below"), Encrypted(qemu, tmp_path / "overlay.qcow2")
    base.create("")
    base.fill()
    lower = base.read()
    assert lower is not None
    overlay.create("cipher-mode=cbc", more=("-u", "-b", "base.qcow2", "-F", "qcow2"))
    secrets = ("--object", "secret,id=s1,data=below")
    options = f"{overlay.options()},backing.driver=qcow2,backing.encrypt.key-secret=s1,backing.file.filename={base.path}"
    qemu.io(Path(options), "write -P 5 100k 100k", options=(*overlay.secret, *secrets, "--image-opts"))
    expected = lower[: 100 << 10] + b"\5" * (100 << 10) + lower[200 << 10 :]
    asked: list[str] = []

    def password(path: str) -> str:
        asked.append(Path(path).name)
        return "below" if path.endswith("base.qcow2") else PASSWORD

    with fastqcow.open(overlay.path, password=password) as disk:
        assert disk.read() == expected
    assert asked == ["overlay.qcow2", "base.qcow2"]
    with pytest.raises(fastqcow.PasswordError, match="wrong") as caught:
        fastqcow.open(overlay.path, password=PASSWORD)
    assert caught.value.path is not None
    assert caught.value.path.endswith("base.qcow2")


def test_an_external_data_file(image: Encrypted, capsys: pytest.CaptureFixture[str]) -> None:
    image.create(f"+data_file={image.path.parent}/data.raw")
    image.io("write -P 1 64k 1M", "write -P 2 2M 10k")
    check(image, capsys)


def test_passwords(image: Encrypted, empty: bytes) -> None:
    image.path.write_bytes(empty)
    with pytest.raises(fastqcow.PasswordError, match="password is needed") as caught:
        fastqcow.open(image.path)
    assert caught.value.path == str(image.path)
    for wrong in ("", "Correct horse", PASSWORD + "\n", b"\xff\0"):
        with pytest.raises(fastqcow.PasswordError, match="wrong"):
            fastqcow.open(image.path, password=wrong)
    for right in (PASSWORD, PASSWORD.encode(), lambda path: PASSWORD if path == str(image.path) else None):
        with fastqcow.open(image.path, password=right) as disk:
            assert disk.pread(512, 0) == bytes(512)
    with pytest.raises(fastqcow.PasswordError, match="needed"):
        fastqcow.open(image.path, password=lambda path: None)
    for number in (1234, 10**15):
        with pytest.raises(TypeError, match="text or bytes, not int"):
            fastqcow.open(image.path, password=number)  # type: ignore[arg-type]


def test_passwords_are_not_told(image: Encrypted, empty: bytes) -> None:
    image.path.write_bytes(empty)
    with fastqcow.open(image.path, password=PASSWORD) as disk:
        assert disk._options.password is None
    assert PASSWORD not in repr(make_options(password=PASSWORD))
    with pytest.raises(ValueError, match="characters that are none") as caught:
        fastqcow.open(image.path, password=PASSWORD + "\ud800")
    assert caught.value.__cause__ is None
    assert not isinstance(caught.value, UnicodeEncodeError)


@pytest.mark.parametrize("function", ["new", "pbkdf2_hmac"])
def test_a_hash_that_openssl_does_not_let_us_use(
    image: Encrypted, empty: bytes, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise ValueError("disabled for FIPS")

    image.path.write_bytes(empty)
    monkeypatch.setattr(hashlib, function, refuse)
    with pytest.raises(fastqcow.UnsupportedError, match="hash 'sha256'"):
        fastqcow.open(image.path, password=PASSWORD)
    assert "hash 'sha256'" in info(image.path)["unreadable"]


def test_commands(image: Encrypted, empty: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    image.path.write_bytes(empty)
    image.fill()
    expected, secret, out = image.read(), image.path.with_name("secret"), image.path.with_suffix(".raw")
    secret.write_text(PASSWORD)
    for command in (["convert", image.path, out], ["compare", image.path, out], ["checksum", image.path], ["map", image.path]):
        assert main([*map(str, command), "--password-file", str(secret)]) == 0
    assert out.read_bytes() == expected
    capsys.readouterr()
    secret.write_text(PASSWORD + "\n")
    assert main(["convert", str(image.path), str(out), "--password-file", str(secret)]) == 1
    assert "ends with a line break" in capsys.readouterr().err
    assert main(["map", str(image.path)]) == 1
    assert "--password-file" in capsys.readouterr().err
    assert main(["info", str(image.path)]) == 0
    assert f"cannot be read: {image.path}: the image is encrypted" in capsys.readouterr().out
    assert main(["info", str(image.path), "--password-file", str(image.path.with_name("none"))]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("slot", range(8))
def test_every_key_slot(image: Encrypted, empty: bytes, capsys: pytest.CaptureFixture[str], slot: int) -> None:
    image.path.write_bytes(relocked(empty, PASSWORD.encode(), cipher="aes", key_nbytes=64, mode="xts-plain64", slot=slot))
    image.fill()
    check(image, capsys)


def test_a_password_that_is_not_ascii(qemu: Qemu, tmp_path: Path) -> None:
    image = Encrypted(qemu, tmp_path / "disk.qcow2", "grüße 世界")
    image.create("")
    fastqcow.open(image.path, password="grüße 世界").close()


def test_a_legacy_password_is_cut_and_not_checked(qemu: Qemu, tmp_path: Path) -> None:
    image = Encrypted(qemu, tmp_path / "disk.qcow2", "a password of more than sixteen bytes")
    image.create("", fmt="aes")
    image.io("write -P 7 0 64k")
    with fastqcow.open(image.path, password="a password of more than fits") as disk:
        assert disk.pread(65536, 0) == b"\7" * 65536
    with fastqcow.open(image.path, password="another") as disk:
        assert disk.pread(16, 0) != b"\7" * 16


DAMAGE = {
    "no magic": (0, b"LUKX", "not a LUKS header"),
    "version 2": (VERSION, b"\0\2", "LUKS version"),
    "an unknown cipher": (CIPHER, name("rot13"), "cipher 'rot13"),
    "an unknown mode": (MODE, name("pcbc-plain64"), "cipher mode"),
    "no IV generator": (MODE, name("xts"), "IV generator"),
    "an unknown IV generator": (MODE, name("xts-benbi"), "IV generator"),
    "ESSIV without a hash": (MODE, name("xts-essiv"), "IV generator"),
    "ESSIV with a hash of no key's length": (MODE, name("xts-essiv:sha1"), "IV generator"),
    "ESSIV with an unknown hash": (MODE, name("xts-essiv:crc32"), "IV generator"),
    "an unknown hash": (HASH, name("whirlpool"), "hash"),
    "a hash that only libraries know": (HASH, name("sha3_256"), "hash"),
    "a key of no length": (KEY_NBYTES, u32(0), "key of 0 bytes"),
    "a key too long": (KEY_NBYTES, u32(65536), "key of 65536 bytes"),
    "an odd key": (KEY_NBYTES, u32(63), "key of 63 bytes"),
    "CAST5 with XTS": (CIPHER, name("cast5"), "cipher"),
    "another digest": (DIGEST, bytes(20), "password is wrong"),
    "a payload that begins within the slots": (PAYLOAD, u32(100), "where the data are"),
    "a slot neither on nor off": (SLOTS, u32(1), "neither active"),
    "a slot that nobody can open": (SLOTS + 8, bytes(32), "password is wrong"),
    "no stripes": (SLOTS + STRIPES_AT, u32(0), "stripes"),
    "one stripe more": (SLOTS + STRIPES_AT, u32(4001), "stripes"),
    "4294967295 stripes": (SLOTS + STRIPES_AT, u32(0xFFFFFFFF), "stripes"),
    "a key whose stripes do not fill their sectors": (
        CIPHER,
        name("aes") + name("cbc-plain64") + name("sha256") + u32(4040) + u32(24),
        "fill",
    ),
    "slots within the header": (SLOTS + KEY_SECTOR, u32(7), "within the header"),
    "a payload within the header": (PAYLOAD, u32(7), "where the data are"),
    "slots that overlap": (SLOTS + SLOT_NBYTES + KEY_SECTOR, u32(9), "overlap"),
    "a slot beyond the header": (SLOTS + KEY_SECTOR, u32(0x7FFFFFF8), "where the data are"),
    "all slots off": (SLOTS, u32(0x0000DEAD), "password is wrong"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header(image: Encrypted, empty: bytes, damage: str) -> None:
    at, replacement, reason = DAMAGE[damage]
    path = image.path
    path.write_bytes(patched(empty, header_off(empty) + at, replacement))
    assert image.read() is None
    with pytest.raises(fastqcow.Error, match=reason) as caught:
        fastqcow.open(path, password=PASSWORD)
    assert caught.value.path == str(path)
    assert reason == "password is wrong" or "unreadable" in info(path)


# QEMU hashes for as long as the image says, be it an hour; and 0 times ends it.
@pytest.mark.parametrize("iterations", [0, (1 << 27) + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("at", [ITERATIONS, SLOTS + 4])
def test_iterations_are_bounded(tmp_path: Path, empty: bytes, iterations: int, at: int) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(patched(empty, header_off(empty) + at, u32(iterations)))
    with pytest.raises(fastqcow.FormatError, match="hashed"):
        fastqcow.open(path, password=PASSWORD)


POINTER = {
    "no pointer": (0, u32(0x12345678), "nothing points to its header"),
    "not aligned": (8, struct.pack(">Q", 0x10200), "not aligned"),
    "beyond the end of the file": (8, struct.pack(">Q", 1 << 40), "past the end of the file"),
    "too short for a header": (16, struct.pack(">Q", 500), "shorter"),
    "too short for the first slot": (16, struct.pack(">Q", 100_000), "past the end of the encryption header"),
}


@pytest.mark.parametrize("damage", POINTER)
def test_a_damaged_pointer(image: Encrypted, empty: bytes, damage: str) -> None:
    at, replacement, reason = POINTER[damage]
    image.path.write_bytes(patched(empty, empty.index(u32(0x0537BE77)) + at, replacement))
    assert image.read() is None
    with pytest.raises(fastqcow.FormatError, match=reason):
        fastqcow.open(image.path, password=PASSWORD)


def test_a_pointer_without_encryption(image: Encrypted, empty: bytes) -> None:
    image.path.write_bytes(patched(empty, 32, u32(0)))
    assert image.read() is None
    with pytest.raises(fastqcow.FormatError, match="not LUKS"):
        fastqcow.open(image.path)
