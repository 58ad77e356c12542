"""inflate, inflate_into, parse_l2 and build_info on their own."""

from __future__ import annotations

import ctypes
import ctypes.util
import random
import struct
import threading
import zlib
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import fastqcow
import streams
from fastqcow import Kind
from images import COPIED, ZERO, compressed_entry, data_entry, deflate, noise, text

CLUSTER = 65536


def test_build_info_names_the_engines() -> None:
    engines = fastqcow.build_info()
    assert engines.libz[0].isdigit()
    assert engines.libzstd[0].isdigit()
    assert all(each is None or each[0].isdigit() for each in (engines.libdeflate, engines.isal))
    assert engines.deflate == ("libdeflate" if engines.libdeflate else "libz")


@pytest.mark.parametrize("engine", [None, "libdeflate", "libz"])
def test_inflate_deflate(engine: Any) -> None:
    data = text(CLUSTER)
    assert fastqcow.inflate(deflate(data) + b"after", CLUSTER, engine=engine) == data


def test_inflate_zstd() -> None:
    data = text(CLUSTER)
    assert fastqcow.inflate(zstandard.compress(data) + bytes(100), CLUSTER, "zstd") == data


def test_inflate_into_takes_any_buffer_and_no_byte_more() -> None:
    data = text(5000)
    out = bytearray(b"\xaa" * 5020)
    assert fastqcow.inflate_into(memoryview(deflate(data)), memoryview(out)[10:5010]) == 5000
    assert out == b"\xaa" * 10 + data + b"\xaa" * 10
    with pytest.raises((BufferError, TypeError, ValueError)):
        fastqcow.inflate_into(deflate(data), bytes(5000))  # read-only


@pytest.mark.parametrize(
    ("data", "nbytes", "method", "reason"),
    [
        (b"\xff" * 100, CLUSTER, "zlib", "not a valid deflate stream"),
        (b"", CLUSTER, "zlib", "inflates to less"),
        (deflate(b"short"), CLUSTER, "zlib", "inflates to less"),
        (b"\xff" * 100, CLUSTER, "zstd", "not a valid zstd stream"),
        (b"", CLUSTER, "zstd", "inflates to less"),
        (zstandard.compress(b"short"), CLUSTER, "zstd", "inflates to less"),
        (zstandard.compress(b"long" * 99), 100, "zstd", "inflates to more"),
    ],
)
def test_inflate_says_what_is_wrong(data: bytes, nbytes: int, method: Any, reason: str) -> None:
    with pytest.raises(fastqcow.FormatError, match=reason):
        fastqcow.inflate(data, nbytes, method)


@pytest.mark.parametrize(
    "arguments", [(b"", -1), (b"", 1, "lzma"), (b"", 1 << 40)], ids=["negative", "method", "larger than a cluster can be"]
)
def test_inflate_refuses_bad_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="can be"):
        fastqcow.inflate(*arguments)


def verdict(stream: bytes, nbytes: int, engine: Any) -> bytes | str:
    """The bytes, or the reason that there are none."""
    try:
        return fastqcow.inflate(stream, nbytes, engine=engine)
    except fastqcow.FormatError as error:
        return str(error)


@settings(deadline=None, max_examples=500)
@given(
    data=st.one_of(st.binary(max_size=2000), st.text("ab \n", max_size=2000).map(str.encode)),
    level=st.sampled_from([0, 1, 6, 9]),
    strategy=st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED]),
    flush=st.sampled_from([zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH]),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    more=st.integers(-3, 3),
)
def test_engines_agree_on_damage(
    data: bytes, level: int, strategy: int, flush: int, damage: list[tuple[int, int]], more: int
) -> None:
    """libz is the control: whatever a stream is, the fastest engine gives the same bytes, or the same refusal."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, -15, 1, strategy)  # blocks are short with so little memory
    half = len(data) // 2
    stream = bytearray(encoder.compress(data[:half]) + encoder.flush(flush) + encoder.compress(data[half:]) + encoder.flush())
    nbytes = max(len(data) + more, 1)
    if not damage and more == 0 and data:
        assert fastqcow.inflate(bytes(stream), nbytes) == data
    for at, byte in damage:
        stream[at % len(stream)] = byte
    assert verdict(bytes(stream), nbytes, "libdeflate") == verdict(bytes(stream), nbytes, "libz")


def test_engines_agree_on_streams_that_are_cut() -> None:
    """Where zeroes would complete them: the word of this last literal ends with four, and the end mark is all zeroes."""
    for shift in range(16):
        data = b"\xf0" * shift + bytes(1)
        encoder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_FIXED)
        stream = encoder.compress(data) + encoder.flush()
        found = [verdict(stream[:end], len(data), "libdeflate") for end in range(len(stream) + 1)]
        assert found == [verdict(stream[:end], len(data), "libz") for end in range(len(stream) + 1)]
        assert found[-1] == data
        assert found[-3] != data


@pytest.mark.parametrize("engine", [None, "libdeflate", "libz"])
@pytest.mark.parametrize("name", streams.ODD)
def test_stream_that_libz_refuses_and_libdeflate_takes(name: str, engine: Any) -> None:
    with pytest.raises(fastqcow.FormatError, match="not a valid deflate stream"):
        fastqcow.inflate(streams.ODD[name], streams.NBYTES, engine=engine)


@pytest.mark.parametrize("engine", [None, "libdeflate", "libz"])
@pytest.mark.parametrize("name", streams.PLAIN)
def test_stream_that_differs_from_these_by_little(name: str, engine: Any) -> None:
    assert fastqcow.inflate(streams.PLAIN[name], streams.NBYTES, engine=engine) == streams.CONTENT


def test_streams_of_any_codes() -> None:
    """Good ones, and then each with some damage. libz is the control of what makes them, too."""
    rng = random.Random(3)
    for seed in range(600):
        stream, content = streams.some_stream(seed)
        assert zlib.decompress(stream, -15) == content
        assert fastqcow.inflate(stream, len(content)) == content, seed
        damaged = bytearray(stream)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(min(len(stream), rng.choice([100, len(stream)])))] ^= 1 << rng.randrange(8)
        assert verdict(bytes(damaged), len(content), "libdeflate") == verdict(bytes(damaged), len(content), "libz"), seed


def test_libdeflate_takes_these_streams() -> None:
    """Otherwise the tests above would say little. It is asked itself, apart from what is built into our modules."""
    if not (name := ctypes.util.find_library("deflate")):
        pytest.skip("this system has no shared library of libdeflate")
    library = ctypes.CDLL(name)
    library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
    state = ctypes.c_void_p(library.libdeflate_alloc_decompressor())
    out = ctypes.create_string_buffer(streams.NBYTES)
    for stream in (*streams.PLAIN.values(), *streams.ODD.values()):
        out_nbytes = ctypes.c_size_t(streams.NBYTES)
        assert library.libdeflate_deflate_decompress(state, stream, ctypes.c_size_t(len(stream)), out, out_nbytes, None) == 0
        assert out.raw == streams.CONTENT
    library.libdeflate_free_decompressor(state)


def test_threads_inflate_at_once() -> None:
    clusters = [text(CLUSTER, seed) for seed in range(8)]
    streams = [deflate(cluster) for cluster in clusters]
    found: dict[int, list[bytes]] = {}

    def work(i: int) -> None:
        found[i] = [fastqcow.inflate(streams[(i + k) % 8], CLUSTER) for k in range(40)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == [clusters[(i + k) % 8] for k in range(40)] for i in range(8))


def test_parse_standard_l2() -> None:
    entries = [0, ZERO, data_entry(0x50000), data_entry(0x60000) | ZERO, compressed_entry(0x12345, 3000, 16), data_entry(0x200)]
    table = fastqcow.parse_l2(struct.pack(">6Q", *entries), cluster_bits=16)
    assert list(table.kind[:5]) == [Kind.UNALLOCATED, Kind.ZERO, Kind.DATA, Kind.ZERO_ALLOC, Kind.COMPRESSED]
    assert table.kind[5] > Kind.INVALID
    assert "not aligned" in table.why_invalid(table.kind[5])
    assert list(table.host_off) == [0, 0, 0x50000, 0x60000, 0x12345, 0x200]
    # The length goes to the end of the last of the sectors that the stream touches.
    assert list(table.in_nbytes) == [0, 0, 0, 0, 0x12345 // 512 * 512 + 6 * 512 + 512 - 0x12345, 0]


def test_parse_extended_l2() -> None:
    table = fastqcow.parse_l2(struct.pack(">QQ", data_entry(0x50000), 1 << 33 | 1), cluster_bits=16, extended=True)
    assert list(table.kind) == [Kind.DATA, Kind.ZERO_ALLOC] + [Kind.UNALLOCATED_ALLOC] * 30
    assert list(table.host_off) == [0x50000] * 32
    both = fastqcow.parse_l2(struct.pack(">QQ", data_entry(0x50000), 1 << 32 | 1), cluster_bits=16, extended=True)
    assert "both allocated and zero" in both.why_invalid(both.kind[0])


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_parse_compressed_entries_of_each_cluster_size(cluster_bits: int) -> None:
    nbytes = min(1 << cluster_bits, 70_000)
    table = fastqcow.parse_l2(struct.pack(">Q", compressed_entry(0x1_2345_6789, nbytes, cluster_bits)), cluster_bits=cluster_bits)
    assert table.host_off[0] == 0x1_2345_6789
    assert nbytes <= table.in_nbytes[0] < nbytes + 512


def test_parse_nothing() -> None:
    assert fastqcow.parse_l2(b"", cluster_bits=9) == fastqcow.L2Table(
        *[type(c)(c.typecode) for c in fastqcow.parse_l2(b"", cluster_bits=9)]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_bits": 8},
        {"cluster_bits": 22},
        {"cluster_bits": 13, "extended": True},
        {"cluster_bits": 16, "version": 4},
        {"cluster_bits": 16, "version": 2, "extended": True},
    ],
)
def test_parse_refuses_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"can be|version"):
        fastqcow.parse_l2(bytes(16), **options)


def test_parse_refuses_half_an_entry() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        fastqcow.parse_l2(bytes(24), cluster_bits=16, extended=True)


def test_version_2_has_no_zero_flag() -> None:
    table = fastqcow.parse_l2(struct.pack(">Q", COPIED | ZERO), cluster_bits=16, version=2)
    assert "version 2" in table.why_invalid(table.kind[0])


def test_noise_is_stored_as_it_is() -> None:
    data = noise(CLUSTER)
    encoder = zlib.compressobj(0, zlib.DEFLATED, -12)
    assert fastqcow.inflate(encoder.compress(data) + encoder.flush(), CLUSTER) == data
