"""Where what `convert` writes lies in the image: streams, clusters, tables, refcounts, the header."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

import fastqcow
from creating import needs_isal, out, raw, streams, write
from images import noise, text

__all__ = ["out", "raw"]


@pytest.mark.parametrize("level", [1, 6, 9, pytest.param("fast", marks=needs_isal)])
def test_distances_stay_within_4_kib(tmp_path: Path, out: Path, level: Any) -> None:
    """Readers that inflate by streaming, with the window that QEMU writes with, see every distance that is too far: the bytes
    repeat themselves after 5,000, which an encoder with a larger window would find."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(5000) * 26 + text(131_072))
    write(raw, out, compression_level=level)

    def inflate_streaming(stream: bytes, window_bits: int) -> int:
        decoder, nbytes, left = zlib.decompressobj(-window_bits), 0, stream
        while not decoder.eof and left:
            nbytes += len(decoder.decompress(left, 256))
            left = decoder.unconsumed_tail
        return nbytes

    found = streams(out)
    assert len(found) >= 2
    assert [inflate_streaming(stream, 12) for stream in found] == [65536] * len(found)
    encoder = zlib.compressobj(6, zlib.DEFLATED, -15)
    far = encoder.compress(noise(5000) * 13) + encoder.flush()
    with pytest.raises(zlib.error, match="too far back"):
        inflate_streaming(far, 12)


def test_tables_lie_side_by_side_behind_the_data(raw: Path, out: Path) -> None:
    write(raw, out, cluster_size=512)
    data = out.read_bytes()
    with fastqcow.open(out) as image:
        head = image.header
    l2 = [
        int.from_bytes(data[head.l1_off + 8 * i :][:8], "big") & 0x00FF_FFFF_FFFF_FE00
        for i in range(head.l1_entries)
        if data[head.l1_off + 8 * i :][:8] != bytes(8)
    ]
    l1_end = head.l1_off + (head.l1_entries * 8 + 511 & ~511)
    assert l2 == list(range(l1_end, l1_end + 512 * len(l2), 512))
    assert head.refcount_table_off == l1_end + 512 * len(l2)
