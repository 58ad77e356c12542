"""Deflate streams put together bit by bit (RFC 1951): such as libdeflate takes, and libz and QEMU refuse.

No encoder writes these. What they are made of stands at the head of csrc/deflate.c.
"""

from __future__ import annotations

NBYTES = 1 << 16
CONTENT = b"a" * NBYTES  # what libdeflate makes of each

LITERAL, END, LENGTH_3, LENGTH_258 = ord("a"), 256, 257, 285
ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
Code = dict[int, int]  # symbol: bits of its word


def number(value: int, nbits: int) -> str:
    return f"{value:0{nbits}b}"[::-1] if nbits else ""


def words(code: Code) -> dict[int, str]:
    found, word, before = {}, 0, 0
    for nbits, symbol in sorted((nbits, symbol) for symbol, nbits in code.items()):
        word <<= nbits - before
        found[symbol] = f"{word:0{nbits}b}"
        word, before = word + 1, nbits
    return found


FIXED: Code = {symbol: 8 if symbol < 144 or symbol > 279 else 9 if symbol < 256 else 7 for symbol in range(288)}
FIXED_DISTANCES: Code = dict.fromkeys(range(32), 5)
FOUR: Code = dict.fromkeys((LITERAL, END, LENGTH_3, LENGTH_258), 2)
TWO: Code = {0: 1, 1: 1}


def dynamic(lengths: Code, distances: Code, *, length_codes: int = 286, distance_codes: int = 30, too_far: int = 0) -> str:
    """The head of a block, with that many lengths of codes, of which the last ones are repeated too far."""
    of_precodes = {**dict.fromkeys(range(15), 4), 17: 5, 18: 5}
    precode = words(of_precodes)
    of_all = [lengths.get(i, 0) for i in range(length_codes)] + [distances.get(i, 0) for i in range(distance_codes)]
    last = distance_codes - 1 - max(distances, default=0) if too_far else 0
    made = "01" + number(length_codes - 257, 5) + number(distance_codes - 1, 5) + number(15, 4)
    made += "".join(number(of_precodes.get(symbol, 0), 3) for symbol in ORDER)
    made += "".join(precode[nbits] for nbits in of_all[: len(of_all) - last])
    return made + (precode[18] + number(last + too_far - 11, 7) if too_far else "")


def block(head: str, lengths: Code, distance: str, odd: str = "", odd_nbytes: int = 0) -> str:
    """A block of the content: matches at the distance 1, which that word stands for. Half way the odd bits, of so many bytes."""
    word = words(lengths)
    made, left = head + word[LITERAL], NBYTES - 1 - odd_nbytes
    for part in (left // 2, left - left // 2):
        made += (word[LENGTH_258] + distance) * (part // 258) + word[LITERAL] * (part % 258) + odd
        odd = ""
    return made + word[END]


def packed(bits: str) -> bytes:
    return bytes(int(bits[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(bits), 8))


def _odd_blocks() -> dict[str, str]:
    fixed, far = words(FIXED), words(FIXED_DISTANCES)
    plain = words(TWO)[0]
    odd = {f"the length symbol {symbol}": block("10", FIXED, far[0], fixed[symbol] + far[0], 258) for symbol in (286, 287)}
    for symbol in (30, 31):
        odd[f"the distance symbol {symbol}"] = block("10", FIXED, far[0], fixed[LENGTH_3] + far[symbol] + "0" * 13, 3)
    odd["codes for 287 lengths"] = block(dynamic(FOUR, TWO, length_codes=287), FOUR, plain)
    odd["codes for 31 distances"] = block(dynamic(FOUR, TWO, distance_codes=31), FOUR, plain)
    odd["lengths of codes repeated past the last"] = block(dynamic(FOUR, TWO, too_far=1), FOUR, plain)
    length_3 = words(FOUR)[LENGTH_3]
    odd["a bit that is no code of a distance"] = block(dynamic(FOUR, {0: 1}), FOUR, "0", length_3 + "1", 3)
    odd["a distance where there is no code of any"] = block(dynamic(FOUR, {}), FOUR, "0")
    return odd


PLAIN = {
    "fixed codes": packed("1" + block("10", FIXED, words(FIXED_DISTANCES)[0])),
    "dynamic codes": packed("1" + block(dynamic(FOUR, TWO), FOUR, "0")),
    "one code of a distance": packed("1" + block(dynamic(FOUR, {0: 1}), FOUR, "0")),
    "no codes of distances": packed("1" + dynamic({LITERAL: 1, END: 1}, {}) + "0" * NBYTES + "1"),
}
ODD_BLOCKS = _odd_blocks()
AN_EMPTY_BLOCK = "0" + "10" + words(FIXED)[END]
ODD = {
    **{name: packed("1" + odd) for name, odd in ODD_BLOCKS.items()},
    **{f"{name}, in a second block": packed(AN_EMPTY_BLOCK + "1" + odd) for name, odd in ODD_BLOCKS.items()},
}
