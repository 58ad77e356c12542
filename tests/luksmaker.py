"""LUKS headers made anew in an image that QEMU has encrypted.

qemu-img takes seconds to make one, as it measures how fast it hashes first. So tests let it make one image, and put headers of
their own with other ciphers into copies; that these are right is for QEMU to say, which opens and fills them.
"""

from __future__ import annotations

import hashlib
import random
import struct

from fastqcow.crypt import block_cipher
from images import patched

# Offsets within the LUKS header.
VERSION, CIPHER, MODE, HASH, PAYLOAD, KEY_NBYTES, DIGEST, ITERATIONS, SLOTS = 6, 8, 40, 72, 104, 108, 112, 164, 208
SLOT_NBYTES, KEY_SECTOR, STRIPES_AT = 48, 40, 44
ACTIVE = 0x00AC71F3
STRIPES = 4000
MASTER_KEY = random.Random(7).randbytes(64)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def name(text: str) -> bytes:
    return text.encode().ljust(32, b"\0")


def header_off(image: bytes) -> int:
    """Where the encryption header pointer, the first header extension, points."""
    (off,) = struct.unpack_from(">Q", image, image.index(u32(0x0537BE77)) + 8)
    return int(off)


def relocked(
    image: bytes, password: bytes, *, cipher: str, key_nbytes: int, mode: str, hash_name: str = "sha256", slot: int = 0
) -> bytes:
    """The image with one active key slot and another cipher. What it holds is to be written after that."""
    at = header_off(image)
    key, rng = MASTER_KEY[:key_nbytes], random.Random(8)
    salts = rng.randbytes(32), rng.randbytes(32)
    digest = hashlib.pbkdf2_hmac(hash_name, key, salts[0], 1000, 20)
    (slot_sector,) = struct.unpack_from(">I", image, at + SLOTS + slot * SLOT_NBYTES + KEY_SECTOR)
    slot_key = hashlib.pbkdf2_hmac(hash_name, password, salts[1], 1000, key_nbytes)
    material = encrypted(split(key, hash_name, rng), slot_key, cipher, mode)
    fields = {
        CIPHER: name(cipher),
        MODE: name(mode),
        HASH: name(hash_name),
        KEY_NBYTES: u32(key_nbytes),
        DIGEST: digest + salts[0] + u32(1000),
        SLOTS: u32(0x0000DEAD),
        SLOTS + slot * SLOT_NBYTES: u32(ACTIVE) + u32(1000) + salts[1] + u32(slot_sector) + u32(STRIPES),
        slot_sector * 512: material,
    }
    for field, value in fields.items():
        image = patched(image, at + field, value)
    return image


def split(key: bytes, hash_name: str, rng: random.Random) -> bytes:
    stripes, mixed = [], bytes(len(key))
    size = hashlib.new(hash_name).digest_size
    for _ in range(STRIPES - 1):
        stripes.append(rng.randbytes(len(key)))
        mixed = xor(mixed, stripes[-1])
        pieces = [mixed[i : i + size] for i in range(0, len(mixed), size)]
        mixed = b"".join(hashlib.new(hash_name, u32(i) + p).digest()[: len(p)] for i, p in enumerate(pieces))
    return b"".join([*stripes, xor(mixed, key)])


def encrypted(data: bytes, key: bytes, cipher: str, specification: str) -> bytes:
    """Sectors from number 0 on, block for block as the definitions of the modes say."""
    mode, _, vectors = specification.partition("-")
    keys = (key[: len(key) // 2], key[len(key) // 2 :]) if mode == "xts" else (key, key)
    main, other = (block_cipher(cipher, k) for k in keys)
    out = []
    for number in range(len(data) // 512):
        vector = number.to_bytes(8, "little").ljust(main.block_nbytes, b"\0")
        if vectors.startswith("essiv:"):
            vector = block_cipher(cipher, hashlib.new(vectors[6:], key).digest()).encrypt(vector)
        tweak = int.from_bytes(other.encrypt(vector), "little") if mode == "xts" else 0
        for at in range(number * 512, number * 512 + 512, main.block_nbytes):
            block = data[at : at + main.block_nbytes]
            if mode == "xts":
                t = tweak.to_bytes(16, "little")
                out.append(xor(main.encrypt(xor(block, t)), t))
                tweak = tweak << 1 & (1 << 128) - 1 ^ (0x87 if tweak >> 127 else 0)
            elif mode == "ctr":
                out.append(xor(block, main.encrypt(vector)))
                count = int.from_bytes(vector, "big") + 1
                vector = (count % (1 << 8 * len(vector))).to_bytes(len(vector), "big")
            else:
                out.append(main.encrypt(xor(block, vector) if mode == "cbc" else block))
                vector = out[-1]
    return b"".join(out)


def xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")
