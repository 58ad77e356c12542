"""Images damaged at random places, mostly where their tables are, in the place where they lie."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from images import COMPRESSED, COPIED, ZERO, compressed_entry

OFFSET = 0x00FF_FFFF_FFFF_FE00
ONES = (1 << 64) - 1


class Damage(NamedTuple):
    """Bytes that stand at a place of the file, or where it ends; where on the disk that is likely to show; what it was to hit."""

    off: int
    replacement: bytes | None
    guest_off: int | None = None
    kind: str = ""


class Place(NamedTuple):
    """Of a table entry, or of a compressed stream."""

    off: int
    guest_off: int


class Geometry:
    """Where in a sound image something is, to damage that."""

    def __init__(self, path: Path) -> None:
        image = path.read_bytes()
        self.nbytes = len(image)
        (self.cluster_bits,) = struct.unpack_from(">I", image, 20)
        l1_entries, l1_off, table_off, _, snapshots, snapshots_off = struct.unpack_from(">IQQIIQ", image, 36)
        self.cluster = 1 << self.cluster_bits
        version, self.entry_nbytes = image[7], 16 if image[7] == 3 and image[79] & 16 else 8
        self.header = min(self.cluster, 600 if version == 3 else 200)
        per_table = self.cluster // self.entry_nbytes
        tables = [Place(l1_off + 8 * i, i * per_table * self.cluster) for i in range(min(l1_entries, 64))]
        self.l1 = [place for place in tables if place.off + 8 <= self.nbytes]
        self.entries, self.streams, self.tables = [], [], []
        for place in self.l1:
            table = struct.unpack_from(">Q", image, place.off)[0] & OFFSET
            if not table or table + self.cluster > self.nbytes:
                continue
            self.tables.append(table)
            for i in range(per_table):
                at = table + i * self.entry_nbytes
                (entry,) = struct.unpack_from(">Q", image, at)
                if entry or i < 4:
                    self.entries.append(Place(at, place.guest_off + i * self.cluster))
                if entry & COMPRESSED:
                    stream = entry & (1 << 62 - (self.cluster_bits - 8)) - 1
                    self.streams.append(Place(stream, place.guest_off + i * self.cluster))
        self.others = [table_off, table_off + 8]
        if table_off + 8 <= self.nbytes:
            self.others.append(struct.unpack_from(">Q", image, table_off)[0] & OFFSET)
        if snapshots:
            self.others += [snapshots_off + at for at in (0, 8, 12, 20, 36, 40, 48)]
        self.others += [at + 8 * i for at in extension_places(image) for i in range(30)]
        self.places = [0, l1_off, table_off, *self.tables, *self.others[2:3]]

    def damage(self, rng: random.Random, image: bytes) -> Damage:
        choices: list[tuple[int, str, Callable[[], Damage | None]]] = [
            (12, "header", lambda: self.in_header(rng, image)),
            (8, "L1 entry", lambda: self.word(rng, image, *rng.choice(self.l1)) if self.l1 else None),
            (30, "L2 entry", lambda: self.entry(rng, image)),
            (6, "refcounts, snapshots, extensions", lambda: self.word(rng, image, rng.choice(self.others))),
            (20, "compressed stream", lambda: self.in_stream(rng, image)),
            (16, "any byte", lambda: self.bits(rng, image, rng.randrange(self.nbytes))),
            (5, "cut anywhere", lambda: Damage(rng.randrange(self.nbytes), None)),
            (3, "cut near the end", lambda: Damage(max(self.nbytes - rng.randrange(2 * self.cluster), 0), None)),
        ]
        weights = [weight for weight, _, _ in choices]
        while True:
            _, kind, make = rng.choices(choices, weights)[0]
            made = make()
            if made and made.off < self.nbytes and image[made.off : made.off + len(made.replacement or b"")] != made.replacement:
                return made._replace(kind=kind)

    def in_header(self, rng: random.Random, image: bytes) -> Damage | None:
        off = rng.randrange(self.header)
        if rng.random() < 0.3:
            return self.bits(rng, image, off)
        width = rng.choice((2, 4, 4, 8))
        off -= off % width
        old = int.from_bytes(image[off : off + width], "big")
        values = (0, (1 << 8 * width) - 1, old ^ 1 << rng.randrange(8 * width), old + 1, old - 1, old * 2, rng.randrange(300))
        return Damage(off, (rng.choice(values) % (1 << 8 * width)).to_bytes(width, "big"))

    def entry(self, rng: random.Random, image: bytes) -> Damage | None:
        if not self.entries:
            return None
        off, guest_off = rng.choice(self.entries)
        if self.entry_nbytes == 16 and rng.random() < 0.5:
            return self.bits(rng, image, off + 8 + rng.randrange(8), guest_off)
        return self.word(rng, image, off, guest_off)

    def in_stream(self, rng: random.Random, image: bytes) -> Damage | None:
        if not self.streams:
            return None
        off, guest_off = rng.choice(self.streams)
        return self.bits(rng, image, off + rng.randrange(rng.choice((4, 100, self.cluster))), guest_off)

    def bits(self, rng: random.Random, image: bytes, off: int, guest_off: int | None = None) -> Damage | None:
        if off >= self.nbytes:
            return None
        old = image[off]
        return Damage(off, bytes([rng.choice((old ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))]), guest_off)

    def word(self, rng: random.Random, image: bytes, off: int, guest_off: int | None = None) -> Damage | None:
        if off + 8 > self.nbytes:
            return None
        (old,) = struct.unpack_from(">Q", image, off)
        clusters = self.nbytes // self.cluster + 2
        values = (
            0,
            ONES,
            old ^ 1 << rng.randrange(64),
            old ^ COPIED,
            old ^ ZERO,
            old ^ COMPRESSED,
            old + 1 & ONES,
            old + self.cluster & ONES,
            old - self.cluster & ONES,
            COPIED | rng.choice(self.places),
            COPIED | rng.randrange(clusters) * self.cluster,
            rng.randrange(clusters) * self.cluster,
            rng.randrange(clusters * self.cluster // 512) * 512,
            compressed_entry(rng.randrange(self.nbytes), rng.randrange(1, self.cluster), self.cluster_bits),
            rng.getrandbits(64),
            struct.unpack_from(">Q", image, rng.choice(self.entries).off)[0] if self.entries else 0,
        )
        return Damage(off, struct.pack(">Q", rng.choice(values)), guest_off)


def extension_places(image: bytes) -> list[int]:
    """Where the header extensions of bitmaps and of encryption point to."""
    found = []
    for magic, at in ((0x23852875, 16), (0x0537BE77, 0)):
        where = image.find(struct.pack(">I", magic), 0, 600)
        if where >= 0:
            found.append(struct.unpack_from(">Q", image, where + 8 + at)[0])
    return found


@contextlib.contextmanager
def damaged(path: Path, image: bytes, damages: list[Damage]) -> Iterator[None]:
    """The file with the damage in it, and without it again."""
    fd = os.open(path, os.O_RDWR)
    try:
        for off, replacement, *_ in damages:
            if replacement is None:
                os.ftruncate(fd, min(off, os.fstat(fd).st_size))
            else:
                os.pwrite(fd, replacement, off)
        yield
    finally:
        for off, replacement, *_ in damages:
            os.pwrite(fd, image[off:] if replacement is None else image[off : off + len(replacement)], off)
        os.ftruncate(fd, len(image))
        os.close(fd)
