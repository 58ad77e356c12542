/*
 * test_check.c - checks of files full of nonsense, to be run under the sanitizers
 *
 * That the counts are right is compared with QEMU elsewhere. Here tables of all geometries are filled with entries that are likely
 * to point somewhere, and nothing may be read or written out of bounds, and the counts have to be what was reported.
 */
#include "internal.h"
#include "testing.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct file {
    uint8_t *bytes;
    size_t nbytes;
    int reads, fails_at; /* 0: never */
} file;

static uint64_t seed = 1;

static uint64_t pick(uint64_t below)
{
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
    return (seed >> 16) % below;
}

static ptrdiff_t read_memory(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    file *f = opaque;

    (void)user;
    if (++f->reads == f->fails_at)
        return -1;
    if (host_off >= f->nbytes)
        return 0;
    if (nbytes > f->nbytes - host_off)
        nbytes = f->nbytes - host_off;
    memcpy(buf, f->bytes + host_off, nbytes);
    return (ptrdiff_t)nbytes;
}

static uint64_t some_entry(const file *f, unsigned cluster_bits)
{
    switch (pick(8)) {
    case 0:
        return 0;
    case 1:
        return pick(UINT64_MAX);
    case 2:
        return UINT64_C(1) << 62 | pick(UINT64_C(1) << 62);
    case 3:
        return UINT64_C(1) << 62 | pick(f->nbytes + 9) | (uint64_t)1 << (62 - (cluster_bits - 8));
    case 4:
        return pick(f->nbytes / 512 + 2) * 512;
    default:
        return pick(2) << 63 | pick((f->nbytes >> cluster_bits) + 2) << cluster_bits;
    }
}

typedef struct tally {
    uint64_t counts[4], calls;
} tally;

static void count(void *opaque, const fq_finding *found, uint64_t times)
{
    tally *t = opaque;

    CHECK(times > 0 && fq_finding_sentence(found->kind)[0] != '\0');
    t->counts[fq_finding_severity(found->kind)] += times;
    t->calls++;
    CHECK(t->calls <= (uint64_t)FQ_CHECK_REPORTS_MAX * FQ_FINDING_KINDS);
}

static fq_status run(file *f, const fq_geometry *g, unsigned order, uint32_t table_entries)
{
    const uint64_t cluster_size = UINT64_C(1) << g->cluster_bits;
    fq_source *source = fq_source_callback(read_memory, f, f->nbytes);
    tally t = {.calls = 0};
    const fq_check_options options = {.geometry = *g,
                                      .refcount_order = order,
                                      .refcount_table_entries = table_entries,
                                      .refcount_table_off = cluster_size,
                                      .report = count,
                                      .opaque = &t};
    const fq_l1_range active = {2 * cluster_size, cluster_size / 8, 0, 1, 2}, inactive = {3 * cluster_size, 17, 0, 0, 5};
    fq_check *c = NULL;
    fq_error error;
    fq_status status;

    CHECK(source);
    status = fq_check_open(source, &options, NULL, &c, &error);
    if (status == FQ_OK)
        status = fq_check_use(c, FQ_ROLE_HEADER, 0, cluster_size, 1, &error);
    if (status == FQ_OK)
        status = fq_check_use(c, FQ_ROLE_OTHER, pick(f->nbytes), pick(f->nbytes), 1, &error);
    if (status == FQ_OK)
        status = fq_check_use(c, FQ_ROLE_OTHER, UINT64_MAX - pick(9), UINT64_MAX - pick(9), 1, &error);
    for (uint64_t off = 0; off < 3 * cluster_size && status == FQ_OK; off += 512) /* a sum of 2^64 is 0 */
        status = fq_check_use(c, FQ_ROLE_OTHER, off, UINT64_C(0) - off, 1, &error);
    if (status == FQ_OK)
        status = fq_check_bitmap(c, pick(f->nbytes) & ~UINT64_C(7), pick(99), 3, NULL, &error);
    if (status == FQ_ERR_BITMAP_ENTRY)
        status = FQ_OK;
    if (status == FQ_OK)
        status = fq_check_l1(c, &active, NULL, &error);
    if (status == FQ_OK)
        status = fq_check_l1(c, &inactive, NULL, &error);
    if (status == FQ_OK)
        status = fq_check_finish(c, NULL, &error);
    CHECK(status == FQ_OK || error.status == status);
    if (status == FQ_OK) {
        const fq_check_counts *found = fq_check_result(c);

        CHECK(found->not_reported > 0 ||
              (found->corruptions == t.counts[FQ_CORRUPTION] && found->leaks == t.counts[FQ_LEAK] &&
               found->check_errors == t.counts[FQ_CHECK_ERROR] && found->overlaps == t.counts[FQ_OVERLAP]));
        CHECK(found->image_end_off <= f->nbytes + 2 * cluster_size);
    }
    fq_check_close(c);
    fq_source_free(source);
    return status;
}

static void test_nonsense(unsigned cluster_bits, bool extended_l2, bool external_data, unsigned order, int fails_at)
{
    const size_t cluster_size = (size_t)1 << cluster_bits;
    file f = {NULL, 20 * cluster_size + (size_t)pick(cluster_size), 0, fails_at};
    const fq_geometry g = {3, cluster_bits, extended_l2, external_data, FQ_CODEC_DEFLATE};
    fq_status status;

    f.bytes = calloc(f.nbytes, 1); /* exactly, so that a sanitizer sees one byte too many */
    CHECK(f.bytes);
    for (size_t i = 0; i + 8 <= f.nbytes; i += 8) {
        const uint64_t entry = some_entry(&f, cluster_bits);

        for (int k = 0; k < 8; k++)
            f.bytes[i + (size_t)k] = (uint8_t)(entry >> (56 - 8 * k));
    }
    status = run(&f, &g, order, (uint32_t)pick(cluster_size / 4));
    CHECK(status == FQ_OK || status == FQ_ERR_TOO_MANY_UNALIGNED || (fails_at && status == FQ_ERR_SOURCE));
    free(f.bytes);
}

static void test_too_many_clusters(void)
{
    file f = {NULL, (size_t)UINT32_MAX << 10, 0, 0};
    const fq_geometry g = {3, 9, false, false, FQ_CODEC_DEFLATE};

    CHECK(run(&f, &g, 4, 0) == FQ_ERR_TOO_MANY_CLUSTERS);
}

static int count_polls(void *user, uint64_t done_nbytes)
{
    (void)done_nbytes;
    return ++*(int *)user > 1000;
}

/* A table entry for each block of refcounts but those of the clusters whose numbers are multiples of 2^16. */
static ptrdiff_t read_blocks(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    (void)opaque, (void)user;
    memset(buf, 0, nbytes);
    for (size_t i = 0; i + 8 <= nbytes && host_off + nbytes <= 1 << 20; i += 8)
        if ((host_off + i) / 8 % 256 != 0)
            buf[i + 5] = 0x10; /* 2^20, where all is zero */
    return (ptrdiff_t)nbytes;
}

/* The caller is asked whether to go on however the clusters lie. */
static void test_polls(void)
{
    enum { CLUSTERS = 1 << 20, BLOCKS = CLUSTERS / 256 };
    fq_source *source = fq_source_callback(read_blocks, NULL, (uint64_t)CLUSTERS << 9);
    tally t = {.calls = 0};
    const fq_check_options options = {.geometry = {3, 9, false, false, FQ_CODEC_DEFLATE},
                                      .refcount_order = 4,
                                      .refcount_table_entries = BLOCKS,
                                      .report = count,
                                      .opaque = &t};
    int polls = 0;
    const fq_request request = {.user = &polls, .poll = count_polls};
    fq_check *c = NULL;
    fq_error error;

    CHECK(source);
    CHECK(fq_check_open(source, &options, NULL, &c, &error) == FQ_OK);
    CHECK(fq_check_finish(c, &request, &error) == FQ_OK);
    CHECK(polls >= CLUSTERS >> 16);
    polls = 1000;
    CHECK(fq_check_finish(c, &request, &error) == FQ_ERR_CANCELLED);
    fq_check_close(c);
    fq_source_free(source);
}

int main(void)
{
    static const unsigned cluster_bits[] = {9, 14};

    for (unsigned i = 0; i < sizeof(cluster_bits) / sizeof(*cluster_bits); i++)
        for (unsigned order = 0; order <= 6; order++)
            for (int kind = 0; kind < 8; kind++) {
                const bool extended = kind & 1 && cluster_bits[i] >= 14;

                test_nonsense(cluster_bits[i], extended, kind & 2, order, kind & 4 ? (int)pick(40) + 1 : 0);
            }
    test_too_many_clusters();
    test_polls();
    puts("check: all tests passed");
    return 0;
}
