/*
 * inflater.h - inflates deflate streams plainly, to compare others with
 *
 * The verdict is libz's, and so QEMU's: a stream is good once the cluster is full, even if it does not end there. What libz goes on
 * to look at behind that (a stream whose last bytes are there is read to its end, or to the next byte of output) counts as well.
 *
 * With `lenient` it takes what libdeflate takes and libz does not; then `deviated` says that the stream has some of it:
 * - the length symbols 286 and 287, as a length of 258; the distance symbols 30 and 31, as symbol 29;
 * - a block that has codes for them, be they used or not;
 * - lengths of codes repeated past the last one;
 * - a code of which a bit 1 is no code, as there is but one, of one bit: it stands for the one; or a distance where there is no
 *   code for any: a bit, which stands for the distance 1.
 */
#ifndef FASTQCOW_INFLATER_H
#define FASTQCOW_INFLATER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { CODE_BITS_MAX = 15, LENGTHS_MAX = 288, DISTANCES_MAX = 32 };

typedef struct inflater {
    const uint8_t *in;
    size_t in_nbytes, in_at;
    uint32_t bits, bit_count;
    uint8_t *out;
    size_t out_nbytes, out_at;
    bool lenient, deviated, good;
    bool ended; /* there is no more input where some was wanted */
} inflater;

/* A canonical Huffman code: how many codes there are of each length, and their symbols in order. */
typedef struct code {
    uint16_t counts[CODE_BITS_MAX + 1], symbols[LENGTHS_MAX];
    bool single, empty;
} code;

typedef enum outcome { GOES_ON, FULL, ENDED, BAD } outcome;

static inline bool need_bits(inflater *s, unsigned count)
{
    while (s->bit_count < count) {
        if (s->in_at == s->in_nbytes) {
            s->ended = true;
            return false;
        }
        s->bits |= (uint32_t)s->in[s->in_at++] << s->bit_count;
        s->bit_count += 8;
    }
    return true;
}

/* Bits that are needed, lowest first; the caller looks at s->ended. */
static inline unsigned take_bits(inflater *s, unsigned count)
{
    unsigned value;

    if (!need_bits(s, count))
        return 0;
    value = s->bits & ((1u << count) - 1);
    s->bits >>= count;
    s->bit_count -= count;
    return value;
}

/* False where the code is over-subscribed, or has gaps that make it none. */
static inline bool make_code(code *c, const uint8_t *lengths, unsigned count, bool may_be_single)
{
    uint16_t next[CODE_BITS_MAX + 1] = {0};
    int room = 1;

    memset(c, 0, sizeof(*c));
    for (unsigned i = 0; i < count; i++)
        c->counts[lengths[i]]++;
    c->empty = c->counts[0] == count;
    c->counts[0] = 0;
    for (unsigned bits = 1; bits <= CODE_BITS_MAX; bits++) {
        room = room * 2 - c->counts[bits];
        if (room < 0)
            return false;
        if (bits < CODE_BITS_MAX)
            next[bits + 1] = next[bits] + c->counts[bits];
    }
    for (unsigned i = 0; i < count; i++)
        if (lengths[i])
            c->symbols[next[lengths[i]]++] = (uint16_t)i;
    c->single = room > 0 && !c->empty;
    return !c->single || (may_be_single && c->counts[1] == 1 && room == 1 << (CODE_BITS_MAX - 1));
}

/* The next symbol, or -1. */
static inline int take_symbol(inflater *s, const code *c)
{
    int first = 0, index = 0, word = 0;

    if (c->empty) {
        take_bits(s, 1);
        s->deviated |= s->lenient;
        return s->lenient && !s->ended ? 0 : -1;
    }
    for (unsigned bits = 1; bits <= CODE_BITS_MAX; bits++) {
        const int count = c->counts[bits];

        word |= (int)take_bits(s, 1);
        if (s->ended)
            return -1;
        if (word - count < first)
            return c->symbols[index + (word - first)];
        if (c->single) {
            s->deviated |= s->lenient;
            return s->lenient ? c->symbols[0] : -1;
        }
        index += count;
        first = (first + count) << 1;
        word <<= 1;
    }
    return -1;
}

static inline outcome stored_block(inflater *s)
{
    unsigned nbytes, complement;

    take_bits(s, s->bit_count % 8);
    nbytes = take_bits(s, 16);
    complement = take_bits(s, 16);
    if (s->ended)
        return ENDED;
    if (nbytes != (complement ^ 0xffff))
        return BAD;
    for (; nbytes > 0; nbytes--) {
        unsigned byte;

        if (s->out_at == s->out_nbytes)
            return FULL;
        byte = take_bits(s, 8);
        if (s->ended)
            return ENDED;
        s->out[s->out_at++] = (uint8_t)byte;
    }
    return GOES_ON;
}

static inline outcome coded_block(inflater *s, const code *lengths, const code *distances)
{
    static const uint16_t length_base[] = {3,  4,  5,  6,  7,  8,  9,  10,  11,  13,  15,  17,  19,  23,  27, 31,
                                           35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258, 258, 258};
    static const uint8_t length_bits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
                                          3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0, 0, 0};
    static const uint16_t distance_base[] = {1,    2,    3,    4,    5,    7,     9,     13,    17,    25,   33,
                                             49,   65,   97,   129,  193,  257,   385,   513,   769,   1025, 1537,
                                             2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577, 24577, 24577};

    for (;;) {
        const int symbol = take_symbol(s, lengths);
        int far;
        size_t length, distance;

        if (symbol < 0)
            return s->ended ? ENDED : BAD;
        if (symbol == 256)
            return GOES_ON;
        if (symbol < 256) {
            if (s->out_at == s->out_nbytes)
                return FULL;
            s->out[s->out_at++] = (uint8_t)symbol;
            continue;
        }
        if (symbol > 285) {
            if (!s->lenient)
                return BAD;
            s->deviated = true;
        }
        length = length_base[symbol - 257] + take_bits(s, length_bits[symbol - 257]);
        far = s->ended ? -1 : take_symbol(s, distances);
        if (far < 0)
            return s->ended ? ENDED : BAD;
        if (far > 29) {
            if (!s->lenient)
                return BAD;
            s->deviated = true;
            far = 29;
        }
        distance = distance_base[far] + take_bits(s, far < 2 ? 0 : (unsigned)far / 2 - 1);
        if (s->ended)
            return ENDED;
        if (s->out_at < s->out_nbytes && distance > s->out_at)
            return BAD;
        for (; length > 0; length--, s->out_at++) {
            if (s->out_at == s->out_nbytes)
                return FULL;
            s->out[s->out_at] = s->out[s->out_at - distance];
        }
    }
}

static inline outcome fixed_block(inflater *s)
{
    uint8_t bits[LENGTHS_MAX];
    code lengths, distances;

    memset(bits, 8, 144);
    memset(bits + 144, 9, 112);
    memset(bits + 256, 7, 24);
    memset(bits + 280, 8, 8);
    make_code(&lengths, bits, LENGTHS_MAX, false);
    memset(bits, 5, DISTANCES_MAX);
    make_code(&distances, bits, DISTANCES_MAX, false);
    return coded_block(s, &lengths, &distances);
}

static inline outcome dynamic_block(inflater *s)
{
    static const uint8_t order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t bits[LENGTHS_MAX + DISTANCES_MAX] = {0};
    const unsigned length_count = take_bits(s, 5) + 257, distance_count = take_bits(s, 5) + 1, order_count = take_bits(s, 4) + 4;
    code lengths, distances;

    if (s->ended)
        return ENDED;
    if (length_count > 286 || distance_count > 30) {
        if (!s->lenient)
            return BAD;
        s->deviated = true;
    }
    for (unsigned i = 0; i < order_count; i++)
        bits[order[i]] = (uint8_t)take_bits(s, 3);
    if (s->ended)
        return ENDED;
    if (!make_code(&lengths, bits, 19, false))
        return BAD;
    memset(bits, 0, sizeof(bits));
    for (unsigned i = 0; i < length_count + distance_count;) {
        /* Without any code at all, libz reads zeroes, and misses the end mark after them. */
        const int symbol = lengths.empty ? (int)take_bits(s, 1) * 0 : take_symbol(s, &lengths);
        unsigned count = 1;
        uint8_t value;

        if (symbol < 0)
            return s->ended ? ENDED : BAD;
        value = symbol < 16 ? (uint8_t)symbol : 0;
        if (symbol == 16) {
            if (i == 0)
                return BAD;
            value = bits[i - 1];
            count = 3 + take_bits(s, 2);
        } else if (symbol > 16) {
            count = symbol == 17 ? 3 + take_bits(s, 3) : 11 + take_bits(s, 7);
        }
        if (s->ended)
            return ENDED;
        if (count > length_count + distance_count - i) {
            if (!s->lenient)
                return BAD;
            s->deviated = true;
            count = length_count + distance_count - i;
        }
        while (count-- > 0)
            bits[i++] = value;
    }
    if (bits[256] == 0)
        return BAD;
    if (!make_code(&lengths, bits, length_count, true) || !make_code(&distances, bits + length_count, distance_count, true))
        return BAD;
    return coded_block(s, &lengths, &distances);
}

static inline inflater inflate_plainly(const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes, bool lenient)
{
    inflater s = {.in = in, .in_nbytes = in_nbytes, .out = out, .out_nbytes = out_nbytes, .lenient = lenient};
    outcome found = GOES_ON;

    while (found == GOES_ON) {
        const bool last = take_bits(&s, 1);

        switch (take_bits(&s, 2)) {
        case 0:
            found = s.ended ? ENDED : stored_block(&s);
            break;
        case 1:
            found = fixed_block(&s);
            break;
        case 2:
            found = dynamic_block(&s);
            break;
        default:
            found = BAD;
        }
        if (found == GOES_ON && last)
            break;
    }
    s.good = found != BAD && s.out_at == s.out_nbytes;
    return s;
}

#endif
