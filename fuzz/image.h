/*
 * image.h - an input as an image: what its header says, which in the project Python reads and checks (src/fastqcow/header.py)
 *
 * An input that starts like a qcow2 image is one, so that images are seeds; the header's fields that the core has no use for say
 * what is done with it. Any other input has the fields in its first bytes, one by one, and behind them pieces of the file, each of
 * which begins with its length and stands at the start of a cluster; so a file of large clusters is made of few bytes.
 */
#ifndef FASTQCOW_FUZZ_IMAGE_H
#define FASTQCOW_FUZZ_IMAGE_H

#include "fuzz.h"

enum { TABLE_NBYTES_MAX = 1 << 20, MADE_NBYTES_MAX = 1 << 19, LONG_PIECE = 0xf0 };

typedef struct image {
    file file;
    fq_geometry geometry;
    uint64_t size, l1_off, refcount_table_off, snapshots_off;
    uint32_t l1_entries, refcount_table_clusters, refcount_order;
    uint64_t plan; /* of what to do */
} image;

static inline uint64_t field(const uint8_t *data, size_t nbytes, size_t at, size_t count)
{
    input in = {data + at, nbytes > at ? nbytes - at : 0};

    return take_number(&in, count);
}

/* The pieces, up to the end of the last one, or of its cluster. */
static inline file make_file(input *in, unsigned cluster_bits, bool whole)
{
    static uint8_t *made;
    const size_t cluster_size = (size_t)1 << cluster_bits;
    size_t at = 0;

    if (!made)
        made = malloc(MADE_NBYTES_MAX);
    CHECK(made);
    memset(made, 0, MADE_NBYTES_MAX);
    while (in->left > 0) {
        const size_t first = (size_t)take_number(in, 1);
        size_t n = first < LONG_PIECE ? first : (first & 15) << 8 | (size_t)take_number(in, 1);

        at = (at + cluster_size - 1) & ~(cluster_size - 1);
        n = n < in->left ? n : in->left;
        if (n > MADE_NBYTES_MAX - at || at + cluster_size > MADE_NBYTES_MAX)
            break;
        memcpy(made + at, in->at, n);
        in->at += n;
        in->left -= n;
        at += n ? n : cluster_size;
    }
    if (whole)
        at = (at + cluster_size - 1) & ~(cluster_size - 1);
    return (file){made, at};
}

static inline bool read_header(const uint8_t *data, size_t nbytes, image *m)
{
    fq_geometry *g = &m->geometry;
    bool has_header = nbytes >= 72 && memcmp(data, "QFI\xfb", 4) == 0;

    *m = (image){.file = {data, nbytes}, .refcount_order = 4};
    if (has_header) {
        g->version = (uint32_t)field(data, nbytes, 4, 4);
        g->cluster_bits = (uint32_t)field(data, nbytes, 20, 4);
        m->size = field(data, nbytes, 24, 8);
        m->l1_entries = (uint32_t)field(data, nbytes, 36, 4);
        m->l1_off = field(data, nbytes, 40, 8);
        m->refcount_table_off = field(data, nbytes, 48, 8);
        m->refcount_table_clusters = (uint32_t)field(data, nbytes, 56, 4);
        m->snapshots_off = field(data, nbytes, 64, 8);
        if (g->version == 3) {
            const uint64_t incompatible = field(data, nbytes, 72, 8);

            g->external_data = incompatible & 4;
            g->extended_l2 = incompatible & 16;
            g->codec = field(data, nbytes, 104, 1) & 1 ? FQ_CODEC_ZSTD : FQ_CODEC_DEFLATE;
            m->plan = field(data, nbytes, 80, 8);
            m->refcount_order = (uint32_t)field(data, nbytes, 96, 4);
        } else {
            m->plan = field(data, nbytes, 8, 8);
        }
    } else {
        input in = {data, nbytes};
        const unsigned flags = (unsigned)take_number(&in, 1);

        *g = (fq_geometry){flags & 1 ? 2 : 3, (uint32_t)take_number(&in, 1), flags & 2, flags & 4,
                           flags >> 3 & 1 ? FQ_CODEC_ZSTD : FQ_CODEC_DEFLATE};
        m->size = take_number(&in, 8);
        m->l1_off = take_number(&in, 4);
        m->l1_entries = (uint32_t)take_number(&in, 3);
        m->refcount_table_off = take_number(&in, 4);
        m->refcount_table_clusters = (uint32_t)take_number(&in, 2);
        m->refcount_order = (uint32_t)take_number(&in, 1);
        m->snapshots_off = take_number(&in, 4);
        m->plan = take_number(&in, 4);
        if (g->cluster_bits < 9 || g->cluster_bits > 18)
            return false;
        m->file = make_file(&in, g->cluster_bits, flags >> 4 & 1);
    }
    return (g->version == 2 || g->version == 3) && g->cluster_bits >= (g->extended_l2 ? 14 : 9) && g->cluster_bits <= 21 &&
           m->size <= INT64_MAX && m->l1_entries <= TABLE_NBYTES_MAX / 8 && m->l1_off <= INT64_MAX - TABLE_NBYTES_MAX &&
           m->refcount_order <= 6 && (uint64_t)m->refcount_table_clusters << g->cluster_bits <= TABLE_NBYTES_MAX &&
           m->refcount_table_off <= INT64_MAX - TABLE_NBYTES_MAX && m->snapshots_off <= INT64_MAX - TABLE_NBYTES_MAX;
}

#endif
