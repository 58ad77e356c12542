/*
 * refcounts.c - the references that a check has counted, the refcounts that the file has, and one against the other
 *
 * Counters are in pages, made where something is counted: of a file of any length, most of which may be holes, they take memory for
 * what its tables use. Together they are bounded all the same, as a table entry of eight bytes can ask for a page.
 */
#include "check.h"

#include <stdlib.h>
#include <string.h>

enum { COUNTERS_NBYTES_MAX = 1 << 30 };

#define FILE_NBYTES_MAX (UINT64_C(0x7fffffffc0000000)) /* beyond which QEMU reads nothing */

const char *fq_finding_sentence(fq_finding_kind kind)
{
    static const char *const sentences[] = {
#define FQ_SENTENCE(name, severity, sentence) sentence,
        FQ_FINDINGS(FQ_SENTENCE)
#undef FQ_SENTENCE
    };

    return sentences[kind];
}

fq_severity fq_finding_severity(fq_finding_kind kind)
{
    static const fq_severity severities[] = {
#define FQ_SEVERITY(name, severity, sentence) severity,
        FQ_FINDINGS(FQ_SEVERITY)
#undef FQ_SEVERITY
    };

    return severities[kind];
}

void fq_check_report(fq_check *c, const fq_finding *found, uint64_t times)
{
    const fq_severity severity = fq_finding_severity(found->kind);

    if (severity == FQ_CORRUPTION)
        c->counts.corruptions += times;
    else if (severity == FQ_LEAK)
        c->counts.leaks += times;
    else if (severity == FQ_CHECK_ERROR)
        c->counts.check_errors += times;
    else
        c->counts.overlaps += times;
    if (c->reports[found->kind]++ < FQ_CHECK_REPORTS_MAX)
        c->options.report(c->options.opaque, found, times);
    else
        c->counts.not_reported++;
}

void fq_check_report_at(fq_check *c, fq_finding_kind kind, uint64_t guest_off, uint64_t host_off, uint64_t value, uint64_t times)
{
    fq_check_report(c, &(fq_finding){kind, guest_off, host_off, value, FQ_NOWHERE, FQ_NOWHERE}, times);
}

/* ---- memory */

fq_status fq_check_page(fq_check *c, void **page, size_t nbytes, fq_error *error)
{
    if (c->counters_nbytes + nbytes > COUNTERS_NBYTES_MAX)
        return fq_fail(error, FQ_ERR_TOO_MANY_CLUSTERS, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    *page = calloc(1, nbytes);
    if (!*page)
        return fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    c->counters_nbytes += nbytes;
    return FQ_OK;
}

void fq_check_count(uint32_t *to, uint64_t n)
{
    *to = n > UINT32_MAX - *to ? UINT32_MAX : *to + (uint32_t)n;
}

fq_status fq_check_read(fq_check *c, uint8_t *buf, size_t nbytes, uint64_t host_off, const fq_request *request, fq_error *error)
{
    size_t got = 0;
    fq_status status = FQ_OK;

    if (host_off < c->file_nbytes)
        status = fq_source_read(c->source, request, buf, nbytes, host_off, &got, error);
    if (status == FQ_OK && got < nbytes && host_off + got < c->file_nbytes) /* it was cut since: what is lost is no zero */
        status = fq_fail(error, FQ_ERR_SHORT_READ, FQ_NOWHERE, host_off + got, c->file_nbytes);
    if (status == FQ_OK)
        memset(buf + got, 0, nbytes - got);
    return status;
}

/* ---- refcounts as they stand in the file */

static uint64_t refcount_max(const fq_check *c)
{
    return c->options.refcount_order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << c->options.refcount_order)) - 1;
}

static uint64_t load_refcount(const uint8_t *at, uint64_t index, unsigned order)
{
    const unsigned bits = 1u << order;
    uint64_t value = 0;

    if (bits < 8) /* the first of a byte is in its lowest bits */
        return at[index * bits / 8] >> (index * bits % 8) & ((1u << bits) - 1);
    for (unsigned i = 0; i < bits / 8; i++)
        value = value << 8 | at[index * (bits / 8) + i];
    return value;
}

fq_status fq_check_stored(fq_check *c, uint64_t cluster, const fq_request *request, uint64_t *refcount, bool *known,
                          fq_error *error)
{
    const unsigned order = c->options.refcount_order, block_bits = c->options.geometry.cluster_bits + 3 - order;
    const uint64_t index = cluster >> block_bits, in_block = cluster & ((UINT64_C(1) << block_bits) - 1);
    const uint64_t block_off = index < c->options.refcount_table_entries ? c->refcount_table[index] & FQ_REFCOUNT_OFFSET_MASK : 0;
    const uint64_t slice_size =
        fq_cluster_size(&c->options.geometry) < BLOCK_SLICE_NBYTES ? fq_cluster_size(&c->options.geometry) : BLOCK_SLICE_NBYTES;
    const uint64_t byte = (in_block << order) / 8, host_off = block_off + byte / slice_size * slice_size;
    const uint64_t per_slice = slice_size * 8 >> order;
    block_slice *slice = &c->blocks[host_off / slice_size % BLOCK_SLOTS];

    *refcount = 0;
    *known = (block_off & (fq_cluster_size(&c->options.geometry) - 1)) == 0 && block_off < FILE_NBYTES_MAX;
    if (block_off == 0 || !*known)
        return FQ_OK;
    if (slice->host_off != host_off) {
        fq_status status;

        slice->host_off = FQ_NOWHERE;
        status = fq_check_read(c, slice->bytes, (size_t)slice_size, host_off, request, error);
        if (status != FQ_OK)
            return status;
        slice->host_off = host_off;
    }
    *refcount = load_refcount(slice->bytes, in_block % per_slice, order);
    return FQ_OK;
}

/* ---- references */

static fq_status use_cluster(fq_check *c, uint64_t cluster, fq_role role, uint64_t times, fq_error *error)
{
    uses_page **page = &c->uses[cluster >> USES_BITS];
    const size_t at = cluster & ((1u << USES_BITS) - 1);

    if (!*page) {
        const fq_status status = fq_check_page(c, (void **)page, sizeof(**page), error);

        if (status != FQ_OK)
            return status;
    }
    fq_check_count(&(*page)->count[at], times);
    (*page)->roles[at] |= (uint8_t)role;
    return FQ_OK;
}

fq_status fq_check_refer(fq_check *c, fq_role role, uint64_t guest_off, uint64_t host_off, uint64_t nbytes, uint64_t times,
                         fq_error *error)
{
    const unsigned bits = c->options.geometry.cluster_bits;

    if (nbytes == 0)
        return FQ_OK;
    if (nbytes > INT64_MAX || host_off > INT64_MAX - nbytes || host_off + nbytes >= c->file_nbytes + (UINT64_C(1) << bits)) {
        fq_check_report_at(c, FQ_FOUND_BEYOND_END, guest_off, host_off, nbytes, times);
        return FQ_OK;
    }
    for (uint64_t cluster = host_off >> bits; cluster <= (host_off + nbytes - 1) >> bits; cluster++) {
        const fq_status status = use_cluster(c, cluster, role, times, error);

        if (status != FQ_OK)
            return status;
    }
    return FQ_OK;
}

fq_status fq_check_use(fq_check *c, fq_role role, uint64_t host_off, uint64_t nbytes, uint64_t times, fq_error *error)
{
    return fq_check_refer(c, role, FQ_NOWHERE, host_off, nbytes, times, error);
}

/* ---- refcounts against references */

static uint64_t references(const fq_check *c, uint64_t cluster)
{
    const uses_page *page = c->uses[cluster >> USES_BITS];
    const uint64_t count = page ? page->count[cluster & ((1u << USES_BITS) - 1)] : 0;

    return count < refcount_max(c) ? count : refcount_max(c);
}

static fq_status check_blocks(fq_check *c, const fq_request *request, fq_error *error)
{
    const unsigned bits = c->options.geometry.cluster_bits;

    for (uint64_t i = 0; i < c->options.refcount_table_entries; i++) {
        const uint64_t entry = c->refcount_table[i], block_off = entry & FQ_REFCOUNT_OFFSET_MASK;
        const uint64_t at = c->options.refcount_table_off + i * 8;
        fq_status status;

        if (entry & FQ_REFCOUNT_RESERVED_MASK) {
            fq_check_report_at(c, FQ_FOUND_BLOCK_RESERVED, FQ_NOWHERE, at, entry, 1);
        } else if (block_off & (fq_cluster_size(&c->options.geometry) - 1)) {
            fq_check_report_at(c, FQ_FOUND_BLOCK_UNALIGNED, FQ_NOWHERE, at, entry, 1);
        } else if (block_off >> bits >= c->clusters) {
            fq_check_report_at(c, FQ_FOUND_BLOCK_BEYOND_END, FQ_NOWHERE, at, entry, 1);
        } else if (block_off) {
            status =
                fq_check_refer(c, FQ_ROLE_REFCOUNT_BLOCK, FQ_NOWHERE, block_off, fq_cluster_size(&c->options.geometry), 1, error);
            if (status != FQ_OK)
                return status;
            if (references(c, block_off >> bits) != 1)
                fq_check_report_at(c, FQ_FOUND_BLOCK_SHARED, FQ_NOWHERE, at, entry, 1);
        }
        if (i % 4096 == 0 && fq_check_cancelled(request))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    }
    return FQ_OK;
}

/* Neighbours of which the same is to be said are said to be so once. */
typedef struct found_run {
    fq_finding found;
    uint64_t times;
} found_run;

static void end_run(fq_check *c, found_run *run)
{
    if (run->times)
        fq_check_report(c, &run->found, run->times);
    run->times = 0;
}

static void extend_run(fq_check *c, found_run *run, const fq_finding *found)
{
    const uint64_t end = run->found.host_off + (run->times << c->options.geometry.cluster_bits);

    if (run->times && run->found.kind == found->kind && run->found.refcount == found->refcount &&
        run->found.references == found->references && end == found->host_off) {
        run->times++;
        return;
    }
    end_run(c, run);
    *run = (found_run){*found, 1};
}

static void check_uses(fq_check *c, uint64_t cluster)
{
    const uses_page *page = c->uses[cluster >> USES_BITS];
    const size_t at = cluster & ((1u << USES_BITS) - 1);
    const uint64_t host_off = cluster << c->options.geometry.cluster_bits;

    if (!page)
        return;
    if (page->count[at] > refcount_max(c))
        fq_check_report_at(c, FQ_FOUND_OVERFLOW, FQ_NOWHERE, host_off, page->count[at], page->count[at] - refcount_max(c));
    if (page->roles[at] & (page->roles[at] - 1))
        fq_check_report_at(c, FQ_FOUND_OVERLAP, FQ_NOWHERE, host_off, page->roles[at], 1);
}

/* Stretches where no block is and nothing is used need no look at each cluster. */
static bool is_blank(const fq_check *c, uint64_t cluster, uint64_t *next)
{
    const unsigned block_bits = c->options.geometry.cluster_bits + 3 - c->options.refcount_order;
    const uint64_t page_end = ((cluster >> USES_BITS) + 1) << USES_BITS, block_end = ((cluster >> block_bits) + 1) << block_bits;

    *next = page_end < block_end ? page_end : block_end;
    return !c->uses[cluster >> USES_BITS] && (cluster >> block_bits >= c->options.refcount_table_entries ||
                                              (c->refcount_table[cluster >> block_bits] & FQ_REFCOUNT_OFFSET_MASK) == 0);
}

fq_status fq_check_compare(fq_check *c, const fq_request *request, fq_error *error)
{
    found_run run = {.times = 0};
    uint64_t next, count = c->clusters, steps = 0;
    fq_status status = check_blocks(c, request, error);

    if (status != FQ_OK)
        return status;
    c->counts.image_end_off = fq_cluster_size(&c->options.geometry);
    if (c->uses[count >> USES_BITS] && c->uses[count >> USES_BITS]->count[count & ((1u << USES_BITS) - 1)])
        count++; /* something ends behind the end of the file */
    for (uint64_t cluster = 0; cluster < count; cluster = next) {
        fq_finding found = {FQ_FOUND_UNKNOWN, FQ_NOWHERE, cluster << c->options.geometry.cluster_bits,
                            FQ_NOWHERE,       FQ_NOWHERE, references(c, cluster)};
        uint64_t refcount;
        bool known;

        if (++steps % (1 << 16) == 0 && fq_check_cancelled(request))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        if (is_blank(c, cluster, &next))
            continue;
        next = cluster + 1;
        status = fq_check_stored(c, cluster, request, &refcount, &known, error);
        if (status != FQ_OK)
            return status;
        check_uses(c, cluster);
        if (!known) {
            extend_run(c, &run, &found);
        } else {
            if (refcount > 0 || found.references > 0)
                c->counts.image_end_off = (cluster + 1) << c->options.geometry.cluster_bits;
            found.kind = refcount < found.references ? FQ_FOUND_TOO_LOW : FQ_FOUND_LEAK;
            found.refcount = refcount;
            if (refcount != found.references)
                extend_run(c, &run, &found);
        }
    }
    end_run(c, &run);
    return FQ_OK;
}
