"""Odd and damaged streams: fastqcow reads what QEMU reads, and refuses what QEMU refuses.

Where fastqcow differs on purpose, the case says why. QEMU takes the bytes that a truncated file has lost for zeroes: then it
gives them out, or takes them for a part of the compressed stream.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard

import fastqcow
import streams
from cases import TRUNCATED, Case, check
from conftest import Qemu
from images import (
    PAYLOAD,
    build,
    compressed_entry,
    data_entry,
    deflate,
    noise,
    patched,
    text,
)

CLUSTER = 1 << 16
AT = PAYLOAD * CLUSTER
TEXT = text(CLUSTER)


def one_stream(
    stream: bytes, *, at: int = AT, sectors_of: int | None = None, zstd: bool = False, after: bytes | None = None
) -> bytes:
    """An image of one compressed cluster. sectors_of: the length that the entry speaks of; after: what follows the stream."""
    entry = compressed_entry(at, len(stream) if sectors_of is None else sectors_of, 16)
    after = bytes(1024) if after is None else after
    return build([entry], bytes(at - AT) + stream + after, zstd=zstd)


def unfinished(data: bytes) -> bytes:
    """A deflate stream without its end mark."""
    encoder = zlib.compressobj(6, zlib.DEFLATED, -12)
    return encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH)


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def streamed_frame(data: bytes, **options: Any) -> bytes:
    """A frame that does not say how long its contents are."""
    encoder = zstandard.ZstdCompressor(write_content_size=False, **options).compressobj()
    return encoder.compress(data) + encoder.flush()


SKIPPABLE = struct.pack("<II", 0x184D2A53, 7) + b"skip me"
far = noise(300) + bytes(20_000)
FAR = (far * 4)[:CLUSTER]
# Within a stored block of length 0 the complement is wrong: invalid wherever it is met.
BAD_BLOCK = b"\x01\x00\x00\x00\x00"

DEFLATE = {
    "as QEMU writes it": Case(one_stream(deflate(TEXT)), TEXT),
    "odd offset: bit 0 of the entry set": Case(one_stream(deflate(TEXT), at=AT + 1), TEXT),
    "odd offset in the middle of a sector": Case(one_stream(deflate(TEXT), at=AT + 777), TEXT),
    "sectors run past the end of the file": Case(one_stream(deflate(TEXT), sectors_of=60_000, after=b""), TEXT),
    "bytes after the stream's end": Case(one_stream(deflate(TEXT), sectors_of=60_000, after=noise(30_000)), TEXT),
    "no end mark, but the cluster is full": Case(one_stream(unfinished(TEXT) + deflate(b"more")), TEXT),
    "no end mark, and zeroes after it": Case(one_stream(unfinished(TEXT)), None),
    "no end mark, and no bytes after it": Case(
        one_stream(unfinished(TEXT), after=b""),
        TEXT,
        "all of the cluster is there; QEMU adds zeroes to the stream, which make it invalid",
    ),
    "goes on past the cluster": Case(one_stream(deflate(TEXT + b"more" * 99)), TEXT),
    "goes on past the cluster with a match": Case(one_stream(deflate(b"a" * (CLUSTER + 5000))), b"a" * CLUSTER),
    "goes on past the cluster into damage": Case(one_stream(deflate(TEXT + noise(8000))[:-9] + noise(9)), TEXT),
    "an invalid block after a full cluster": Case(one_stream(unfinished(TEXT) + BAD_BLOCK), None),
    "a byte short": Case(one_stream(deflate(TEXT[:-1])), None),
    "a byte short, then another stream": Case(one_stream(deflate(TEXT[:-1]) + deflate(b"x")), None),
    "empty stream": Case(one_stream(deflate(b"")), None),
    "distances beyond 4 KiB": Case(one_stream(deflate(FAR, window_bits=15)), FAR),
    "distance before the start of the cluster": Case(one_stream(deflate(b"abc" * 99)[:2] + b"\xff" * 40), None),
    "stored blocks": Case(one_stream(deflate(noise(CLUSTER), level=0), sectors_of=CLUSTER + 400), noise(CLUSTER)),
    "damaged in the middle": Case(one_stream(patched(deflate(TEXT), 5000, b"\xff" * 64)), None),
    "zeroes": Case(one_stream(bytes(3000)), None),
    "cut by the end of the file": Case(one_stream(deflate(TEXT)[:-2000], sectors_of=60_000, after=b""), None, TRUNCATED),
    "starts beyond the end of the file": Case(build([compressed_entry(AT + CLUSTER, 3000, 16)]), None),
    "starts beyond any file": Case(build([compressed_entry((1 << 54) - 512, 512, 16)]), None),
    **{name: Case(one_stream(stream), streams.CONTENT) for name, stream in streams.PLAIN.items()},
    **{name: Case(one_stream(stream), None) for name, stream in streams.ODD.items()},
}
ZSTD = {
    "as QEMU writes it": Case(one_stream(frame(TEXT), zstd=True), TEXT),
    "without a content size": Case(one_stream(streamed_frame(TEXT), zstd=True), TEXT),
    "with a checksum": Case(one_stream(frame(TEXT, write_checksum=True), zstd=True), TEXT),
    "with a wrong checksum": Case(one_stream(frame(TEXT, write_checksum=True)[:-4] + b"oops", zstd=True), None),
    "odd offset": Case(one_stream(frame(TEXT), at=AT + 33, zstd=True), TEXT),
    "sectors run past the end of the file": Case(one_stream(frame(TEXT), sectors_of=60_000, after=b"", zstd=True), TEXT),
    "bytes after the frame": Case(one_stream(frame(TEXT), sectors_of=60_000, after=noise(30_000), zstd=True), TEXT),
    "several frames": Case(one_stream(frame(TEXT[:999]) + frame(TEXT[999:50_000]) + frame(TEXT[50_000:]), zstd=True), TEXT),
    "several frames without a content size": Case(
        one_stream(streamed_frame(TEXT[:999]) + streamed_frame(TEXT[999:]), zstd=True), TEXT
    ),
    "an empty frame between": Case(one_stream(frame(TEXT[:999]) + frame(b"") + frame(TEXT[999:]), zstd=True), TEXT),
    "a skippable frame before": Case(one_stream(SKIPPABLE + frame(TEXT), zstd=True), TEXT),
    "a skippable frame between": Case(one_stream(frame(TEXT[:999]) + SKIPPABLE + frame(TEXT[999:]), zstd=True), TEXT),
    "a frame longer than the cluster": Case(one_stream(frame(TEXT + b"more"), zstd=True), None),
    "a frame longer than the cluster, without a content size": Case(one_stream(streamed_frame(TEXT + b"more"), zstd=True), None),
    "a second frame longer than what is left": Case(one_stream(frame(TEXT[:999]) + frame(TEXT[990:]), zstd=True), None),
    "a frame shorter than the cluster": Case(one_stream(frame(TEXT[:-1]), zstd=True), None),
    "a frame shorter than the cluster at its sectors' end": Case(one_stream(frame(TEXT[:-1]), after=b"", zstd=True), None),
    "nothing but skippable frames": Case(one_stream(SKIPPABLE * 40, sectors_of=600, after=b"", zstd=True), None),
    "damaged in the middle": Case(one_stream(patched(frame(TEXT), 5000, b"\xff" * 64), zstd=True), None),
    "zeroes": Case(one_stream(bytes(3000), zstd=True), None),
    "deflate in a zstd image": Case(one_stream(deflate(TEXT), zstd=True), None),
    "starts beyond the end of the file": Case(build([compressed_entry(AT + CLUSTER, 3000, 16)], zstd=True), None),
}
PLAIN = noise(CLUSTER)


@pytest.mark.parametrize("engine", ["libdeflate", "libz"])
@pytest.mark.parametrize("name", DEFLATE)
def test_deflate(qemu: Qemu, tmp_path: Path, name: str, engine: str) -> None:
    check(qemu, tmp_path, DEFLATE[name], engine)


@pytest.mark.parametrize("name", ZSTD)
def test_zstd(qemu: Qemu, tmp_path: Path, name: str) -> None:
    check(qemu, tmp_path, ZSTD[name])


def test_zstd_window_larger_than_qemu_takes(qemu: Qemu, tmp_path: Path) -> None:
    """Frames that say how long they are need no window; others may ask for 128 MiB and no more. Neither makes us allocate it."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    encoder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stream = encoder.compress(TEXT) + encoder.flush()
    assert stream[5] >> 3 == 28 - 10
    check(qemu, tmp_path, Case(one_stream(stream, zstd=True), None))
    check(qemu, tmp_path, Case(one_stream(patched(stream, 5, bytes([17 << 3])), zstd=True), TEXT))


def test_damage_beside_what_is_asked_for_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build([data_entry(AT), data_entry(AT + 512), data_entry(AT)], PLAIN))
    with fastqcow.open(path) as image:
        assert image.pread(CLUSTER, 0) == PLAIN
        assert image.pread(CLUSTER, 2 * CLUSTER) == PLAIN
        with pytest.raises(fastqcow.FormatError) as caught:
            image.pread(3 * CLUSTER, 0)
    assert (caught.value.guest_off, caught.value.value) == (CLUSTER, data_entry(AT + 512))
