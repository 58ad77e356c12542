/*
 * codes.c - the codes that a block of deflate starts with, and whether there is doubt about them
 *
 * An entry of a table has all there is to know of a symbol, found by the next bits of the stream: 11 are enough for nearly every
 * length, 8 for nearly every distance. Words with more bits go on in a second table, one for each start that they have in common.
 *
 * What must hold: no table is written past its end, whatever the lengths are. The first table has room for each word that the bits
 * it is indexed by can tell, and the room of each second one is asked for.
 */
#include "deflate.h"

#ifdef FQ_HAVE_LIBDEFLATE

enum { PRECODES = 19, PRECODE_NBITS = 7, PRECODE_ENTRIES = 1 << PRECODE_NBITS };

typedef enum alphabet { PRECODE, LENGTHS, DISTANCES } alphabet;

/* RFC 1951, 3.2.5 and 3.2.7: what a symbol means, as an entry of which the code's bits are still to be added. */
static inline uint32_t meaning(alphabet of, unsigned symbol)
{
    static const uint16_t length_min[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                          31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_more[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t distance_min[] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                            193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};

    switch (of) {
    case LENGTHS:
        if (symbol < END_OF_BLOCK)
            return LITERAL | symbol << 16;
        if (symbol == END_OF_BLOCK)
            return RARE | END;
        if (symbol >= LENGTH_CODES_MAX)
            return RARE;
        return (uint32_t)length_min[symbol - END_OF_BLOCK - 1] << 16 | length_more[symbol - END_OF_BLOCK - 1];
    case DISTANCES:
        if (symbol >= DISTANCE_CODES_MAX)
            return RARE;
        return (uint32_t)distance_min[symbol] << 16 | (symbol < 2 ? 0 : symbol / 2 - 1);
    default:
        return symbol << 16;
    }
}

static inline uint32_t new_entry(alphabet of, unsigned symbol, unsigned nbits)
{
    return meaning(of, symbol) + nbits + (nbits << 8);
}

/* The codeword after this one of so many bits, the first bit lowest; the last one's is 0. */
static inline unsigned next_word(unsigned word, unsigned nbits)
{
    unsigned bit = 1u << (nbits - 1);

    for (; word & bit; bit >>= 1)
        word ^= bit;
    return word | bit;
}

/* The words of a code in the order of their lengths, which is that of their symbols where these are alike (RFC 1951, 3.2.2). */
typedef struct code {
    unsigned words, room; /* how many there are; how many of the greatest length would have room beside them */
    uint16_t counts[CODE_NBITS_MAX + 1], symbols[FIXED_LENGTH_CODES];
} code;

/* False where there is no room for all words. */
static inline bool order_words(code *c, const uint8_t *word_nbits, unsigned count)
{
    uint16_t starts[CODE_NBITS_MAX + 2] = {0};

    memset(c->counts, 0, sizeof(c->counts));
    for (unsigned i = 0; i < count; i++)
        c->counts[word_nbits[i]]++;
    c->counts[0] = 0;
    c->room = 1;
    for (unsigned nbits = 1; nbits <= CODE_NBITS_MAX; nbits++) {
        if (c->counts[nbits] > 2 * c->room)
            return false;
        c->room = 2 * c->room - c->counts[nbits];
        starts[nbits + 1] = starts[nbits] + c->counts[nbits];
    }
    c->words = starts[CODE_NBITS_MAX + 1];
    for (unsigned i = 0; i < count; i++)
        if (word_nbits[i])
            c->symbols[starts[word_nbits[i]]++] = (uint16_t)i;
    return true;
}

/* The table of a code that has but one word, the bit 0, or none. */
static void build_sparse(uint32_t *table, unsigned table_nbits, alphabet of, const code *c)
{
    for (unsigned i = 0; i < 1u << table_nbits; i++)
        table[i] = c->words && i % 2 == 0 ? new_entry(of, c->symbols[0], 1) : RARE;
}

/* The second tables: of the words from `word` on, of which `done` come before it. */
static inline bool build_second(uint32_t *table, unsigned entries_max, unsigned table_nbits, alphabet of, const code *c,
                                unsigned done, unsigned word)
{
    unsigned size = 1u << table_nbits, prefix = UINT32_MAX, second = 0, second_nbits = 0;

    for (unsigned nbits = table_nbits + 1; done < c->words; nbits++) {
        for (unsigned i = 0; i < c->counts[nbits]; i++, done++) {
            if ((word & ((1u << table_nbits) - 1)) != prefix) {
                /* It has room for all words with this prefix, and for no others: these are the next ones. */
                unsigned room = 1u << (nbits - table_nbits);

                prefix = word & ((1u << table_nbits) - 1);
                second = size;
                second_nbits = nbits - table_nbits;
                for (unsigned here = c->counts[nbits] - i; here < room; here = c->counts[table_nbits + second_nbits]) {
                    room = 2 * (room - here);
                    second_nbits++;
                }
                if (1u << second_nbits > entries_max - size)
                    return false;
                size += 1u << second_nbits;
                table[prefix] = RARE | SECOND | second << 16 | second_nbits << 8 | table_nbits;
            }
            for (unsigned at = word >> table_nbits; at < 1u << second_nbits; at += 1u << (nbits - table_nbits))
                table[second + at] = new_entry(of, c->symbols[done], nbits - table_nbits);
            word = next_word(word, nbits);
        }
    }
    return true;
}

static inline bool build(uint32_t *table, unsigned entries_max, unsigned table_nbits, alphabet of, const uint8_t *word_nbits,
                         unsigned count)
{
    unsigned word = 0, done = 0;
    code c;

    if (!order_words(&c, word_nbits, count))
        return false;
    if (c.room > 0) {
        if (of != DISTANCES || c.counts[1] != c.words)
            return false;
        build_sparse(table, table_nbits, of, &c);
        return true;
    }
    /* First the table for one bit, doubled for each bit more: what fewer bits tell stands there as often as it has to. */
    table[0] = RARE;
    for (unsigned nbits = 1; nbits <= table_nbits; nbits++) {
        memcpy(table + (1u << (nbits - 1)), table, sizeof(*table) << (nbits - 1));
        for (unsigned i = 0; i < c.counts[nbits]; i++) {
            table[word] = new_entry(of, c.symbols[done++], nbits);
            word = next_word(word, nbits);
        }
    }
    return build_second(table, entries_max, table_nbits, of, &c, done, word);
}

bool fq_build_lengths(uint32_t table[LENGTH_ENTRIES], const uint8_t *word_nbits, unsigned count)
{
    return build(table, LENGTH_ENTRIES, LENGTH_NBITS, LENGTHS, word_nbits, count);
}

bool fq_build_distances(uint32_t table[DISTANCE_ENTRIES], const uint8_t *word_nbits, unsigned count)
{
    return build(table, DISTANCE_ENTRIES, DISTANCE_NBITS, DISTANCES, word_nbits, count);
}

/* The table of the code that the lengths of the other codes' words are written in. */
static inline bool read_precode(stream *s, uint32_t table[PRECODE_ENTRIES], unsigned precodes)
{
    static const uint8_t order[PRECODES] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t word_nbits[PRECODES] = {0};

    for (unsigned i = 0; i < precodes; i++) {
        if (i % 16 == 0 && !refill(s))
            return false;
        word_nbits[order[i]] = (uint8_t)take(s, 3);
    }
    return build(table, PRECODE_ENTRIES, PRECODE_NBITS, PRECODE, word_nbits, PRECODES);
}

bool fq_read_word_lengths(stream *from, uint8_t word_nbits[WORDS_MAX], unsigned *lengths, unsigned *distances)
{
    stream s = *from; /* in registers */
    uint32_t precode[PRECODE_ENTRIES];
    unsigned count;

    *lengths = take(&s, 5) + 257;
    *distances = take(&s, 5) + 1;
    if (*lengths > LENGTH_CODES_MAX || *distances > DISTANCE_CODES_MAX || !read_precode(&s, precode, take(&s, 4) + 4))
        return false;
    count = *lengths + *distances;
    for (unsigned i = 0; i < count;) {
        uint32_t entry;
        unsigned symbol, times;

        if (s.bit_count < PRECODE_NBITS + 7 && !refill(&s))
            return false;
        entry = precode[low_bits(s.bits, PRECODE_NBITS)];
        take(&s, entry_nbits(entry));
        symbol = entry_value(entry);
        if (symbol < 16) {
            word_nbits[i++] = (uint8_t)symbol;
            continue;
        }
        if (symbol == 16 && i == 0)
            return false;
        times = symbol == 16 ? 3 + take(&s, 2) : symbol == 17 ? 3 + take(&s, 3) : 11 + take(&s, 7);
        if (times > count - i)
            return false;
        if (symbol == 16)
            memset(word_nbits + i, word_nbits[i - 1], 6);
        else if (symbol == 17)
            memset(word_nbits + i, 0, 10);
        else
            memset(word_nbits + i, 0, REPEAT_MAX);
        i += times;
    }
    *from = s;
    return word_nbits[END_OF_BLOCK] != 0;
}

/* Whether the words of these lengths use up all the room that there is. */
static bool is_complete(const uint8_t *word_nbits, unsigned count)
{
    unsigned used = 0;

    for (unsigned i = 0; i < count; i++)
        used += (2u << CODE_NBITS_MAX >> word_nbits[i]) & ((2u << CODE_NBITS_MAX) - 1);
    return used == 2u << CODE_NBITS_MAX;
}

bool fq_deflate_is_one_block(const uint8_t *in, size_t in_nbytes)
{
    stream s = {.in = in, .in_end = in + in_nbytes};
    uint8_t word_nbits[WORDS_MAX];
    unsigned lengths, distances;

    refill(&s);
    return take(&s, 1) == 1 && take(&s, 2) == 2 && fq_read_word_lengths(&s, word_nbits, &lengths, &distances) &&
           is_complete(word_nbits, lengths) && is_complete(word_nbits + lengths, distances);
}
#endif
