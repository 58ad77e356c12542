/*
 * check.c - are the refcounts of an image what its tables make them?
 *
 * References are counted as they are met: the caller names what the header and the snapshots speak of (fq_check_use, fq_check_l1),
 * the rest follows from the tables. The verdicts, and how often each is counted, are QEMU's (qcow2-refcount.c), so that its users
 * get the numbers that they know.
 *
 * Why it is fast: a table is read once, however many L1 tables of snapshots share it, and what is wrong in it counts once for each.
 * L2 tables are first collected, then read in the order of the file.
 *
 * What a file can make us do: each byte of it is looked at a bounded number of times. For that the L1 tables' ranges that are given
 * must not overlap, and of L2 tables that are not aligned, which may lie over each other any number of times, so much is read and
 * no more. The memory is that of the counters (refcounts.c).
 */
#include "check.h"

#include <stdlib.h>

enum { UNALIGNED_NBYTES_MAX = 1 << 30 };

/* ---- L2 tables */

typedef struct l2_walk {
    uint64_t active, times;
    bool check_copied;
    uint64_t next_off; /* where the next data cluster would follow the last one */
} l2_walk;

static fq_status check_compressed(fq_check *c, const l2_walk *w, uint64_t guest_off, uint64_t at, uint64_t entry, uint64_t bitmap,
                                  fq_error *error)
{
    fq_mapping m;
    fq_status status;

    if (entry & FQ_L2_COPIED)
        fq_check_report_at(c, FQ_FOUND_COMPRESSED_COPIED, guest_off, at, entry, w->times);
    if (c->options.geometry.external_data) {
        fq_check_report_at(c, FQ_FOUND_COMPRESSED_OUTSIDE, guest_off, at, entry, w->times);
        return FQ_OK;
    }
    if (bitmap) {
        fq_check_report_at(c, FQ_FOUND_COMPRESSED_BITMAP, guest_off, at, entry, w->times);
        return FQ_OK;
    }
    fq_decode_compressed(&c->options.geometry, entry, &m);
    status = fq_check_refer(c, FQ_ROLE_DATA, guest_off, m.host_off, m.in_nbytes, w->times, error);
    c->counts.allocated_clusters += w->active;
    c->counts.compressed_clusters += w->active;
    c->counts.fragmented_clusters += w->active;
    return status;
}

static fq_status check_placed(fq_check *c, l2_walk *w, uint64_t guest_off, uint64_t at, uint64_t entry, uint64_t bitmap,
                              const fq_request *request, fq_error *error)
{
    const uint64_t host_off = entry & FQ_L2_OFFSET_MASK, cluster_size = fq_cluster_size(&c->options.geometry);
    fq_status status = FQ_OK;

    if (bitmap >> 32 & bitmap)
        fq_check_report_at(c, FQ_FOUND_SUBCLUSTER_BOTH, guest_off, at, bitmap, w->times);
    if (host_off & (cluster_size - 1))
        fq_check_report_at(c, FQ_FOUND_CLUSTER_UNALIGNED, guest_off, at, entry, w->times);
    if (w->active) {
        c->counts.allocated_clusters += w->active;
        if (w->next_off && host_off != w->next_off)
            c->counts.fragmented_clusters += w->active;
        w->next_off = host_off + cluster_size;
    }
    if (!c->options.geometry.external_data)
        status = fq_check_refer(c, FQ_ROLE_DATA, guest_off, host_off, cluster_size, w->times, error);
    if (status == FQ_OK && w->check_copied) {
        uint64_t refcount = 1;
        bool known = true;

        if (!c->options.geometry.external_data)
            status = fq_check_stored(c, host_off >> c->options.geometry.cluster_bits, request, &refcount, &known, error);
        if (status == FQ_OK && known && (refcount == 1) != !!(entry & FQ_L2_COPIED))
            fq_check_report(c, &(fq_finding){FQ_FOUND_COPIED, guest_off, at, entry, refcount, FQ_NOWHERE}, w->active);
    }
    return status;
}

static fq_status check_l2(fq_check *c, uint64_t l2_off, const l2_table *table, const fq_request *request, fq_error *error)
{
    const fq_geometry *g = &c->options.geometry;
    const unsigned entry_bits = fq_l2_entry_bits(g), l2_bits = g->cluster_bits - entry_bits;
    l2_walk w = {.active = table->active, .times = (uint64_t)table->active + table->inactive};
    fq_status status = fq_check_read(c, c->l2, (size_t)fq_cluster_size(g), l2_off, request, error);

    if (status == FQ_OK && table->active && l2_off) {
        uint64_t refcount;

        status = fq_check_stored(c, l2_off >> g->cluster_bits, request, &refcount, &w.check_copied, error);
    }
    for (uint64_t i = 0; i < UINT64_C(1) << l2_bits && status == FQ_OK; i++) {
        const uint8_t *from = c->l2 + (i << entry_bits);
        const uint64_t at = l2_off + (i << entry_bits), entry = fq_load_be64(from),
                       bitmap = g->extended_l2 ? fq_load_be64(from + 8) : 0;
        const uint64_t guest_off =
            table->active ? ((uint64_t)table->l1_index << (g->cluster_bits + l2_bits)) + (i << g->cluster_bits) : FQ_NOWHERE;

        if (entry & FQ_L2_COMPRESSED) {
            status = check_compressed(c, &w, guest_off, at, entry, bitmap, error);
            continue;
        }
        if (entry & FQ_L2_RESERVED_MASK)
            fq_check_report_at(c, FQ_FOUND_L2_RESERVED, guest_off, at, entry, w.times);
        if (entry & FQ_L2_OFFSET_MASK || (g->external_data && entry & FQ_L2_COPIED && (g->extended_l2 || !(entry & FQ_L2_ZERO))))
            status = check_placed(c, &w, guest_off, at, entry, bitmap, request, error);
        else if (bitmap & UINT32_MAX)
            fq_check_report_at(c, FQ_FOUND_SUBCLUSTER_NOWHERE, guest_off, at, bitmap, w.times);
    }
    return status;
}

/* ---- L1 tables */

static fq_status collect_l2(fq_check *c, uint64_t l2_off, const l2_table *more, const fq_request *request, fq_error *error)
{
    const unsigned bits = c->options.geometry.cluster_bits;
    l2_table **page = &c->l2_pages[l2_off >> bits >> L2_BITS], *table;

    if (l2_off & (fq_cluster_size(&c->options.geometry) - 1)) {
        c->unaligned_nbytes += fq_cluster_size(&c->options.geometry);
        if (c->unaligned_nbytes > UNALIGNED_NBYTES_MAX)
            return fq_fail(error, FQ_ERR_TOO_MANY_UNALIGNED, FQ_NOWHERE, l2_off, FQ_NOWHERE);
        if (fq_check_cancelled(request))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        return check_l2(c, l2_off, more, request, error);
    }
    if (!*page) {
        const fq_status status = fq_check_page(c, (void **)page, sizeof(**page) << L2_BITS, error);

        if (status != FQ_OK)
            return status;
    }
    table = &(*page)[l2_off >> bits & ((1u << L2_BITS) - 1)];
    if (more->active && !table->active)
        table->l1_index = more->l1_index;
    fq_check_count(&table->active, more->active);
    fq_check_count(&table->inactive, more->inactive);
    return FQ_OK;
}

static fq_status check_l1_entry(fq_check *c, uint64_t entry, uint64_t at, const l2_table *from, const fq_request *request,
                                fq_error *error)
{
    const fq_geometry *g = &c->options.geometry;
    const uint64_t l2_off = entry & FQ_L1_OFFSET_MASK, times = (uint64_t)from->active + from->inactive;
    const uint64_t guest_off = from->active ? (uint64_t)from->l1_index << (2 * g->cluster_bits - fq_l2_entry_bits(g)) : FQ_NOWHERE;
    fq_status status;

    if (entry & FQ_L1_RESERVED_MASK)
        fq_check_report_at(c, FQ_FOUND_L1_RESERVED, guest_off, at, entry, times);
    if (l2_off & (fq_cluster_size(g) - 1))
        fq_check_report_at(c, FQ_FOUND_L2_UNALIGNED, guest_off, at, entry, times);
    status = fq_check_refer(c, FQ_ROLE_L2, guest_off, l2_off, fq_cluster_size(g), times, error);
    if (status == FQ_OK && from->active && l2_off) {
        uint64_t refcount;
        bool known;

        status = fq_check_stored(c, l2_off >> g->cluster_bits, request, &refcount, &known, error);
        if (status == FQ_OK && known && (refcount == 1) != !!(entry & FQ_L2_COPIED))
            fq_check_report(c, &(fq_finding){FQ_FOUND_COPIED, guest_off, at, entry, refcount, FQ_NOWHERE}, from->active);
    }
    if (status == FQ_OK && l2_off < c->file_nbytes)
        status = collect_l2(c, l2_off, from, request, error);
    return status;
}

fq_status fq_check_l1(fq_check *c, const fq_l1_range *range, const fq_request *request, fq_error *error)
{
    uint64_t *slice = c->l1;

    for (uint64_t done = 0, n; done < range->entries && range->l1_off + done * 8 < c->file_nbytes; done += n) {
        fq_status status;

        n = range->entries - done < L1_SLICE_ENTRIES ? range->entries - done : L1_SLICE_ENTRIES;
        status = fq_check_read(c, (uint8_t *)slice, (size_t)n * 8, range->l1_off + done * 8, request, error);
        for (uint64_t i = 0; i < n && status == FQ_OK; i++) {
            const l2_table from = {range->active, range->inactive, (uint32_t)(range->l1_index + done + i)};

            if (slice[i] != 0)
                status = check_l1_entry(c, fq_load_be64((const uint8_t *)&slice[i]), range->l1_off + (done + i) * 8, &from, request,
                                        error);
        }
        if (status != FQ_OK)
            return status;
        if (fq_check_cancelled(request))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    }
    return FQ_OK;
}

/* ---- bitmaps: an entry is a cluster of bits, or says that such a cluster would be all zeroes or all ones */

fq_status fq_check_bitmap(fq_check *c, uint64_t table_off, uint64_t entries, uint32_t times, const fq_request *request,
                          fq_error *error)
{
    const uint64_t cluster_size = fq_cluster_size(&c->options.geometry);

    for (uint64_t done = 0, n; done < entries && table_off + done * 8 < c->file_nbytes; done += n) {
        fq_status status;

        n = entries - done < L1_SLICE_ENTRIES ? entries - done : L1_SLICE_ENTRIES;
        status = fq_check_read(c, (uint8_t *)c->l1, (size_t)n * 8, table_off + done * 8, request, error);
        for (uint64_t i = 0; i < n && status == FQ_OK; i++) {
            const uint64_t entry = fq_load_be64((const uint8_t *)&c->l1[i]), host_off = entry & FQ_BITMAP_OFFSET_MASK;

            if (entry & FQ_BITMAP_RESERVED_MASK || (host_off && (entry & 1 || host_off & (cluster_size - 1))))
                return fq_fail(error, FQ_ERR_BITMAP_ENTRY, FQ_NOWHERE, table_off + (done + i) * 8, entry);
            if (host_off)
                status = fq_check_refer(c, FQ_ROLE_OTHER, FQ_NOWHERE, host_off, cluster_size, times, error);
        }
        if (status != FQ_OK)
            return status;
        if (fq_check_cancelled(request))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    }
    return FQ_OK;
}

/* ---- the end */

static fq_status check_collected(fq_check *c, const fq_request *request, fq_error *error)
{
    const unsigned bits = c->options.geometry.cluster_bits;

    for (uint64_t page = 0; page <= c->clusters >> L2_BITS; page++) {
        for (uint64_t i = 0; c->l2_pages[page] && i < 1u << L2_BITS; i++) {
            const l2_table *table = &c->l2_pages[page][i];
            fq_status status;

            if (!table->active && !table->inactive)
                continue;
            status = check_l2(c, ((page << L2_BITS) + i) << bits, table, request, error);
            if (status != FQ_OK)
                return status;
            if (fq_check_cancelled(request))
                return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        }
    }
    return FQ_OK;
}

fq_status fq_check_finish(fq_check *c, const fq_request *request, fq_error *error)
{
    const fq_status status = check_collected(c, request, error);

    return status == FQ_OK ? fq_check_compare(c, request, error) : status;
}

const fq_check_counts *fq_check_result(const fq_check *c)
{
    return &c->counts;
}

/* ---- opening and closing */

fq_status fq_check_open(fq_source *source, const fq_check_options *options, const fq_request *request, fq_check **out,
                        fq_error *error)
{
    const unsigned bits = options->geometry.cluster_bits;
    const size_t table_nbytes = (size_t)options->refcount_table_entries * 8;
    fq_check *c = calloc(1, sizeof(*c));
    fq_status status = FQ_OK;

    if (!c)
        return fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    c->source = source;
    c->options = *options;
    c->file_nbytes = fq_source_size(source);
    c->clusters = (c->file_nbytes >> bits) + ((c->file_nbytes & ((UINT64_C(1) << bits) - 1)) != 0);
    if (c->clusters > INT32_MAX) {
        status = fq_fail(error, FQ_ERR_TOO_MANY_CLUSTERS, FQ_NOWHERE, FQ_NOWHERE, c->clusters);
        goto fail;
    }
    c->uses = calloc((size_t)(c->clusters >> USES_BITS) + 1, sizeof(*c->uses));
    c->l2_pages = calloc((size_t)(c->clusters >> L2_BITS) + 1, sizeof(*c->l2_pages));
    c->blocks = malloc(BLOCK_SLOTS * sizeof(*c->blocks));
    c->l1 = malloc(L1_SLICE_ENTRIES * sizeof(*c->l1));
    c->l2 = malloc((size_t)fq_cluster_size(&options->geometry));
    c->refcount_table = malloc(table_nbytes + 1);
    if (!c->uses || !c->l2_pages || !c->blocks || !c->l1 || !c->l2 || !c->refcount_table) {
        status = fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        goto fail;
    }
    for (int i = 0; i < BLOCK_SLOTS; i++)
        c->blocks[i].host_off = FQ_NOWHERE;
    status = fq_check_read(c, (uint8_t *)c->refcount_table, table_nbytes, options->refcount_table_off, request, error);
    if (status != FQ_OK)
        goto fail;
    for (size_t i = 0; i < options->refcount_table_entries; i++)
        c->refcount_table[i] = fq_load_be64((const uint8_t *)&c->refcount_table[i]);
    *out = c;
    return FQ_OK;
fail:
    fq_check_close(c);
    return status;
}

void fq_check_close(fq_check *c)
{
    if (!c)
        return;
    for (uint64_t i = 0; c->uses && i <= c->clusters >> USES_BITS; i++)
        free(c->uses[i]);
    for (uint64_t i = 0; c->l2_pages && i <= c->clusters >> L2_BITS; i++)
        free(c->l2_pages[i]);
    free(c->uses);
    free(c->l2_pages);
    free(c->blocks);
    free(c->l1);
    free(c->l2);
    free(c->refcount_table);
    free(c);
}
