"""What an image is made of."""

from __future__ import annotations

import io

import pytest

import fastqcow
from fastqcow import makeup
from fastqcow.makeup import MakeUp, make_up
from images import COPIED, PAYLOAD, ZERO, build, compressed_entry, data_entry, deflate, noise, text

CLUSTER = 65536
STREAMS = [deflate(text(CLUSTER, seed)) for seed in range(3)]


def mixed_image(clusters: int = 40) -> bytes:
    """Three compressed clusters side by side, one plain, one zero, and one whose entry makes no sense; the rest is unallocated."""
    at, entries = PAYLOAD * CLUSTER, []
    for stream in STREAMS:
        entries.append(compressed_entry(at, len(stream), 16))
        at += len(stream)
    plain_off = -(-at // CLUSTER) * CLUSTER
    entries += [data_entry(plain_off), ZERO]
    packed = b"".join(STREAMS).ljust(plain_off - PAYLOAD * CLUSTER, b"\0")
    return build(entries + [0] * (clusters - len(entries)), packed + noise(CLUSTER))


def made_up(image: bytes) -> MakeUp:
    return make_up(fastqcow.open(io.BytesIO(image)))


def test_make_up() -> None:
    found = made_up(mixed_image())
    assert found.units == {"compressed": 3, "plain": 1, "zero": 1, "unallocated": 35, "invalid": 0}
    assert (found.virtual_size, found.cluster_size, found.unit_size) == (40 * CLUSTER, CLUSTER, CLUSTER)
    last_sectors_end = -(-(PAYLOAD * CLUSTER + sum(map(len, STREAMS))) // 512) * 512
    assert found.compressed_nbytes == last_sectors_end - PAYLOAD * CLUSTER
    assert found.compressed_clusters == 3
    assert found.ratio == 3 * CLUSTER / found.compressed_nbytes
    ends = [len(STREAMS[0]), len(STREAMS[1]), found.compressed_nbytes - len(STREAMS[0]) - len(STREAMS[1])]
    expected = [0] * 33
    for nbytes in ends:
        expected[(nbytes * 32 - 1) // CLUSTER] += 1
    assert found.compressed_sizes == tuple(expected)
    assert found.amplification == {4096: 16.0, 65536: 1.0, 1 << 20: 1.0}
    assert found.cells[:6] == ((1, 0, 0, 0),) * 3 + ((0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0))
    assert (len(found.cells), found.looked_at) == (40, 1.0)


def test_make_up_of_subclusters() -> None:
    stream = STREAMS[0]
    plain = PAYLOAD * CLUSTER
    entries = [(data_entry(plain), 0b11 | 1 << 34), (compressed_entry(plain + CLUSTER, len(stream), 16), 0), (0, 0)]
    found = made_up(build(entries, noise(CLUSTER) + stream, extended=True))
    assert found.units == {"compressed": 32, "plain": 2, "zero": 1, "unallocated": 29 + 32, "invalid": 0}
    assert (found.unit_size, found.compressed_clusters) == (2048, 1)


def test_make_up_of_a_disk_that_ends_within_a_table_and_a_cluster() -> None:
    entries = [data_entry(PAYLOAD * CLUSTER)] * 3
    assert made_up(build(entries, noise(CLUSTER), size=CLUSTER + 512)).units["plain"] == 2


def test_make_up_of_nothing() -> None:
    found = made_up(build([], size=0, l1=[]))
    assert set(found.units.values()) == {0}
    assert (found.ratio, found.cells, found.amplification) == (None, (), {})


def test_damage_is_counted() -> None:
    """An entry that is not aligned, a table beyond the end of the file, and one that is not aligned."""
    assert made_up(build([COPIED | PAYLOAD * CLUSTER | 512, 0])).units["invalid"] == 1
    assert made_up(build([0] * 4, l1=[COPIED | 1 << 40])).units["invalid"] == 4
    assert made_up(build([0] * 4, l1=[COPIED | 2 * CLUSTER + 512])).units["invalid"] == 4


def test_many_tables_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 64 entries the same: so a part of them says as much."""
    monkeypatch.setattr(makeup, "TABLE_NBYTES_MAX", 2048)
    tables = 16
    l1 = [COPIED | makeup_l2_off(i) for i in range(tables)]
    image = build([], cluster_bits=9, size=tables * 64 * 512, l1=l1)
    image = image.ljust(makeup_l2_off(0), b"\0") + (data_entry(512).to_bytes(8, "big") * 64) * tables
    found = made_up(image)
    assert found.looked_at == 0.25
    assert found.units["plain"] == tables * 64
    assert {sum(shares) for shares in found.cells} <= {0, 1}


def makeup_l2_off(number: int) -> int:
    return (8 + number) * 512
