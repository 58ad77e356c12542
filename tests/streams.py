"""Deflate streams put together bit by bit (RFC 1951): such as no encoder writes.

Some are taken by libdeflate, and refused by libz and QEMU; what these are made of stands in csrc/deflate.c. Others are good,
of any codes, so that every length of a word, and all that may follow it, is met at every place.
"""

from __future__ import annotations

import random

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


def head(precode: Code, length_codes: int, distance_codes: int) -> str:
    """The head of a block with dynamic codes, up to their lengths, which are told by the precode."""
    made = "01" + number(length_codes - 257, 5) + number(distance_codes - 1, 5) + number(15, 4)
    return made + "".join(number(precode.get(symbol, 0), 3) for symbol in ORDER)


def dynamic(lengths: Code, distances: Code, *, length_codes: int = 286, distance_codes: int = 30, too_far: int = 0) -> str:
    """The head of a block, with that many lengths of codes, of which the last ones are repeated too far."""
    of_precodes = {**dict.fromkeys(range(15), 4), 17: 5, 18: 5}
    precode = words(of_precodes)
    of_all = [lengths.get(i, 0) for i in range(length_codes)] + [distances.get(i, 0) for i in range(distance_codes)]
    last = distance_codes - 1 - max(distances, default=0) if too_far else 0
    made = head(of_precodes, length_codes, distance_codes)
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


def _numbered(start: int, bits_more: list[int]) -> list[tuple[int, int]]:
    """Of each symbol the least number that it stands for, and the bits that tell how much more it is."""
    found = []
    for nbits in bits_more:
        found.append((start, nbits))
        start += 1 << nbits
    return found


LENGTHS = [*_numbered(3, [0] * 4 + [k for k in range(6) for _ in range(4)]), (258, 0)]
DISTANCES = _numbered(1, [0, 0] + [k for k in range(14) for _ in range(2)])


def some_code(rng: random.Random, symbols: list[int], nbits_max: int, *, deep: float) -> Code:
    """A complete code of these symbols: a leaf is split until there is one for each; the deepest one, or any."""
    leaves = [0]
    while len(leaves) < len(symbols):
        open_leaves = [i for i, nbits in enumerate(leaves) if nbits < nbits_max]
        i = max(open_leaves, key=leaves.__getitem__) if rng.random() < deep else rng.choice(open_leaves)
        leaves[i] += 1
        leaves.append(leaves[i])
    rng.shuffle(leaves)
    return dict(zip(symbols, leaves, strict=True))


def some_head(rng: random.Random, lengths: Code, distances: Code) -> str:
    length_codes, distance_codes = max(lengths) + 1, max(distances, default=0) + 1
    left = [lengths.get(i, 0) for i in range(length_codes)] + [distances.get(i, 0) for i in range(distance_codes)]
    precode = some_code(rng, list(range(19)), 7, deep=rng.choice([0, 0.5]))
    word, made, before = words(precode), head(precode, length_codes, distance_codes), -1
    while left:
        run = next((i for i, nbits in enumerate(left) if nbits != left[0]), len(left))
        if rng.random() < 0.7 and left[0] == before and run >= 3:
            run = min(run, 6)
            made += word[16] + number(run - 3, 2)
        elif rng.random() < 0.7 and left[0] == 0 and run >= 3:
            run = min(run, 138)
            made += word[17] + number(run - 3, 3) if run < 11 else word[18] + number(run - 11, 7)
        else:
            run = 1
            made += word[left[0]]
        before = left[0]
        left = left[run:]
    return made


def some_symbols(rng: random.Random, lengths: Code, distances: Code, content: bytearray, symbols: int) -> str:
    """Up to so many literals and matches in these codes, by which the content grows. Long words come as often as others."""
    length, distance, made = words(lengths), words(distances), []
    literals = [symbol for symbol in lengths if symbol < END]
    matches = [symbol for symbol in lengths if END < symbol < 286]
    of_matches = rng.random()
    for _ in range(symbols):
        within = [symbol for symbol in distances if symbol < 30 and DISTANCES[symbol][0] <= len(content)]
        if matches and within and (rng.random() < of_matches or not literals):
            symbol, far = rng.choice(matches), rng.choice(within)
            least, nbits = LENGTHS[symbol - END - 1]
            more = rng.randrange(1 << nbits)
            nearest, far_nbits = DISTANCES[far]
            farther = rng.randrange(min(1 << far_nbits, len(content) - nearest + 1))
            if len(content) + least + more > NBYTES:
                break
            made.append(length[symbol] + number(more, nbits) + distance[far] + number(farther, far_nbits))
            start = len(content) - nearest - farther
            for i in range(least + more):
                content.append(content[start + i])
        elif literals and len(content) < NBYTES:
            literal = rng.choice(literals)
            made.append(length[literal])
            content.append(literal)
    return "".join(made) + length[END]


def some_stream(seed: int) -> tuple[bytes, bytes]:
    """A good stream of one to four blocks, and its content, of which there is a byte at least."""
    rng = random.Random(seed)
    content, bits = bytearray(), ""
    for left in range(rng.choice([0, 0, 1, 3]), -1, -1):
        bits += "1" if left == 0 else "0"
        kind = rng.randrange(8) if content or left else 7
        if kind == 0:
            data = rng.randbytes(rng.randint(0, min(300, NBYTES - len(content))))
            bits = (bits + "00").ljust((len(bits) + 2 + 7) // 8 * 8, rng.choice("01"))
            bits += number(len(data), 16) + number(len(data) ^ 0xFFFF, 16) + "".join(number(byte, 8) for byte in data)
            content += data
        elif kind == 1:
            bits += "10" + some_symbols(rng, FIXED, FIXED_DISTANCES, content, rng.randrange(300))
        else:
            chosen = {END, rng.randrange(END), *rng.sample(range(286), rng.randrange(286))}
            lengths = some_code(rng, sorted(chosen), 15, deep=rng.choice([0, 0.1, 0.5, 0.9]))
            far = sorted(rng.sample(range(30), rng.choice([0, 1, rng.randint(2, 30), 30])))
            distances = some_code(rng, far, 15, deep=rng.choice([0, 0.5, 0.9, 1])) if len(far) > 1 else dict.fromkeys(far, 1)
            bits += some_head(rng, lengths, distances) + some_symbols(rng, lengths, distances, content, rng.randrange(1, 600))
    return packed(bits), bytes(content)
