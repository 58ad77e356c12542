/*
 * deflate.c - the verdict of libz at the speed of libdeflate
 *
 * libdeflate takes some streams that libz, and so QEMU, refuses: a block that has codes for more than 286 lengths or 30 distances,
 * or lengths of codes repeated past the last one; the symbols that mean nothing (286 and 287; 30 and 31); a bit that is no code. No
 * encoder writes these, but whoever makes an image to be read in two ways does. All of them show in the header of a block with
 * dynamic codes, or come in a block with fixed ones. So a stream of one block with a header that is beyond doubt is left to
 * libdeflate, for some 2 % of the time of inflating it; with clusters of 64 KiB, encoders write little else. Where more blocks
 * follow, only who inflates a block knows where the next header starts: those streams are inflated here.
 *
 * This inflater takes less than libz does, not more: it wants a stream that ends where the cluster does, of codes without gaps,
 * save the distances of a block that has one or none. All else is left to libz, so that it needs no rules for what is odd.
 *
 * It is as fast as libdeflate for the same reasons. Eight bytes of input are taken at once, without a branch. One entry of a
 * table has all there is to know of a symbol (codes.c). The next entry is on its way while a match is copied. While there are
 * IN_MARGIN bytes of input left and OUT_MARGIN of output nothing is checked but that a distance stays within the cluster; what is
 * left after that is inflated symbol by symbol, with every check.
 *
 * What must hold: `in` and `out` do not overlap. `out` may be written anywhere, up to its end, also where the answer is no.
 */
#include "deflate.h"

#ifdef FQ_HAVE_LIBDEFLATE
#include <stdlib.h>

/*
 * A turn of the fast loop, with what comes before the first one, takes in eight bytes three times, each up to seven further. It
 * writes three literals, or two and a match, and past the match what a copy by words writes more.
 */
enum { COPIED_AT_ONCE = 3 * WORD, IN_MARGIN = 3 * WORD, OUT_MARGIN = 2 + MATCH_MAX + COPIED_AT_ONCE };

typedef struct tables {
    uint32_t lengths[LENGTH_ENTRIES], distances[DISTANCE_ENTRIES];
} tables;

struct fq_deflate {
    stream from;
    uint8_t *out, *out_start, *out_end;
    const tables *codes; /* of this block */
    bool has_fixed;
    tables fixed, dynamic;
};

/* A value and the number that follows its code, which are the first of these bits. */
static inline unsigned with_number(uint32_t entry, uint64_t bits)
{
    return entry_value(entry) + (unsigned)(low_bits(bits, entry_nbits(entry)) >> code_nbits(entry));
}

static void use_fixed_codes(fq_deflate *s)
{
    uint8_t word_nbits[FIXED_LENGTH_CODES];

    s->codes = &s->fixed;
    if (s->has_fixed)
        return;
    memset(word_nbits, 8, 144);
    memset(word_nbits + 144, 9, 112);
    memset(word_nbits + 256, 7, 24);
    memset(word_nbits + 280, 8, 8);
    fq_build_lengths(s->fixed.lengths, word_nbits, FIXED_LENGTH_CODES);
    memset(word_nbits, 5, FIXED_DISTANCE_CODES);
    fq_build_distances(s->fixed.distances, word_nbits, FIXED_DISTANCE_CODES);
    s->has_fixed = true;
}

static bool use_dynamic_codes(fq_deflate *s)
{
    uint8_t word_nbits[WORDS_MAX];
    unsigned lengths, distances;

    s->codes = &s->dynamic;
    return fq_read_word_lengths(&s->from, word_nbits, &lengths, &distances) &&
           fq_build_lengths(s->dynamic.lengths, word_nbits, lengths) &&
           fq_build_distances(s->dynamic.distances, word_nbits + lengths, distances);
}

static bool copy_stored_block(fq_deflate *s)
{
    stream *from = &s->from;
    unsigned ahead, nbytes;

    take(from, from->bit_count % 8);
    ahead = from->bit_count / 8;
    if (ahead < from->imagined)
        return false;
    from->in -= ahead - from->imagined;
    from->bits = from->bit_count = from->imagined = 0;
    if (from->in_end - from->in < 4)
        return false;
    nbytes = from->in[0] | (unsigned)from->in[1] << 8;
    if ((nbytes ^ 0xffff) != (from->in[2] | (unsigned)from->in[3] << 8))
        return false;
    from->in += 4;
    if (nbytes > (size_t)(from->in_end - from->in) || nbytes > (size_t)(s->out_end - s->out))
        return false;
    memcpy(s->out, from->in, nbytes);
    from->in += nbytes;
    s->out += nbytes;
    return true;
}

static inline void copy_word(uint8_t *to, const uint8_t *from)
{
    uint64_t word;

    memcpy(&word, from, WORD);
    memcpy(to, &word, WORD);
}

/* Whole words, which may go past the end of the match by less than COPIED_AT_ONCE. */
static inline void copy_match(uint8_t *to, size_t length, size_t distance)
{
    const uint8_t *from = to - distance, *end = to + length;

    if (distance >= WORD) {
        copy_word(to, from);
        copy_word(to + WORD, from + WORD);
        copy_word(to + 2 * WORD, from + 2 * WORD);
        for (size_t i = COPIED_AT_ONCE; i < length; i += 2 * WORD) {
            copy_word(to + i, from + i);
            copy_word(to + i + WORD, from + i + WORD);
        }
    } else if (distance == 1) {
        const uint64_t word = UINT64_C(0x0101010101010101) * *from;

        for (; to < end; to += 2 * WORD) {
            memcpy(to, &word, WORD);
            memcpy(to + WORD, &word, WORD);
        }
    } else {
        for (; to < end; to += distance, from += distance)
            copy_word(to, from);
    }
}

typedef enum outcome { GOES_ON, ENDED, REFUSED } outcome;

/* As much of a block as keeps the margins, which must be there at first. */
static outcome inflate_fast(fq_deflate *s)
{
    const uint32_t *const lengths = s->codes->lengths, *const distances = s->codes->distances;
    const uint8_t *in = s->from.in, *const in_fast = s->from.in_end - IN_MARGIN;
    uint8_t *out = s->out, *const out_start = s->out_start, *const out_fast = s->out_end - OUT_MARGIN;
    uint64_t bits = s->from.bits, seen;
    uint32_t bit_count = s->from.bit_count, entry; /* only the lowest eight bits of bit_count mean something */
    outcome found = GOES_ON;
    size_t length, distance;

/* All 64 bits are there after a refill, though 56 to 63 are counted. */
#define REFILL() (bits |= load_le64(in) << (uint8_t)bit_count, in += 7 - (bit_count >> 3 & 7), bit_count |= 56)
#define TAKE(entry) (seen = bits, bits >>= entry_nbits(entry), bit_count -= (entry))
#define INDEX(nbits) low_bits(bits, nbits)

    REFILL();
    entry = lengths[INDEX(LENGTH_NBITS)];
    do {
        /*
         * 64 bits are there. Before a refill two words of 11 and a length of 20 are taken, and 8 bits looked at; or three words,
         * and 11 looked at. Before the other one a distance of 28 is taken, and again 11 bits looked at for the next word.
         */
        TAKE(entry);
        if (entry & LITERAL) {
            *out++ = (uint8_t)(entry >> 16);
            entry = lengths[INDEX(LENGTH_NBITS)];
            TAKE(entry);
            if (entry & LITERAL) {
                *out++ = (uint8_t)(entry >> 16);
                entry = lengths[INDEX(LENGTH_NBITS)];
                TAKE(entry);
                if (entry & LITERAL) {
                    *out++ = (uint8_t)(entry >> 16);
                    entry = lengths[INDEX(LENGTH_NBITS)];
                    REFILL();
                    continue;
                }
            }
        }
        if (entry & RARE) {
            if (entry & SECOND) {
                entry = lengths[entry_value(entry) + INDEX(code_nbits(entry))];
                TAKE(entry);
            }
            if (entry & LITERAL) {
                *out++ = (uint8_t)(entry >> 16);
                entry = lengths[INDEX(LENGTH_NBITS)];
                REFILL();
                continue;
            }
            if (entry & RARE) {
                found = entry & END ? ENDED : REFUSED;
                break;
            }
        }
        length = with_number(entry, seen);
        entry = distances[INDEX(DISTANCE_NBITS)];
        REFILL();
        if (entry & SECOND) {
            TAKE(entry);
            entry = distances[entry_value(entry) + INDEX(code_nbits(entry))];
        }
        TAKE(entry);
        distance = with_number(entry, seen);
        if (entry & RARE || distance > (size_t)(out - out_start)) {
            found = REFUSED;
            break;
        }
        entry = lengths[INDEX(LENGTH_NBITS)];
        REFILL();
        copy_match(out, length, distance);
        out += length;
    } while (in < in_fast && out < out_fast);
    s->from.in = in;
    s->from.bits = bits;
    s->from.bit_count = (uint8_t)bit_count;
    s->out = out;
    return found;
}
#undef REFILL
#undef TAKE
#undef INDEX

/* The next symbol's entry, and the bits that it starts with. */
static uint32_t take_entry(stream *s, const uint32_t *table, unsigned table_nbits, uint64_t *seen)
{
    uint32_t entry = table[low_bits(s->bits, table_nbits)];

    if (entry & SECOND) {
        take(s, table_nbits);
        entry = table[entry_value(entry) + low_bits(s->bits, code_nbits(entry))];
    }
    *seen = s->bits;
    take(s, entry_nbits(entry));
    return entry;
}

/* The rest of a block. */
static outcome inflate_carefully(fq_deflate *s)
{
    for (;;) {
        size_t length, distance;
        uint64_t seen;
        uint32_t entry;

        if (!refill(&s->from))
            return REFUSED;
        entry = take_entry(&s->from, s->codes->lengths, LENGTH_NBITS, &seen);
        if (entry & LITERAL) {
            if (s->out == s->out_end)
                return REFUSED;
            *s->out++ = (uint8_t)(entry >> 16);
            continue;
        }
        if (entry & RARE)
            return entry & END ? ENDED : REFUSED;
        length = with_number(entry, seen);
        entry = take_entry(&s->from, s->codes->distances, DISTANCE_NBITS, &seen);
        distance = with_number(entry, seen);
        if (entry & RARE || distance > (size_t)(s->out - s->out_start) || length > (size_t)(s->out_end - s->out))
            return REFUSED;
        for (; length > 0; length--, s->out++)
            *s->out = *(s->out - distance);
    }
}

static bool inflate_block(fq_deflate *s)
{
    outcome found = GOES_ON;

    if (s->from.in_end - s->from.in > IN_MARGIN && s->out_end - s->out > OUT_MARGIN)
        found = inflate_fast(s);
    if (found == GOES_ON)
        found = inflate_carefully(s);
    return found == ENDED;
}

bool fq_deflate_run(fq_deflate *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    bool is_last, good;

    s->from = (stream){.in = in, .in_end = in + in_nbytes};
    s->out = s->out_start = out;
    s->out_end = out + out_nbytes;
    do {
        if (!refill(&s->from))
            return false;
        is_last = take(&s->from, 1);
        switch (take(&s->from, 2)) {
        case 0:
            good = copy_stored_block(s);
            break;
        case 1:
            use_fixed_codes(s);
            good = inflate_block(s);
            break;
        case 2:
            good = use_dynamic_codes(s) && inflate_block(s);
            break;
        default:
            good = false;
        }
    } while (good && !is_last);
    return good && s->out == s->out_end; /* the last end mark may be cut off */
}

fq_deflate *fq_deflate_new(void)
{
    return calloc(1, sizeof(fq_deflate));
}
#endif
