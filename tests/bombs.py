"""Images that cost their maker little and might cost a reader much."""

from __future__ import annotations

import struct

from images import deflate


class _Bits:
    """Written from the lowest bit up, as deflate and zstd have them."""

    def __init__(self) -> None:
        self.value = self.count = 0

    def put(self, *fields: tuple[int, int]) -> _Bits:
        for value, count in fields:
            self.value |= value << self.count
            self.count += count
        return self

    def bytes(self) -> bytes:
        return self.value.to_bytes(-(-self.count // 8), "little")


def _empty_dynamic_block() -> _Bits:
    """The shortest one: codes for the end of the block and one distance, and the code lengths' own code of two symbols."""
    lengths = {18: 1, 1: 1}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    return _Bits().put(
        (0b100, 3),
        (0, 5),
        (0, 5),
        (len(order) - 4, 4),
        *((lengths.get(symbol, 0), 3) for symbol in order),
        *((1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7)),  # no codes for the 256 literals
        *((0, 1), (0, 1), (0, 1)),  # a code for the end, one for a distance; and the end
    )


def slow_deflate(nbytes: int, out_nbytes: int, *, ends: bool = True) -> bytes:
    """Blocks with nothing in them, and one code after the other to be built: dynamic and fixed ones in turn. Then out_nbytes of
    zeroes where it `ends`."""
    pair = _empty_dynamic_block().put((0b010, 3), (0, 7))
    last = deflate(bytes(out_nbytes), window_bits=15) if ends else b""
    eight = _Bits().put(*[(pair.value, pair.count)] * 8).bytes()
    return eight * ((nbytes - len(last)) // len(eight)) + last


def _fse(log: int, probabilities: list[int]) -> bytes:
    """RFC 8878, 4.1.1."""
    bits, left = _Bits().put((log - 5, 4)), 1 << log
    for probability in probabilities:
        value, count = probability + 1, (left + 1).bit_length()
        low = (1 << count) - 1 - (left + 1)
        if value < low:
            bits.put((value, count - 1))
        else:
            bits.put((value if value < 1 << count - 1 else value + low, count))
        left -= probability
    return bits.bytes()


def slow_zstd(nbytes: int, out_nbytes: int) -> bytes:
    """A frame of blocks with one sequence each, and three tables of their own for it, of the largest size; then zeroes."""

    def block(kind: int, size: int, body: bytes = b"", last: int = 0) -> bytes:
        return struct.pack("<I", last | kind << 1 | size << 3)[:3] + body

    literal = b"\x08\0"
    tables = _fse(9, [1, 511]) + _fse(8, [255, 1]) + _fse(9, [511, 1])
    states = (((1 << 9 | 1) << 8 | 5) << 9 | 7).to_bytes(4, "little")
    body = literal + b"\x01\xa8" + tables + states
    one = block(2, len(body), body)
    each = 4  # bytes that a block makes: the literal, and a match of three
    head = struct.pack("<IBB", 0xFD2FB528, 0, 0x58) + block(0, 8, bytes(8))
    count = min((nbytes - 64 - out_nbytes // 8192) // len(one), (out_nbytes - 8) // each)
    left = out_nbytes - 8 - each * count
    zeroes = b"".join(block(1, min(left - at, 1 << 17), b"\0") for at in range(0, left, 1 << 17))
    return head + one * count + zeroes + block(0, 0, b"", 1)
