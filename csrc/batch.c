/*
 * batch.c - fetch, inflate, scatter: from planned runs to the caller's buffers
 *
 * Compressed clusters that are neighbours in the file are fetched with one read, and each is inflated straight into the caller's
 * buffer; only a cluster that a buffer's border cuts goes through a buffer of ours.
 *
 * A cluster of which only a part is wanted goes through the cache, since the rest of it is likely to be asked for next. Whole
 * clusters do if the request is a small one: who reads such pieces comes back to many of them. In a large one they are looked for
 * in the cache but not put there: it would cost a copy, and push out what is asked for again.
 *
 * Where a file is remote, all that the batch needs of it is first fetched by one call (remote.c), and then read from there.
 *
 * A compressed cluster that runs past the end of the file is inflated from the bytes that are there. QEMU adds zeroes to them, and
 * so takes a stream that was cut for one that happens to go on with zeroes; here it is an error.
 *
 * What a file can make us allocate here: scratch buffers of some twice the batch, as a descriptor can claim two cluster sizes of
 * input.
 */
#include "internal.h"
#include "layout.h"

#include <string.h>

enum {
    MERGE_GAP = 4 << 10, /* reading over a gap of so much is cheaper than a second read */
    MERGE_NBYTES = 1 << 20,
    BOUNCE_BELOW = 32 << 10, /* plain data for smaller buffers is read together, then scattered */
    BOUNCE_NBYTES = 256 << 10,
    POLL_NBYTES = 128 << 10, /* of compressed data: some 30 ms where a stream is as slow as one can be made */
};

/* An error at a guest offset within a run. */
static fq_status fail_at(fq_error *error, fq_status status, const fq_run *run, uint64_t guest_off, uint64_t host_off,
                         uint64_t value)
{
    fq_fail(error, status, guest_off, host_off, value);
    error->depth = run->depth;
    error->in_data_file = run->kind == FQ_DATA && run->layer->data != run->layer->source;
    return status;
}

static fq_status fail_in_run(fq_error *error, fq_status status, const fq_run *run, uint64_t host_off, uint64_t value)
{
    return fail_at(error, status, run, run->guest_off, host_off, value);
}

/* ---- destinations */

/* Where the byte of a guest offset goes, and how many can follow it there. Empty buffers hold nothing. */
static uint8_t *dest_at(const fq_dest *dest, uint64_t guest_off, uint64_t *room)
{
    const fq_iovec *iov = dest->iov;
    const uint64_t pos = guest_off - dest->guest_off;
    size_t low = 0, high = dest->niov;

    while (high - low > 1) {
        const size_t mid = low + (high - low) / 2;

        if (iov[mid].start <= pos)
            low = mid;
        else
            high = mid;
    }
    *room = iov[low].nbytes - (pos - iov[low].start);
    return iov[low].base + (pos - iov[low].start);
}

/* Copy to the buffers from a guest offset on; from NULL come zeroes. */
static void scatter(const fq_dest *dest, uint64_t guest_off, const uint8_t *from, uint64_t nbytes)
{
    while (nbytes > 0) {
        uint64_t room;
        uint8_t *to = dest_at(dest, guest_off, &room);

        if (room > nbytes)
            room = nbytes;
        if (from) {
            memcpy(to, from, room);
            from += room;
        } else {
            memset(to, 0, room);
        }
        guest_off += room;
        nbytes -= room;
    }
}

/* ---- plain data */

/*
 * A data cluster that the end of the file cuts is followed by zeroes, as for QEMU, and so is the last sector of a raw file. One
 * that starts beyond the end is an error here, where QEMU gives zeroes: the file was cut, and the bytes are lost.
 */
static fq_status read_data(fq_job *job, const fq_batch *b, const fq_run *run, fq_scratch *scratch, uint64_t guest_off, uint8_t *to,
                           size_t nbytes, fq_error *error)
{
    fq_reader *layer = run->layer;
    const uint64_t host_off = run->host_off + (guest_off - run->guest_off);
    size_t got;
    fq_status status = fq_remote_read(b, scratch, layer->data, job->request, to, nbytes, host_off, &got, error);

    if (status != FQ_OK) {
        error->guest_off = guest_off + got;
        error->depth = run->depth;
        error->in_data_file = layer->data != layer->source;
        return status;
    }
    fq_count(&layer->bytes_fetched, got);
    if (got < nbytes) {
        const uint64_t size = fq_source_once(layer->data), mask = (layer->raw ? 512 : fq_cluster_size(&layer->geometry)) - 1;
        const uint64_t last = (host_off + nbytes - 1) & ~mask, first_lost = (size + mask) & ~mask;

        /* A file that has lost its end since, or one that grows at this moment: where it ends is not known. */
        if (host_off + got < size)
            return fail_at(error, FQ_ERR_SHORT_READ, run, guest_off + got, host_off + got, size);
        if (last >= size) {
            const uint64_t lost = first_lost > host_off ? first_lost : host_off;

            return fail_at(error, FQ_ERR_CLUSTER_EOF, run, guest_off + (lost - host_off), lost & ~mask, size);
        }
        memset(to + got, 0, nbytes - got);
    }
    if (layer->crypt.run) {
        if (!fq_scratch_grow(&scratch->crypt, &scratch->crypt_capacity, FQ_CRYPT_WORK_NBYTES))
            return fail_at(error, FQ_ERR_NOMEM, run, guest_off, FQ_NOWHERE, FQ_NOWHERE);
        status = fq_crypt_decrypt(&layer->crypt, job->request ? job->request->user : NULL, to, nbytes,
                                  (layer->crypt.by_guest_off ? guest_off : host_off) / FQ_SECTOR_NBYTES, scratch->crypt);
        if (status != FQ_OK)
            return fail_at(error, status, run, guest_off, host_off, FQ_NOWHERE);
    }
    return FQ_OK;
}

/* What is encrypted is read in whole sectors: guest and host offsets have the same place in theirs. */
static fq_status fetch_data(fq_job *job, const fq_batch *b, const fq_run *run, fq_scratch *scratch, const fq_dest *dest,
                            fq_error *error)
{
    const size_t sector = run->layer->crypt.run ? FQ_SECTOR_NBYTES : 1;
    const uint64_t end = run->guest_off + run->nbytes;

    for (uint64_t at = run->guest_off, n; at < end; at += n) {
        const size_t before = at % sector;
        uint8_t *to = dest_at(dest, at, &n);
        fq_status status;

        if (n > end - at)
            n = end - at;
        if ((n == end - at || n >= BOUNCE_BELOW) && before == 0 && n >= sector) {
            n -= n % sector;
            status = read_data(job, b, run, scratch, at, to, (size_t)n, error);
        } else {
            size_t span;

            n = end - at < BOUNCE_NBYTES - before ? end - at : BOUNCE_NBYTES - before;
            span = (before + (size_t)n + sector - 1) / sector * sector;
            if (!fq_scratch_grow(&scratch->out, &scratch->out_capacity, BOUNCE_NBYTES))
                return fail_in_run(error, FQ_ERR_NOMEM, run, FQ_NOWHERE, FQ_NOWHERE);
            status = read_data(job, b, run, scratch, at - before, scratch->out, span, error);
            if (status == FQ_OK)
                scatter(dest, at, scratch->out + before, n);
            else if (error->guest_off < at)
                error->guest_off = at;
        }
        if (status != FQ_OK)
            return status;
    }
    return FQ_OK;
}

/* ---- compressed clusters */

static fq_status inflate_run(const fq_run *run, fq_scratch *scratch, const uint8_t *in, size_t in_nbytes, uint8_t *out,
                             fq_error *error)
{
    const fq_geometry *g = &run->layer->geometry;
    const fq_status status = fq_inflater_run(scratch->inflater, g->codec, in, in_nbytes, out, (size_t)fq_cluster_size(g));

    if (status != FQ_OK)
        return fail_in_run(error, status, run, run->host_off, run->entry);
    fq_count(&run->layer->clusters_inflated, 1);
    return FQ_OK;
}

/* Read the clusters among runs [from, to), neighbours in the file, with one read to scratch->in + at. */
static fq_status fetch_group(fq_job *job, fq_batch *b, fq_scratch *scratch, size_t from, size_t to, size_t at, size_t nbytes,
                             fq_error *error)
{
    const fq_run *first = &b->runs[from];
    size_t got;
    fq_status status =
        fq_remote_read(b, scratch, first->layer->source, job->request, scratch->in + at, nbytes, first->host_off, &got, error);

    if (status != FQ_OK) {
        error->guest_off = first->guest_off;
        error->depth = first->depth;
        return status;
    }
    fq_count(&first->layer->bytes_fetched, got);
    for (size_t i = from; i < to; i++) {
        const fq_run *run = &b->runs[i];
        const size_t rel = (size_t)(run->host_off - first->host_off);

        if (!fq_is_to_be_fetched(b, i))
            continue;
        if (rel >= got)
            return fail_in_run(error, FQ_ERR_COMPRESSED_EOF, run, run->host_off, fq_source_size(run->layer->source));
        b->in_at[i] = at + rel;
        b->in_got[i] = got - rel < run->in_nbytes ? got - rel : run->in_nbytes;
    }
    return FQ_OK;
}

/* Which clusters that are wanted whole are cached, or are being inflated by others. */
static void look_up_clusters(fq_batch *b)
{
    for (size_t i = 0; i < b->count; i++) {
        const fq_run *run = &b->runs[i];

        if (!fq_is_whole(run))
            continue;
        b->hit[i] = fq_cache_peek(run->layer->clusters, run->layer->owner, run->entry);
        if (!b->hit[i])
            b->late[i] = fq_cache_look(run->layer->clusters, run->layer->owner, run->entry) != FQ_ABSENT;
    }
}

/* Fetch the clusters that are wanted whole and not cached: groups of neighbours with one read each. */
static fq_status fetch_compressed(fq_job *job, fq_batch *b, fq_scratch *scratch, fq_error *error)
{
    size_t capacity = 0, used = 0;

    for (size_t i = 0; i < b->count; i++)
        if (fq_is_to_be_fetched(b, i))
            capacity += b->runs[i].in_nbytes + MERGE_GAP;
    if (!fq_scratch_grow(&scratch->in, &scratch->in_capacity, capacity))
        return fail_in_run(error, FQ_ERR_NOMEM, &b->runs[0], FQ_NOWHERE, FQ_NOWHERE);

    for (size_t i = 0, next; i < b->count; i = next) {
        const fq_run *run = &b->runs[i];
        uint64_t end = run->host_off + run->in_nbytes;
        fq_status status;

        next = i + 1;
        if (!fq_is_to_be_fetched(b, i))
            continue;
        for (; next < b->count; next++) {
            const fq_run *more = &b->runs[next];
            const uint64_t more_end = more->host_off + more->in_nbytes;

            if (!fq_is_to_be_fetched(b, next))
                continue;
            if (more->layer != run->layer || more->host_off < run->host_off || more->host_off > end + MERGE_GAP ||
                more_end - run->host_off > MERGE_NBYTES)
                break;
            if (more_end > end)
                end = more_end;
        }
        if (b->by_caller)
            fq_job_poll(job);
        if (atomic_load(&job->cancelled))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        status = fetch_group(job, b, scratch, i, next, used, (size_t)(end - run->host_off), error);
        if (status != FQ_OK)
            return status;
        used += (size_t)(end - run->host_off);
    }
    return FQ_OK;
}

typedef struct cluster_fill {
    const fq_batch *b; /* NULL: none */
    const fq_request *request;
    const fq_run *run;
    fq_scratch *scratch;
    fq_error *error;
} cluster_fill;

static fq_status fill_cluster(void *arg, uint8_t *data)
{
    const cluster_fill *f = arg;
    const fq_run *run = f->run;
    size_t got;
    fq_status status;

    if (!fq_scratch_grow(&f->scratch->in, &f->scratch->in_capacity, run->in_nbytes))
        return fail_in_run(f->error, FQ_ERR_NOMEM, run, FQ_NOWHERE, FQ_NOWHERE);
    status = fq_remote_read(f->b, f->scratch, run->layer->source, f->request, f->scratch->in, run->in_nbytes, run->host_off, &got,
                            f->error);
    if (status != FQ_OK) {
        f->error->guest_off = run->guest_off;
        f->error->depth = run->depth;
        return status;
    }
    fq_count(&run->layer->bytes_fetched, got);
    if (got == 0)
        return fail_in_run(f->error, FQ_ERR_COMPRESSED_EOF, run, run->host_off, fq_source_size(run->layer->source));
    return inflate_run(run, f->scratch, f->scratch->in, got, data, f->error);
}

/* Once a read, by the thread that waits for it. */
static void note_miss(fq_job *job, const fq_batch *b, const fq_run *run)
{
    if (!job->keep || !b->by_caller || job->missed)
        return;
    job->missed = true;
    fq_ahead_missed(job->reader, run->guest_off);
}

static fq_status read_part_of_cluster(fq_job *job, const fq_batch *b, const fq_run *run, fq_scratch *scratch, const fq_dest *dest,
                                      fq_error *error)
{
    fq_reader *layer = run->layer;
    fq_block *block = fq_cache_peek(layer->clusters, layer->owner, run->entry);
    bool filled = false;

    if (!block) {
        cluster_fill fill = {b, job->request, run, scratch, error};
        fq_status status;

        if (fq_cache_look(layer->clusters, layer->owner, run->entry) == FQ_COMING)
            fq_ahead_help(job->reader, scratch);
        else
            note_miss(job, b, run);
        status = fq_cache_get(layer->clusters, layer->owner, run->entry, (size_t)fq_cluster_size(&layer->geometry), fill_cluster,
                              &fill, &filled, &block);
        if (status != FQ_OK)
            return filled ? status : fail_in_run(error, status, run, FQ_NOWHERE, FQ_NOWHERE);
    }
    if (!filled)
        fq_count(&layer->cache_hits, 1);
    scatter(dest, run->guest_off, fq_block_data(block) + run->skip, run->nbytes);
    if (fq_cache_release(layer->clusters, block, run->skip, run->skip + run->nbytes) && !filled)
        fq_ahead_used(job->reader);
    return FQ_OK;
}

typedef struct fetched_fill {
    const fq_batch *b;
    size_t i;
    fq_scratch *scratch;
    fq_error *error;
} fetched_fill;

static fq_status fill_fetched(void *arg, uint8_t *data)
{
    const fetched_fill *f = arg;

    return inflate_run(&f->b->runs[f->i], f->scratch, f->scratch->in + f->b->in_at[f->i], f->b->in_got[f->i], data, f->error);
}

static fq_status read_and_keep(fq_batch *b, size_t i, fq_scratch *scratch, const fq_dest *dest, fq_error *error)
{
    const fq_run *run = &b->runs[i];
    fetched_fill fill = {b, i, scratch, error};
    fq_block *block;
    bool filled;
    fq_status status = fq_cache_get(run->layer->clusters, run->layer->owner, run->entry, (size_t)run->nbytes, fill_fetched, &fill,
                                    &filled, &block);

    if (status != FQ_OK)
        return filled ? status : fail_in_run(error, status, run, FQ_NOWHERE, FQ_NOWHERE);
    if (!filled)
        fq_count(&run->layer->cache_hits, 1);
    scatter(dest, run->guest_off, fq_block_data(block), run->nbytes);
    fq_cache_release(run->layer->clusters, block, 0, (size_t)run->nbytes);
    return FQ_OK;
}

static fq_status read_whole_cluster(fq_job *job, fq_batch *b, size_t i, fq_scratch *scratch, const fq_dest *dest, fq_error *error)
{
    const fq_run *run = &b->runs[i];
    uint64_t room;
    uint8_t *to = dest_at(dest, run->guest_off, &room);
    fq_status status;

    if (b->hit[i]) {
        scatter(dest, run->guest_off, fq_block_data(b->hit[i]), run->nbytes);
        fq_count(&run->layer->cache_hits, 1);
        return FQ_OK;
    }
    if (job->keep) {
        note_miss(job, b, run);
        return read_and_keep(b, i, scratch, dest, error);
    }
    if (room >= run->nbytes)
        return inflate_run(run, scratch, scratch->in + b->in_at[i], b->in_got[i], to, error);
    if (!fq_scratch_grow(&scratch->out, &scratch->out_capacity, (size_t)run->nbytes))
        return fail_in_run(error, FQ_ERR_NOMEM, run, FQ_NOWHERE, FQ_NOWHERE);
    status = inflate_run(run, scratch, scratch->in + b->in_at[i], b->in_got[i], scratch->out, error);
    if (status == FQ_OK)
        scatter(dest, run->guest_off, scratch->out, run->nbytes);
    return status;
}

/* Fetching has failed. What comes before that on the disk may be bad too, and is looked at in turn: the lowest error counts. */
static fq_status find_lowest_error(fq_job *job, fq_batch *b, fq_scratch *scratch, const fq_dest *dest, fq_error *error)
{
    for (size_t i = 0; i < b->count && b->runs[i].guest_off < error->guest_off; i++) {
        const fq_run *run = &b->runs[i];
        fq_status status = FQ_OK;
        fq_error each;

        if (b->by_caller)
            fq_job_poll(job);
        if (atomic_load(&job->cancelled))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        if (run->kind == FQ_DATA)
            status = fetch_data(job, b, run, scratch, dest, &each);
        else if (run->kind == FQ_COMPRESSED)
            status = read_part_of_cluster(job, b, run, scratch, dest, &each);
        if (status != FQ_OK) {
            *error = each;
            break;
        }
    }
    return error->status;
}

fq_status fq_batch_fetch(fq_job *job, fq_batch *b, fq_scratch *scratch, const fq_dest *dest, fq_error *error)
{
    fq_status status = FQ_OK;

    b->fetched_count = 0;
    look_up_clusters(b);
    if (job->reader->remote)
        status = fq_remote_fetch(job, b, scratch, error);
    if (status == FQ_OK)
        status = fetch_compressed(job, b, scratch, error);
    for (size_t i = 0; i < b->count && status == FQ_OK; i++)
        if (b->runs[i].kind == FQ_DATA)
            status = fetch_data(job, b, &b->runs[i], scratch, dest, error);
    if (status == FQ_OK || status == FQ_ERR_SOURCE || status == FQ_ERR_CANCELLED || status == FQ_ERR_NOMEM)
        return status;
    return find_lowest_error(job, b, scratch, dest, error);
}

/* Of an error nobody hears: whoever comes to this cluster will meet it. */
bool fq_batch_warm(const fq_run *run, fq_scratch *scratch)
{
    fq_reader *layer = run->layer;
    fq_error error;
    cluster_fill fill = {NULL, NULL, run, scratch, &error};
    fq_block *block;
    bool filled = false;

    if (fq_cache_look(layer->clusters, layer->owner, run->entry) == FQ_ABSENT &&
        fq_cache_get(layer->clusters, layer->owner, run->entry, (size_t)fq_cluster_size(&layer->geometry), fill_cluster, &fill,
                     &filled, &block) == FQ_OK)
        fq_cache_unpin(layer->clusters, block);
    return filled;
}

/* Whether to go on, asked now and then: there are streams that take a hundred times as long as others. */
static bool is_cancelled(fq_job *job, const fq_batch *b, const fq_run *run, uint64_t *inflated)
{
    *inflated += run->in_nbytes;
    if (*inflated < POLL_NBYTES)
        return false;
    *inflated = 0;
    if (b->by_caller)
        fq_job_poll(job);
    return atomic_load(&job->cancelled);
}

/*
 * The order matters: whole clusters first, out of scratch->in, which the parts of clusters then use again; and those that others
 * are at work on after these, as the scratch serves for something else while they are waited for. Of several errors the one with
 * the lowest guest offset counts.
 */
fq_status fq_batch_inflate(fq_job *job, fq_batch *b, fq_scratch *scratch, const fq_dest *dest, fq_error *error)
{
    uint64_t inflated = 0;
    fq_error each;

    error->status = FQ_OK;
    for (int parts = 0; parts < 2; parts++) {
        for (size_t i = 0; i < b->count; i++) {
            const fq_run *run = &b->runs[i];
            fq_status status = FQ_OK;

            if (run->kind == FQ_DATA || (run->kind == FQ_COMPRESSED && (!fq_is_whole(run) || b->late[i])) != parts)
                continue;
            if (run->kind != FQ_COMPRESSED)
                scatter(dest, run->guest_off, NULL, run->nbytes);
            else if (is_cancelled(job, b, run, &inflated))
                return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
            else if (parts)
                status = read_part_of_cluster(job, b, run, scratch, dest, &each);
            else
                status = read_whole_cluster(job, b, i, scratch, dest, &each);
            if (status != FQ_OK && (error->status == FQ_OK || each.guest_off < error->guest_off))
                *error = each;
        }
    }
    return error->status;
}

void fq_batch_release(fq_job *job, fq_batch *b)
{
    for (size_t i = 0; i < b->count; i++)
        if (b->hit[i] && fq_cache_release(b->runs[i].layer->clusters, b->hit[i], 0, (size_t)b->runs[i].nbytes))
            fq_ahead_used(job->reader);
}
