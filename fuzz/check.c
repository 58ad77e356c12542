/*
 * check.c - the check of an image's tables and refcounts, by a callback and by a descriptor, which must count the same
 */
#include "image.h"

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

static fq_status use_tables(fq_check *c, const image *m, fq_error *error)
{
    const uint64_t cluster_size = fq_cluster_size(&m->geometry), l1_end = m->l1_off + (uint64_t)m->l1_entries * 8;
    const fq_l1_range active = {m->l1_off, m->l1_entries, 0, 1 + (m->plan >> 3 & 1), (uint32_t)(m->plan & 7)};
    const fq_l1_range inactive = {m->snapshots_off, 1 + (m->plan >> 4 & 63), 0, 0, 1 + (m->plan >> 10 & 3)};
    const bool disjoint = inactive.l1_off >= l1_end || inactive.l1_off + inactive.entries * 8 <= m->l1_off;
    fq_status status = fq_check_use(c, FQ_ROLE_HEADER, 0, cluster_size, 1, error);

    if (status == FQ_OK)
        status =
            fq_check_use(c, FQ_ROLE_REFCOUNT_TABLE, m->refcount_table_off, m->refcount_table_clusters * cluster_size, 1, error);
    if (status == FQ_OK)
        status = fq_check_use(c, FQ_ROLE_OTHER, m->plan, m->plan >> 13, 1 + (m->plan >> 26 & 1), error);
    if (status == FQ_OK && m->plan >> 12 & 1)
        status = fq_check_bitmap(c, m->snapshots_off, m->plan >> 16 & 255, 1 + (m->plan >> 24 & 1), NULL, error);
    if (status == FQ_OK)
        status = fq_check_use(c, FQ_ROLE_L1, m->l1_off, (uint64_t)m->l1_entries * 8, 1, error);
    if (status == FQ_OK)
        status = fq_check_l1(c, &active, NULL, error);
    if (status == FQ_OK && disjoint && m->plan & 7)
        status = fq_check_l1(c, &inactive, NULL, error);
    return status == FQ_OK ? fq_check_finish(c, NULL, error) : status;
}

static fq_status run(const image *m, fq_source *source, fq_check_counts *counts)
{
    tally t = {.calls = 0};
    const fq_check_options options = {.geometry = m->geometry,
                                      .refcount_order = m->refcount_order,
                                      .refcount_table_entries =
                                          (uint32_t)(m->refcount_table_clusters << m->geometry.cluster_bits) / 8,
                                      .refcount_table_off = m->refcount_table_off,
                                      .report = count,
                                      .opaque = &t};
    fq_check *c = NULL;
    fq_error error;
    fq_status status;

    CHECK(source && fq_check_open(source, &options, NULL, &c, &error) == FQ_OK);
    status = use_tables(c, m, &error);
    *counts = *fq_check_result(c);
    CHECK(status == FQ_OK || (error.status == status && (status == FQ_ERR_BITMAP_ENTRY || status == FQ_ERR_TOO_MANY_UNALIGNED)));
    CHECK(counts->not_reported > 0 ||
          (counts->corruptions == t.counts[FQ_CORRUPTION] && counts->leaks == t.counts[FQ_LEAK] &&
           counts->check_errors == t.counts[FQ_CHECK_ERROR] && counts->overlaps == t.counts[FQ_OVERLAP]));
    CHECK(counts->image_end_off <= m->file.nbytes + 2 * fq_cluster_size(&m->geometry));
    fq_check_close(c);
    fq_source_free(source);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static int fd = -1;
    fq_check_counts by_callback, by_descriptor;
    fq_status status;
    image m;

    if (!read_header(data, nbytes, &m))
        return -1;
    status = run(&m, fq_source_callback(read_file, &m.file, m.file.nbytes), &by_callback);
    CHECK(pwrite(emptied(&fd), m.file.bytes, m.file.nbytes, 0) == (ssize_t)m.file.nbytes);
    CHECK(run(&m, fq_source_fd(fd, false), &by_descriptor) == status);
    CHECK(memcmp(&by_callback, &by_descriptor, sizeof(by_callback)) == 0);
    return 0;
}
