/*
 * deflate.h - what codes.c and deflate.c share: the bits of a stream, and the tables that tell its symbols
 */
#ifndef FASTQCOW_DEFLATE_H
#define FASTQCOW_DEFLATE_H

#include "internal.h"

#include <string.h>

enum {
    WORD = 8, /* bytes taken or copied at once */
    CODE_NBITS_MAX = 15,
    LENGTH_CODES_MAX = 286,
    DISTANCE_CODES_MAX = 30,
    FIXED_LENGTH_CODES = 288,
    FIXED_DISTANCE_CODES = 32,
    REPEAT_MAX = 138,
    WORDS_MAX = LENGTH_CODES_MAX + DISTANCE_CODES_MAX + REPEAT_MAX, /* so that repeats may be written as long as they can be */
    END_OF_BLOCK = 256,
    MATCH_MAX = 258
};

/* Bits that the first table of a code is indexed by, and entries of all its tables at most (as zlib's examples/enough.c counts). */
enum { LENGTH_NBITS = 11, LENGTH_ENTRIES = 2342, DISTANCE_NBITS = 8, DISTANCE_ENTRIES = 402 };

/*
 * An entry: the bits of a code and of the number that follows it (0 to 5), the bits of the code alone (8 to 11), and a value from
 * bit 16 on: a literal, or the least length or distance. A rare one is the end of a block, or leads to a second table: then it has
 * the bits of that one's index in place of the bits of a code, and its start as a value. A rare one without either flag is no code.
 */
#define LITERAL (UINT32_C(1) << 31)
#define RARE (UINT32_C(1) << 15)
#define SECOND (UINT32_C(1) << 14)
#define END (UINT32_C(1) << 13)

/* The input, lowest bits first. Zeroes are taken to lie behind its end; `imagined` bytes of them are among the bits. */
typedef struct stream {
    const uint8_t *in, *in_end;
    uint64_t bits;
    unsigned bit_count; /* bits above these may be there already, and are what comes next */
    unsigned imagined;
} stream;

static inline uint64_t load_le64(const uint8_t *p)
{
    uint64_t word;

    memcpy(&word, p, sizeof(word));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static inline uint64_t low_bits(uint64_t bits, unsigned count)
{
    return bits & ((UINT64_C(1) << count) - 1);
}

static inline unsigned entry_nbits(uint32_t entry)
{
    return entry & 0x3f;
}

static inline unsigned code_nbits(uint32_t entry)
{
    return entry >> 8 & 0xf;
}

static inline unsigned entry_value(uint32_t entry)
{
    return (entry & ~LITERAL) >> 16;
}

/* Makes it 56 bits or more, and less than 64. False once bits were taken that are not there. */
static inline bool refill(stream *s)
{
    if (s->imagined * 8 > s->bit_count)
        return false;
    if (s->in_end - s->in >= WORD) {
        s->bits |= load_le64(s->in) << s->bit_count;
        s->in += 7 - s->bit_count / 8;
        s->bit_count |= 56;
        return true;
    }
    for (; s->bit_count < 56; s->bit_count += 8) {
        if (s->in < s->in_end)
            s->bits |= (uint64_t)*s->in++ << s->bit_count;
        else
            s->imagined++;
    }
    return true;
}

/* At most 32, of those that are there since the last refill. */
static inline unsigned take(stream *s, unsigned count)
{
    const unsigned value = (unsigned)low_bits(s->bits, count);

    s->bits >>= count;
    s->bit_count -= count;
    return value;
}

/* ---- codes.c */

/*
 * RFC 1951, 3.2.7: how many bits the words have of the codes that a block starts with; those of the distances come behind all of
 * the others. False where libz refuses them, or they are cut off.
 */
bool fq_read_word_lengths(stream *s, uint8_t word_nbits[WORDS_MAX], unsigned *lengths, unsigned *distances);

/*
 * The tables of a code whose words have so many bits. False where it has gaps, unless it is one of distances with one word of one
 * bit, or none; and where there is no room for all words.
 */
bool fq_build_lengths(uint32_t table[LENGTH_ENTRIES], const uint8_t *word_nbits, unsigned count);
bool fq_build_distances(uint32_t table[DISTANCE_ENTRIES], const uint8_t *word_nbits, unsigned count);

#endif
