"""Images made byte by byte, for what QEMU's tools do not write: odd entries, odd streams, damage."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence

COMPRESSED = 1 << 62
COPIED = 1 << 63
ZERO = 1

# Where the parts of a built image lie, in clusters.
REFCOUNT_TABLE, L1, L2, PAYLOAD = 1, 2, 3, 4


def data_entry(host_off: int) -> int:
    return COPIED | host_off


def compressed_entry(host_off: int, in_nbytes: int, cluster_bits: int) -> int:
    """The entry for a stream of in_nbytes at any host offset: the sectors that it touches, less one, are counted."""
    shift = 62 - (cluster_bits - 8)
    sectors = ((host_off & 511) + in_nbytes + 511) // 512
    return COMPRESSED | (sectors - 1) << shift | host_off


def build(
    entries: Sequence[int | tuple[int, int]],
    payload: bytes = b"",
    *,
    cluster_bits: int = 16,
    version: int = 3,
    extended: bool = False,
    zstd: bool = False,
    size: int | None = None,
    l1: Sequence[int] | None = None,
    backing: tuple[str, str | None] | None = None,
    extensions: bytes = b"",
) -> bytes:
    """An image with one L2 table.

    Args:
        entries: of the L2 table; (entry, bitmap) if extended. They may point into the payload, which starts at cluster PAYLOAD.
        size: of the disk; as many clusters as there are entries by default.
        l1: the L1 table, if not the one entry for the L2 table.
        backing: name and format of the backing file.
        extensions: header extensions as they stand in the file.
    """
    cluster_size = 1 << cluster_bits
    size = len(entries) * cluster_size if size is None else size
    l1 = [COPIED | L2 * cluster_size] if l1 is None else l1
    incompatible = (8 if zstd else 0) | (16 if extended else 0)
    if backing and backing[1] is not None:
        extensions += extension(0xE2792ACA, backing[1].encode())
    extensions += bytes(8)
    header_nbytes = 112 if version == 3 else 72
    name = backing[0].encode("utf-8", "surrogateescape") if backing else b""
    name_off = header_nbytes + len(extensions) if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        name_off,
        len(name),
        cluster_bits,
        size,
        0,
        len(l1),
        L1 * cluster_size,
        REFCOUNT_TABLE * cluster_size,
        1,
        0,
        0,
    )
    if version == 3:
        head += struct.pack(">QQQIIB7x", incompatible, 0, 0, 4, header_nbytes, int(zstd))
    table = b"".join(struct.pack(">QQ", *e) if isinstance(e, tuple) else struct.pack(">Q", e) for e in entries)
    parts = [head + extensions + name, b"", struct.pack(f">{len(l1)}Q", *l1), table]
    assert all(len(part) <= cluster_size for part in parts)
    return b"".join(part.ljust(cluster_size, b"\0") for part in parts) + payload


def patched(image: bytes, offset: int, replacement: bytes) -> bytes:
    return image[:offset] + replacement + image[offset + len(replacement) :]


def extension(magic: int, data: bytes, nbytes: int | None = None) -> bytes:
    """A header extension. nbytes: the length that it says it has."""
    return struct.pack(">II", magic, len(data) if nbytes is None else nbytes) + data.ljust(len(data) + 7 & ~7, b"\0")


def snapshot_entry(
    snapshot_id: bytes, name: bytes, *, l1_off: int, l1_entries: int = 1, extra: bytes, vm_state_size: int = 0
) -> bytes:
    """An entry of the snapshot table."""
    head = struct.pack(
        ">QIHHIIQII", l1_off, l1_entries, len(snapshot_id), len(name), 1_700_000_000, 5, 7_000_000_009, vm_state_size, len(extra)
    )
    made = head + extra + snapshot_id + name
    return made.ljust(len(made) + 7 & ~7, b"\0")


def deflate(data: bytes, *, window_bits: int = 12, level: int = 6) -> bytes:
    """A raw deflate stream; with QEMU's window by default."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, -window_bits)
    return encoder.compress(data) + encoder.flush()


def text(nbytes: int, seed: int = 0) -> bytes:
    """Compressible bytes that differ from place to place."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randint(2, 9)).hex().encode() for _ in range(200)]
    return b" ".join(rng.choices(words, k=nbytes // 4 + 1))[:nbytes]


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def mixed(nbytes: int, seed: int = 0) -> bytes:
    """Stretches of zeroes, text and noise of any length, with borders anywhere."""
    rng = random.Random(seed)
    made = b""
    while len(made) < nbytes:
        n = min(nbytes - len(made), rng.choice((100, 4096, 5000, 40_000, 65_536, 200_000)))
        made += rng.choice((lambda k, _: bytes(k), text, noise))(n, len(made))
    return made


def plain_and_compressed(clusters: int = 100, *, scattered: bool = False) -> tuple[bytes, bytes]:
    """An image of compressed and plain clusters, in the order of the disk or not, and its contents."""
    cluster_size, at = 65536, PAYLOAD * 65536
    order = list(range(clusters))
    if scattered:
        random.Random(3).shuffle(order)
    contents = b"".join((text, noise)[i % 3 == 0](cluster_size, i) for i in range(clusters))
    entries, payload = [0] * clusters, bytearray()
    for i in order:
        cluster = contents[i * cluster_size : (i + 1) * cluster_size]
        if i % 3 == 0:
            payload += bytes(-len(payload) % cluster_size)
            entries[i] = data_entry(at + len(payload))
            payload += cluster
        else:
            stream = deflate(cluster)
            entries[i] = compressed_entry(at + len(payload), len(stream), 16)
            payload += stream
    return build(entries, bytes(payload)), contents
