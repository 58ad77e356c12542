/*
 * l2.c - guest range to runs of one kind
 *
 * L2 tables are read in slices of at most 64 KiB, turned to the machine's byte order once, and kept in the cache; a look-up that
 * hits is a hash, a lock and a few additions. So the walk keeps no position: each call finds its slice anew, costs some 50 ns, and
 * returns a run as long as the slice has it. Reading in slices also confines damage: a table cut short by the end of the file is an
 * error only where it is cut.
 *
 * A stretch without L2 tables is walked by the L1 table alone, which is what makes an empty disk of 64 TiB quick to walk.
 */
#include "internal.h"
#include "layout.h"

enum {
    /* Nothing is looked at twice without need: a layer above others sees its run cut short by what they hold, and a run that is cut
       is looked up again from there. So the look ahead is bounded: over a backing file narrowly, else so that it costs
       microseconds. */
    LOOK_AHEAD_OVER_BACKING = 64,
    LOOK_AHEAD_L1 = 4096,
    LOOKS_BETWEEN_POLLS = 16,
};

typedef struct slice_fill {
    fq_reader *reader;
    const fq_request *request;
    uint64_t guest_off, host_off;
    size_t nbytes;
    fq_error *error;
} slice_fill;

static fq_status fill_slice(void *arg, uint8_t *data)
{
    slice_fill *f = arg;
    size_t got;
    fq_status status = fq_source_read(f->reader->source, f->request, data, f->nbytes, f->host_off, &got, f->error);

    if (status != FQ_OK) {
        f->error->guest_off = f->guest_off;
        return status;
    }
    if (got < f->nbytes)
        return fq_fail(f->error, FQ_ERR_L2_EOF, f->guest_off, f->host_off, fq_source_size(f->reader->source));
    fq_count(&f->reader->bytes_fetched, got);
    for (size_t i = 0; i < f->nbytes; i += 8)
        *(uint64_t *)(void *)(data + i) = fq_load_be64(data + i);
    return FQ_OK;
}

/* The slice of L2 entries for guest_off, and the run of decodable units in it that continue the first one. */
static fq_status resolve_qcow2(fq_reader *r, uint64_t guest_off, uint64_t nbytes, const fq_request *request, fq_run *run,
                               fq_error *error)
{
    const fq_geometry *g = &r->geometry;
    const unsigned entry_bits = fq_l2_entry_bits(g), l2_bits = g->cluster_bits - entry_bits, unit_bits = fq_unit_bits(g);
    const unsigned slice_bits = g->cluster_bits < FQ_TABLE_SLICE_BITS ? g->cluster_bits : FQ_TABLE_SLICE_BITS;
    const uint64_t cluster_size = fq_cluster_size(g), unit_size = UINT64_C(1) << unit_bits;
    const unsigned l1_shift = g->cluster_bits + l2_bits;
    uint64_t l1_index = guest_off >> l1_shift;
    const uint64_t l1_entry = l1_index < r->l1_entries ? r->l1[l1_index] : 0, l2_off = l1_entry & FQ_L1_OFFSET_MASK;
    const uint64_t in_table = (guest_off >> g->cluster_bits & ((UINT64_C(1) << l2_bits) - 1)) << entry_bits;
    const uint64_t slice_off = l2_off + (in_table >> slice_bits << slice_bits);
    slice_fill fill = {r, request, guest_off, slice_off, (size_t)1 << slice_bits, error};
    const uint64_t *entries;
    uint64_t covered;
    fq_status status;
    fq_block *block;
    fq_mapping m;
    size_t at;
    unsigned sub;
    bool filled, placed;

    *run = (fq_run){.layer = r, .kind = FQ_UNALLOCATED, .guest_off = guest_off, .nbytes = nbytes, .host_off = FQ_NOWHERE};
    if (l2_off == 0) {
        covered = ((l1_index + 1) << l1_shift) - guest_off;
        for (unsigned n = r->backing ? LOOK_AHEAD_OVER_BACKING : LOOK_AHEAD_L1; covered < nbytes && n > 0; n--) {
            if (++l1_index >= r->l1_entries) { /* nothing comes after the table */
                covered = nbytes;
                break;
            }
            if ((r->l1[l1_index] & FQ_L1_OFFSET_MASK) != 0)
                break;
            covered += UINT64_C(1) << l1_shift;
        }
        if (covered < nbytes)
            run->nbytes = covered;
        return FQ_OK;
    }
    if (l2_off & (cluster_size - 1))
        return fq_fail(error, FQ_ERR_L2_UNALIGNED, guest_off, FQ_NOWHERE, l1_entry);

    status = fq_cache_get(r->tables, r->owner, slice_off, fill.nbytes, fill_slice, &fill, &filled, &block);
    if (status != FQ_OK) /* what was not even tried says nothing of the place */
        return filled ? status : fq_fail(error, status, guest_off, slice_off, FQ_NOWHERE);
    entries = (const uint64_t *)(const void *)fq_block_data(block);
    at = (size_t)(in_table & (fill.nbytes - 1)) / 8;
    sub = g->extended_l2 ? (unsigned)(guest_off >> unit_bits & (FQ_SUBCLUSTERS - 1)) : 0;
    status = fq_decode(g, entries[at], g->extended_l2 ? entries[at + 1] : 0, sub, &m);
    if (status != FQ_OK) {
        const bool of_bitmap = status == FQ_ERR_SUBCLUSTER_BOTH || status == FQ_ERR_SUBCLUSTER_NOWHERE;

        fq_fail(error, status, guest_off, slice_off + at * 8, entries[at + of_bitmap]);
        goto out;
    }
    run->kind = m.kind;
    placed = m.kind == FQ_DATA || m.kind == FQ_ZERO_ALLOC || m.kind == FQ_UNALLOCATED_ALLOC;
    if (g->external_data && placed && m.host_off != (guest_off & ~(cluster_size - 1))) {
        status = fq_fail(error, FQ_ERR_OTHER_PLACE, guest_off, m.host_off, entries[at]);
        goto out;
    }
    if (m.kind == FQ_COMPRESSED) {
        run->host_off = m.host_off;
        run->entry = entries[at];
        run->in_nbytes = m.in_nbytes;
        run->skip = (uint32_t)(guest_off & (cluster_size - 1));
        covered = cluster_size - run->skip;
    } else {
        const uint64_t in_cluster = guest_off & (cluster_size - 1);
        const bool shows_backing = r->backing && (m.kind == FQ_UNALLOCATED || m.kind == FQ_UNALLOCATED_ALLOC);
        unsigned units = shows_backing ? LOOK_AHEAD_OVER_BACKING : UINT32_MAX;
        uint64_t next_off = m.host_off + ((in_cluster >> unit_bits) + 1) * unit_size; /* where the next unit continues */
        fq_mapping next;

        if (placed)
            run->host_off = m.host_off + in_cluster;
        covered = unit_size - (guest_off & (unit_size - 1));
        while (covered < nbytes && --units > 0) {
            if (!g->extended_l2 || ++sub == FQ_SUBCLUSTERS) {
                at += (size_t)1 << (entry_bits - 3);
                sub = 0;
            }
            if (at * 8 >= fill.nbytes || fq_decode(g, entries[at], g->extended_l2 ? entries[at + 1] : 0, sub, &next) != FQ_OK ||
                next.kind != m.kind || (placed && next.host_off + sub * unit_size != next_off))
                break;
            next_off += unit_size;
            covered += unit_size;
        }
    }
    if (covered < nbytes)
        run->nbytes = covered;
out:
    fq_cache_release(r->tables, block, 0, fill.nbytes);
    return status;
}

static void resolve_raw(fq_reader *r, uint64_t off, uint64_t nbytes, bool find_holes, fq_run *run)
{
    bool hole = false;

    *run = (fq_run){.layer = r, .guest_off = off, .nbytes = nbytes, .host_off = off};
    if (find_holes)
        run->nbytes = fq_source_run(r->source, off, nbytes, &hole);
    run->kind = hole ? FQ_ZERO_ALLOC : FQ_DATA;
}

fq_status fq_resolve(fq_reader *reader, uint64_t guest_off, uint64_t nbytes, bool find_holes, const fq_request *request,
                     fq_run *run, fq_error *error)
{
    for (uint32_t depth = 0;; depth++) {
        if (reader->raw) {
            resolve_raw(reader, guest_off, nbytes, find_holes, run);
        } else {
            const fq_status status = resolve_qcow2(reader, guest_off, nbytes, request, run, error);

            if (status != FQ_OK) {
                error->depth = depth;
                return status;
            }
        }
        run->depth = depth;
        if (run->kind != FQ_UNALLOCATED && run->kind != FQ_UNALLOCATED_ALLOC)
            return FQ_OK;
        /* A backing file that is shorter than its overlay is followed by zeroes. */
        if (!reader->backing || guest_off >= reader->backing->size)
            return FQ_OK;
        nbytes = run->nbytes;
        reader = reader->backing;
        if (nbytes > reader->size - guest_off)
            nbytes = reader->size - guest_off;
    }
}

fq_status fq_reader_map(fq_reader *reader, uint64_t guest_off, uint64_t end, fq_extent *extents, size_t capacity, size_t *count,
                        const fq_request *request, fq_error *error)
{
    uint64_t polled_at_ms = fq_now_ms();

    *count = 0;
    if (end > reader->size || guest_off > end)
        return fq_fail(error, FQ_ERR_ARGUMENT, guest_off, FQ_NOWHERE, end);
    for (unsigned looked_at = 1; guest_off < end; looked_at++) {
        fq_extent *last = *count ? &extents[*count - 1] : NULL;
        fq_status status;
        fq_run run;

        /* A look may go through many layers, and read a table in each. */
        if (request && request->poll && looked_at % LOOKS_BETWEEN_POLLS == 0 && fq_now_ms() - polled_at_ms >= FQ_POLL_MS) {
            polled_at_ms = fq_now_ms();
            if (request->poll(request->user, guest_off))
                return fq_fail(error, FQ_ERR_CANCELLED, guest_off, FQ_NOWHERE, FQ_NOWHERE);
        }
        status = fq_resolve(reader, guest_off, end - guest_off, true, request, &run, error);
        if (status != FQ_OK)
            return status;
        /* Where bytes lie that cannot be used there is nobody's concern. */
        if (run.kind == FQ_COMPRESSED || run.layer->crypt.run)
            run.host_off = FQ_NOWHERE;
        if (last && last->kind == run.kind && last->depth == run.depth &&
            (run.host_off == FQ_NOWHERE || last->host_off + last->nbytes == run.host_off)) {
            last->nbytes += run.nbytes;
        } else {
            if (*count == capacity)
                return FQ_OK;
            extents[(*count)++] = (fq_extent){run.guest_off, run.nbytes, run.host_off, run.depth, run.kind};
        }
        guest_off += run.nbytes;
    }
    return FQ_OK;
}
