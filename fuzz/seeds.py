"""Seeds for the fuzz targets, made by QEMU's tools and by tests/images.py: python seeds.py TARGET FOLDER

Small ones: images have the smallest clusters that there are, but for those with extended L2 entries.
"""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import streams
from images import (
    COPIED,
    L1,
    L2,
    PAYLOAD,
    ZERO,
    build,
    compressed_entry,
    data_entry,
    deflate,
    extension,
    noise,
    patched,
    snapshot_entry,
    text,
)

BITS = 9
CLUSTER = 1 << BITS
AT = PAYLOAD * CLUSTER
LARGE_NBYTES = 20_000
CRYPTO, BITMAPS, FEATURES, DATA_FILE = 0x0537BE77, 0x23852875, 0x6803F857, 0x44415441


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def made_by_qemu() -> Iterator[bytes]:
    """Images of each version, codec and kind of cluster; with snapshots, bitmaps, backing and data files."""
    if not (shutil.which("qemu-img") and shutil.which("qemu-io")):
        print("seeds: without those of QEMU's tools, which are not installed", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, base = folder / "disk.qcow2", folder / "base.raw"
        base.write_bytes(text(4000) + noise(500))
        for options in (
            "compat=0.10,cluster_size=512",
            "cluster_size=512",
            "cluster_size=1k,compression_type=zstd,refcount_bits=2",
            "cluster_size=512,refcount_bits=64,lazy_refcounts=on",
            "cluster_size=16k,extended_l2=on",
        ):
            for backing in ((), ("-b", base, "-F", "raw")):
                run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, "24k")
                commands = ["write -P 7 1k 3k", "write -z 5k 1k"]
                commands += ["write -c -P 9 16k 1k"] if "extended" not in options else ["write -P 5 17k 1k"]
                run("qemu-io", *itertools.chain.from_iterable(("-c", command) for command in commands), path)
                run("qemu-img", "snapshot", "-c", "first", path)
                run("qemu-io", "-c", "write -P 8 2k 700", path)
                yield path.read_bytes()
                if "0.10" not in options:
                    run("qemu-img", "bitmap", "--add", "-g", "512", path, "marks")
                    run("qemu-io", "-c", "write -P 3 9k 1k", path)
                    yield path.read_bytes()
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size=512,data_file={folder / 'data'}", path, "8k")
        run("qemu-io", "-c", "write -P 7 1k 3k", path)
        yield path.read_bytes()


def made_by_hand() -> Iterator[bytes]:
    """What QEMU's tools do not make: odd entries, one table over another, damage."""
    plain, words = noise(CLUSTER), text(CLUSTER)
    stream, frame = deflate(words), zstandard.compress(words)
    one, packed = data_entry(AT), compressed_entry(AT, len(stream), BITS)
    yield build(
        [one, 0, ZERO, one | ZERO, COPIED, data_entry(AT + CLUSTER), data_entry(AT + 99 * CLUSTER)], plain * 2, cluster_bits=BITS
    )
    yield build([one, data_entry(AT + 8), ZERO], plain, cluster_bits=BITS, version=2)
    yield build([packed, packed, 0, packed | COPIED, compressed_entry(0, 900, BITS)], stream + bytes(99), cluster_bits=BITS)
    yield build([compressed_entry(AT, len(frame), BITS), one], frame + bytes(600), cluster_bits=BITS, zstd=True)
    yield build([one] * 64, plain, cluster_bits=BITS, l1=[COPIED | L2 * CLUSTER] * 9, size=500 * CLUSTER)
    yield build([one] * 9, plain, cluster_bits=BITS, l1=[COPIED | L1 * CLUSTER, 0, COPIED | L2 * CLUSTER + 8], size=99 * CLUSTER)
    yield build([], cluster_bits=BITS, l1=[0] * 64, size=(1 << 63) - 512)
    yield build([], cluster_bits=BITS, size=0)
    yield build([one] * 4, plain, cluster_bits=BITS)[:-300]
    for knobs in (1, 0x15, 0x2A6, 0x1787, 0x62E5, 0xF7E9, 0x1F_F3A5, 0x03AA_BFFF, 0x0700_0002):
        yield patched(
            build([one, packed, ZERO, 0, one], plain + stream + bytes(99), cluster_bits=BITS), 80, struct.pack(">Q", knobs)
        )


def in_pieces(image: bytes, plan: int = 0) -> bytes:
    """An image as fuzz/image.h has it in few bytes: the fields of its header, and its clusters without the zeroes at their ends."""
    cluster_bits, size = struct.unpack_from(">IQ", image, 20)
    l1_entries, l1_off, table_off, table_clusters = struct.unpack_from(">IQQI", image, 36)
    incompatible, flags = image[79] if image[7] == 3 else 0, 16 | (image[7] == 2)
    flags |= (2 if incompatible & 16 else 0) | (4 if incompatible & 4 else 0) | (8 if image[7] == 3 and incompatible & 8 else 0)
    made: bytes = struct.pack(">BBQI", flags, cluster_bits, size, l1_off) + l1_entries.to_bytes(3, "big")
    made += struct.pack(">IHBII", table_off, table_clusters, 4, l1_off, plan)
    for at in range(0, len(image), 1 << cluster_bits):
        piece = image[at : at + (1 << cluster_bits)].rstrip(b"\0") if at else b""
        assert len(piece) < 0x1000
        made += (bytes([len(piece)]) if len(piece) < 0xF0 else struct.pack(">H", 0xF000 | len(piece))) + piece
    return made


def of_large_clusters() -> Iterator[bytes]:
    """Of 16 to 64 KiB: extended entries, and streams that are worth to be inflated ahead."""
    for bits in (14, 16):
        at, few = PAYLOAD << bits, text(900)
        bitmaps = [0, 1, 1 << 32, 0xFF0000FF, 0xFFFF0000_0000FFFF, 1 | 1 << 32, (1 << 32) - 1]
        extended = [(data_entry(at), bitmap) for bitmap in bitmaps] + [(0, 1 << 33), (0, 5)]
        plain = (few * (1 + (1 << bits) // len(few)))[: 1 << bits]
        streams = [deflate(plain), deflate(bytes(1 << bits)), zstandard.compress(plain)]
        packed = [compressed_entry(at, len(streams[0]), bits), compressed_entry(at + len(streams[0]), len(streams[1]), bits)]
        for plan in (0, 0x39, 0x0043_007B, 0x0033_8078, 0x0021_6079, 0x00F1_64B9, 0x08F1_64B9):
            yield in_pieces(build(extended, few, cluster_bits=bits, extended=True), plan)
            yield in_pieces(build(packed * 8 + [0, ZERO, *packed], b"".join(streams[:2]) + bytes(512), cluster_bits=bits), plan)
            entry = compressed_entry(at, len(streams[2]), bits)
            yield in_pieces(build([entry] * 9, streams[2] + bytes(512), cluster_bits=bits, zstd=True), plan)


def with_extensions() -> Iterator[bytes]:
    """Headers with everything in them, snapshot tables and bitmap directories, as the Python floor reads them."""
    feature = bytes([0, 63]) + b"a feature of tomorrow".ljust(46, b"\0")
    yield build([0], cluster_bits=BITS, extensions=extension(FEATURES, feature * 2) + extension(0x12345678, b"unknown"))
    yield build([0], cluster_bits=BITS, backing=("a/base.qcow2", "qcow2"))
    yield build([0], cluster_bits=BITS, backing=("json:{}", None))
    yield patched(build([0], cluster_bits=BITS, extensions=extension(DATA_FILE, b"data.raw")), 72, struct.pack(">Q", 4))
    entries = b"".join(
        snapshot_entry(str(i).encode(), b"snapshot", l1_off=L1 * CLUSTER, extra=struct.pack(">QQQ", 0, CLUSTER, 5)[: 8 * i])
        for i in range(4)
    )
    with_table = patched(build([0], entries, cluster_bits=BITS), 60, struct.pack(">IQ", 4, AT))
    yield with_table
    yield patched(with_table, 4, struct.pack(">I", 2))
    directory = b"".join(struct.pack(">QIIBBHI", AT + CLUSTER, 1, i, 1, 9, 4, 0) + f"map{i}".encode() + bytes(4) for i in range(2))
    table = struct.pack(">Q", AT + 2 * CLUSTER)
    pointer = extension(BITMAPS, struct.pack(">IIQQ", 2, 0, len(directory), AT))
    payload = directory.ljust(CLUSTER, b"\0") + table.ljust(CLUSTER, b"\0") + noise(CLUSTER)
    yield patched(build([0] * 9, payload, cluster_bits=BITS, extensions=pointer), 88, struct.pack(">Q", 1))
    for cipher, mode, key_nbytes in (("aes", "xts-plain64", 64), ("aes", "cbc-essiv:sha256", 32), ("twofish", "ctr-plain", 16)):
        slots = struct.pack(">II32sII", 0x00AC71F3, 1, bytes(32), 8, 4000)
        slots += b"".join(struct.pack(">II32sII", 0xDEAD, 0, bytes(32), 8 + i * 512, 4000) for i in range(1, 8))
        words = (b"LUKS\xba\xbe", 1, cipher.encode(), mode.encode(), b"sha256", 9000, key_nbytes, bytes(20), bytes(32), 1, b"uuid")
        luks = struct.pack(">6sH32s32s32sII20s32sI40s", *words) + slots
        pointer = extension(CRYPTO, struct.pack(">QQ", AT, 9000 * 512))
        yield patched(build([0], luks, cluster_bits=BITS, extensions=pointer), 32, struct.pack(">I", 2))


def images() -> Iterator[bytes]:
    yield from made_by_hand()
    yield from of_large_clusters()
    yield from (image for image in made_by_qemu() if len(image) < LARGE_NBYTES)  # a larger one would be cut


def streams_of_libz() -> Iterator[bytes]:
    for nbytes, level, strategy, window_bits in itertools.product((1, 100, 512, 4096), (0, 1, 6, 9), (0, 2, 3, 4), (9, 12, 15)):
        for data in (text(nbytes), noise(nbytes), bytes(nbytes)):
            encoder = zlib.compressobj(level, zlib.DEFLATED, -window_bits, 9, strategy)
            stream = encoder.compress(data[: nbytes // 2]) + encoder.flush(zlib.Z_FULL_FLUSH if level == 9 else zlib.Z_NO_FLUSH)
            stream += encoder.compress(data[nbytes // 2 :]) + encoder.flush()
            yield struct.pack(">H", nbytes - 1) + stream
    for stream in (*streams.PLAIN.values(), *streams.ODD.values()):
        yield struct.pack(">H", streams.NBYTES - 1) + stream
    for seed in range(200):
        stream, content = streams.some_stream(seed)
        yield struct.pack(">H", len(content) - 1) + stream


def streams_of_libzstd() -> Iterator[bytes]:
    for nbytes, level, checksum, size in itertools.product((1, 100, 4096), (-3, 1, 19), (False, True), (False, True)):
        for data in (text(nbytes), noise(nbytes), bytes(nbytes)):
            encoder = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
            if size:
                yield b"\0" + struct.pack(">H", nbytes - 1) + encoder.compress(data)
            else:
                streaming = encoder.compressobj()
                half = streaming.compress(data[: nbytes // 2]) + streaming.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
                yield b"\0" + struct.pack(">H", nbytes - 1) + half + streaming.compress(data[nbytes // 2 :]) + streaming.flush()
    rng = random.Random(4)
    for what in range(128, 256):
        yield bytes([what]) + struct.pack(">H", rng.randrange(4000)) + rng.randbytes(rng.randrange(10, 200))


def tables() -> Iterator[bytes]:
    rng = random.Random(2)
    for bits, flags in itertools.product((0, 5, 7), range(8)):
        n = rng.randrange(2, 30)
        entries = [
            rng.choice((0, ZERO, COPIED | i << bits + 9, i << bits + 9, COPIED | i << bits + 9 | ZERO, rng.getrandbits(64)))
            for i in range(n)
        ]
        yield bytes([flags, bits, 1]) + struct.pack(f">I{n}Q", rng.randrange(2) * rng.randrange(2000), *entries)


def sectors() -> Iterator[bytes]:
    for mode, vectors, block, sector in itertools.product(range(4), range(3), range(2), (0, 1, (1 << 32) - 1, 1 << 54)):
        yield bytes([mode, vectors, block, (1, 7, 252, 255)[mode]]) + struct.pack(">QB", sector, 0) + b"contents"


def disks() -> Iterator[bytes]:
    """See write.c: options, and then pieces of a disk."""
    rng = random.Random(3)
    for encoding, bits, flags in itertools.product(range(4), (0, 3, 7), (0, 1, 2, 4, 6)):
        pieces = b"".join(
            bytes([rng.randrange(8), rng.randrange(20), rng.randrange(256)]) + rng.randbytes(rng.randrange(8)) for _ in range(9)
        )
        yield bytes([encoding, bits, flags, rng.randrange(8), rng.randrange(256), rng.randrange(256)]) + pieces


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "image": images,
    "check": images,
    "l2": tables,
    "deflate": streams_of_libz,
    "zstd": streams_of_libzstd,
    "crypt": sectors,
    "write": disks,
    "python": lambda: itertools.chain(with_extensions(), images()),
}

if __name__ == "__main__":
    target, folder = sys.argv[1], Path(sys.argv[2])
    for i, seed in enumerate(SEEDS[target]()):
        (folder / f"seed-{i:03}").write_bytes(seed)
