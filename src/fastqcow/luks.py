"""The LUKS header of an encrypted image (LUKS1 On-Disk Format Specification 1.2.3), and the key that a password opens in it.

In a qcow2 image the header stands where the encryption header pointer says, and only it does: data clusters lie where L2 entries
say, and their sectors are numbered by their place in the file. The limits are those of QEMU's block-luks.c, and one of our own,
without which a number in an image could keep us busy for as long as somebody likes.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastqcow.crypt import Scheme
from fastqcow.errors import FormatError, PasswordError, UnsupportedError
from fastqcow.header import Header

__all__ = ["KeySlot", "LuksHeader"]

HASHINGS_MAX = 1 << 27  # of all slots together: a minute; what QEMU takes two seconds a slot for is a tenth of that
CHAIN_HASHINGS_MAX = 1 << 29  # of all files of a chain together
HASHINGS_AT_ONCE = 1 << 17  # so many, some 50 ms, nobody wants to interrupt
STRIPES = 4000
SECTOR = 512
HEADER_SECTORS = 8
SLOT_ALIGNMENT = 8  # sectors
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
KEY_NBYTES = {"aes": (16, 24, 32), "serpent": (16, 24, 32), "twofish": (16, 24, 32), "cast5": (16,)}
MODES = ("ecb", "cbc", "ctr", "xts")
VECTORS = ("plain", "plain64", "essiv")

_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_SLOTS = 8
_ACTIVE, _INACTIVE = 0x00AC71F3, 0x0000DEAD


class KeySlot(NamedTuple):
    """A place for the key, locked by a password. key_off: from the start of the LUKS header, in bytes."""

    active: bool
    iterations: int
    salt: bytes
    key_off: int
    stripes: int


class LuksHeader(NamedTuple):
    """All of the header.

    host_off: of the header itself in the file; payload_off: bytes after which the header ends; hashings: what it takes to try a
    password on all slots.
    """

    path: str
    host_off: int
    scheme: Scheme
    hash: str
    payload_off: int
    key_nbytes: int
    key_digest: bytes
    key_salt: bytes
    key_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]
    hashings: int

    @property
    def cipher_name(self) -> str:
        """As QEMU calls it: with the bits of its key."""
        return f"{self.scheme.cipher}-{self.scheme.key_nbytes(self.key_nbytes) * 8}"

    @classmethod
    def read(cls, pread: Callable[[int, int], bytes], header: Header, path: str) -> LuksHeader:
        """Read and check the header.

        Raises:
            FormatError: it is damaged.
            UnsupportedError: a version, a cipher, a mode or a hash that is not known.
        """
        return _Parser(pread, header, path).parse()

    def unlock(self, pread: Callable[[int, int], bytes], password: bytes) -> bytes:
        """The key, from the first slot that the password opens.

        Raises:
            PasswordError: it opens none.
            UnsupportedError: a hash or a cipher that no library here has.
        """
        for slot in self.slots:
            if slot.active:
                key = self._key_in(slot, pread, password)
                digest = self._derive(key, self.key_salt, self.key_iterations, len(self.key_digest))
                if hmac.compare_digest(digest, self.key_digest):
                    return key
        hint = ", and ends with a line break, which counts" if password.endswith(b"\n") else ""
        raise PasswordError(f"the password is wrong: it opens none of the key slots{hint}", path=self.path)

    def _key_in(self, slot: KeySlot, pread: Callable[[int, int], bytes], password: bytes) -> bytes:
        """What the password makes of a slot's contents; whether that is the key its digest tells."""
        nbytes, at = self.key_nbytes * slot.stripes, self.host_off + slot.key_off
        split = pread(nbytes, at)
        if len(split) < nbytes:
            raise FormatError("a key slot of the encryption header runs past the end of the file", path=self.path, host_off=at)
        crypt = self.scheme.crypt(self._derive(password, slot.salt, slot.iterations, self.key_nbytes), by_guest_off=False)
        return self._merge(crypt.decrypt(split, 0))

    def _derive(self, secret: bytes, salt: bytes, iterations: int, nbytes: int) -> bytes:
        """By a thread that nobody has to wait for, if it takes its time: Ctrl-C comes through."""
        if iterations < HASHINGS_AT_ONCE:
            return hashlib.pbkdf2_hmac(self.hash, secret, salt, iterations, nbytes)
        found: list[bytes] = []
        thread = threading.Thread(
            target=lambda: found.append(hashlib.pbkdf2_hmac(self.hash, secret, salt, iterations, nbytes)), daemon=True
        )
        thread.start()
        while thread.is_alive():
            thread.join(0.1)  # without a limit a signal that the other thread gets would not wake this one
        return found[0]

    def _merge(self, split: bytes) -> bytes:
        """The stripes of a key put together again: exclusive or, and after each but the last a hash of every piece (AF-merge)."""
        nbytes = self.key_nbytes
        merged = bytes(nbytes)
        for at in range(0, len(split), nbytes):
            mixed = int.from_bytes(merged, "big") ^ int.from_bytes(split[at : at + nbytes], "big")
            merged = mixed.to_bytes(nbytes, "big")
            if at + nbytes < len(split):
                merged = b"".join(self._diffused(merged))
        return merged

    def _diffused(self, block: bytes) -> Iterator[bytes]:
        size = hashlib.new(self.hash).digest_size
        for i in range(0, len(block), size):
            piece = block[i : i + size]
            yield hashlib.new(self.hash, struct.pack(">I", i // size) + piece).digest()[: len(piece)]


class _Parser:
    def __init__(self, pread: Callable[[int, int], bytes], header: Header, path: str) -> None:
        assert header.crypto is not None
        self.path = path
        self.host_off = header.crypto.host_off
        nbytes = _HEAD.size + _SLOTS * _SLOT.size
        if header.crypto.nbytes < nbytes:
            raise self.bad("the encryption header is shorter than a LUKS header", header.crypto.nbytes)
        self.room = header.crypto.nbytes
        self.raw = pread(nbytes, self.host_off)
        if len(self.raw) < nbytes:
            raise self.bad("the encryption header runs past the end of the file")

    def bad(self, reason: str, value: int | None = None) -> FormatError:
        return FormatError(reason, path=self.path, host_off=self.host_off, value=value)

    def unsupported(self, what: str, name: str) -> UnsupportedError:
        return UnsupportedError(f"the {what} {name!r} of the encryption is not known", path=self.path, host_off=self.host_off)

    def parse(self) -> LuksHeader:
        magic, version, cipher, mode, hash_name, payload, key_nbytes, digest, salt, iterations, uuid = _HEAD.unpack_from(self.raw)
        if magic != b"LUKS\xba\xbe":
            raise self.bad("the encryption header is not a LUKS header")
        if version != 1:
            raise self.unsupported("LUKS version", str(version))
        scheme = self.scheme(_text(cipher), _text(mode), key_nbytes)
        digest_nbytes = self.digest_nbytes("hash", _text(hash_name))
        slots = tuple(self.slot(i, payload, key_nbytes) for i in range(_SLOTS))
        self.check_overlaps(slots, key_nbytes)
        hashings = self.count_hashings(iterations, slots, -(-key_nbytes // digest_nbytes), -(-len(digest) // digest_nbytes))
        return LuksHeader(
            path=self.path,
            host_off=self.host_off,
            scheme=scheme,
            hash=_text(hash_name),
            payload_off=payload * SECTOR,
            key_nbytes=key_nbytes,
            key_digest=digest,
            key_salt=salt,
            key_iterations=iterations,
            uuid=_text(uuid),
            slots=slots,
            hashings=hashings,
        )

    def scheme(self, cipher: str, specification: str, key_nbytes: int) -> Scheme:
        """`specification` is a mode, a dash, and what makes the vectors, which for essiv has a colon and a hash after it."""
        mode, _, rest = specification.partition("-")
        vectors, _, vectors_hash = rest.partition(":")
        if mode not in MODES:
            raise self.unsupported("cipher mode", specification)
        if vectors not in VECTORS:
            raise self.unsupported("IV generator", rest)
        vectors_key = self.digest_nbytes("IV generator's hash", vectors_hash) if vectors_hash or vectors == "essiv" else 0
        scheme = Scheme(cipher, mode, vectors, vectors_hash or None)
        sizes = KEY_NBYTES.get(cipher, ())
        if scheme.key_nbytes(key_nbytes) not in sizes or (mode == "xts" and (key_nbytes % 2 or cipher == "cast5")):
            raise self.unsupported("cipher", f"{cipher}-{specification} with a key of {key_nbytes} bytes")
        # The key of a vector is a digest as it is: its length has to be one that the cipher takes.
        if vectors == "essiv" and (vectors_key not in sizes or cipher == "cast5"):
            raise self.unsupported("IV generator", f"{rest} with {cipher}")
        return scheme

    def slot(self, i: int, payload: int, key_nbytes: int) -> KeySlot:
        state, iterations, salt, key_sector, stripes = _SLOT.unpack_from(self.raw, _HEAD.size + i * _SLOT.size)
        if state not in (_ACTIVE, _INACTIVE):
            raise self.bad(f"the state of key slot {i} is neither active nor inactive", state)
        if stripes != STRIPES:
            raise self.bad(f"key slot {i} has not {STRIPES} stripes", stripes)
        if key_sector < HEADER_SECTORS:
            raise self.bad(f"key slot {i} lies within the header", key_sector)
        slot = KeySlot(state == _ACTIVE, iterations, salt, key_sector * SECTOR, stripes)
        if key_sector + _slot_sectors(slot, key_nbytes) > payload:
            raise self.bad(f"key slot {i} lies where the data are", key_sector)
        if slot.active:
            if slot.key_off + stripes * key_nbytes > self.room:
                raise self.bad(f"key slot {i} runs past the end of the encryption header", key_sector)
            if stripes * key_nbytes % SECTOR:
                raise self.bad(f"the key in slot {i} does not fill its sectors", stripes)
        return slot

    def count_hashings(self, iterations: int, slots: tuple[KeySlot, ...], key_blocks: int, digest_blocks: int) -> int:
        """What it takes to try a password on all slots. A derivation hashes for each block of its result anew."""
        active = [slot for slot in slots if slot.active]
        if iterations == 0 or any(slot.iterations == 0 for slot in active):
            raise self.bad("a key is not to be hashed at all", 0)
        hashings = sum(slot.iterations * key_blocks + iterations * digest_blocks for slot in active)
        if hashings > HASHINGS_MAX:
            raise self.bad(f"a password is to be hashed more than {HASHINGS_MAX} times", hashings)
        return hashings

    def digest_nbytes(self, what: str, name: str) -> int:
        """Of a hash that QEMU knows, and that Python's OpenSSL lets us use."""
        try:
            if name in HASHES:
                hashlib.pbkdf2_hmac(name, b"", b"", 1)
                return hashlib.new(name).digest_size
        except ValueError:
            pass
        raise self.unsupported(what, name)

    def check_overlaps(self, slots: tuple[KeySlot, ...], key_nbytes: int) -> None:
        ranges = sorted((s.key_off // SECTOR, s.key_off // SECTOR + _slot_sectors(s, key_nbytes)) for s in slots)
        for (_, end), (start, _) in itertools.pairwise(ranges):
            if start < end:
                raise self.bad("two key slots overlap", start)


def _slot_sectors(slot: KeySlot, key_nbytes: int) -> int:
    sectors = -(-key_nbytes * slot.stripes // SECTOR)
    return -(-sectors // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "backslashreplace")
