/*
 * reader.c - plan and share out: the one read path
 *
 * A request is a job. Threads claim batches of it in guest order; to claim is to plan, that is, to walk the tables for the next
 * runs, and happens under the job's lock, since it costs next to nothing beside inflating. What a thread claims it fetches,
 * inflates and delivers itself (batch.c); nothing is handed from thread to thread.
 *
 * Of sources that may be streams (callbacks), one thread plans and fetches at a time, in its turn, so that the reads come in file
 * order; inflating still runs on all threads. Of remote files, where planning may have to wait for a table, threads plan in turn,
 * so that the calling one can be interrupted; each then fetches its batch, a larger one, by one call for many ranges.
 *
 * What a file can make us allocate here: the L1 table, bounded by the caller to 32 MiB, and the caches' budgets.
 */
#include "internal.h"
#include "layout.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    BATCH_NBYTES_MIN = 64 << 10,
    BATCH_NBYTES_MAX = 1 << 20,
    BATCH_NBYTES_REMOTE = 4 << 20,  /* some milliseconds of inflating, which is what a remote file takes to answer at best */
    PARALLEL_DATA_NBYTES = 1 << 20, /* plain data worth a second thread */
    ZEROES_NBYTES_MAX = 64 << 20,   /* to be written at a time */
};

static fq_reader *new_reader(fq_source *source, fq_source *data, fq_reader *backing, fq_reader *sibling, bool raw,
                             const fq_reader_options *o)
{
    const fq_reader *shared = sibling ? sibling : backing;
    fq_reader *r = calloc(1, sizeof(*r));

    if (!r)
        return NULL;
    r->source = source;
    r->data = data ? data : source;
    r->backing = backing;
    r->geometry = o->geometry;
    r->size = o->size;
    r->threads = o->threads ? o->threads : 1;
    r->crypt = o->crypt;
    r->raw = raw;
    r->ordered = fq_source_ordered(source) || fq_source_ordered(r->data) || (backing && backing->ordered);
    r->remote = fq_source_is_remote(source) || fq_source_is_remote(r->data) || (backing && backing->remote);
    r->keep_nbytes = o->cluster_cache_nbytes / 8 < BATCH_NBYTES_MAX ? o->cluster_cache_nbytes / 8 : BATCH_NBYTES_MAX;
    fq_ahead_open(r, o->cluster_cache_nbytes);
    r->tables = shared ? fq_cache_ref(shared->tables) : fq_cache_new(o->table_cache_nbytes, FQ_TABLE_SLICE_NBYTES);
    r->clusters = shared ? fq_cache_ref(shared->clusters) : fq_cache_new(o->cluster_cache_nbytes, o->largest_cluster);
    if (!r->tables || !r->clusters) {
        fq_reader_close(r);
        return NULL;
    }
    r->owner = sibling ? sibling->owner : fq_cache_new_owner(r->clusters);
    return r;
}

fq_status fq_reader_open_raw(fq_source *source, const fq_reader_options *o, fq_reader **out, fq_error *error)
{
    fq_reader *r = new_reader(source, NULL, NULL, NULL, true, o);

    if (!r)
        return fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    *out = r;
    return FQ_OK;
}

fq_status fq_reader_open_qcow2(fq_source *source, fq_source *data, fq_reader *backing, fq_reader *sibling,
                               const fq_reader_options *o, const fq_request *request, fq_reader **out, fq_error *error)
{
    const size_t l1_nbytes = (size_t)o->l1_entries * 8;
    fq_status status = FQ_OK;
    fq_reader *r;
    size_t got;

    if (o->geometry.cluster_bits < 9 || o->geometry.cluster_bits > 21 ||
        (o->geometry.extended_l2 && o->geometry.cluster_bits < 14) || o->size > INT64_MAX ||
        (unsigned)o->geometry.codec >= FQ_CODEC_COUNT)
        return fq_fail(error, FQ_ERR_ARGUMENT, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    r = new_reader(source, data, backing, sibling, false, o);
    if (!r || !(r->l1 = malloc(l1_nbytes ? l1_nbytes : 1))) {
        status = fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        goto fail;
    }
    r->l1_entries = o->l1_entries;
    status = fq_source_read(source, request, (uint8_t *)r->l1, l1_nbytes, o->l1_off, &got, error);
    if (status == FQ_OK && got < l1_nbytes)
        status = fq_fail(error, FQ_ERR_L1_EOF, FQ_NOWHERE, o->l1_off, fq_source_size(source));
    if (status != FQ_OK)
        goto fail;
    fq_count(&r->bytes_fetched, got);
    for (size_t i = 0; i < r->l1_entries; i++)
        r->l1[i] = fq_load_be64((const uint8_t *)&r->l1[i]);
    *out = r;
    return FQ_OK;
fail:
    fq_reader_close(r);
    return status;
}

void fq_reader_close(fq_reader *r)
{
    if (!r)
        return;
    fq_ahead_close(r);
    fq_cache_unref(r->tables);
    fq_cache_unref(r->clusters);
    free(r->l1);
    free(r);
}

void fq_reader_stats(const fq_reader *r, fq_stats *stats)
{
    *stats = (fq_stats){.bytes_returned = atomic_load(&r->bytes_returned)};
    for (; r; r = r->backing) {
        stats->clusters_inflated += atomic_load(&r->clusters_inflated);
        stats->cache_hits += atomic_load(&r->cache_hits);
        stats->bytes_fetched += atomic_load(&r->bytes_fetched);
    }
}

/* ---- jobs */

void fq_job_init(fq_job *job, fq_reader *reader, uint64_t guest_off, uint64_t nbytes, const fq_request *request)
{
    *job = (fq_job){.reader = reader,
                    .request = request,
                    .threads = 1,
                    .cursor = guest_off,
                    .end = guest_off + nbytes,
                    .error = {.status = FQ_OK}};
    pthread_mutex_init(&job->lock, NULL);
    fq_cond_init(&job->turn);
}

void fq_job_destroy(fq_job *job)
{
    pthread_mutex_destroy(&job->lock);
    pthread_cond_destroy(&job->turn);
}

/* Leave what lies behind the first nbytes of a run to the next batch. */
static void cut_run(fq_job *job, fq_run *run, uint64_t nbytes)
{
    job->rest = *run;
    job->rest.guest_off += nbytes;
    job->rest.nbytes -= nbytes;
    if (run->kind == FQ_DATA)
        job->rest.host_off += nbytes;
    run->nbytes = nbytes;
}

/* How what a run holds gets to where it is written. */
typedef enum way { WAY_FETCH, WAY_ZEROES, WAY_COPY } way;

static way way_of(const fq_job *job, const fq_run *run)
{
    if (fq_run_reads_zero(run))
        return WAY_ZEROES;
    return job->copy && run->kind == FQ_DATA && !run->layer->crypt.run ? WAY_COPY : WAY_FETCH;
}

/* The first claims are large, which costs least, and the last ones small, so that all threads end at about the same time. */
static uint64_t batch_nbytes_of(const fq_job *job)
{
    const uint64_t fair = (job->end - job->cursor) / job->threads / 2;

    if (job->reader->remote)
        return BATCH_NBYTES_REMOTE;
    return job->threads == 1 || fair > BATCH_NBYTES_MAX ? BATCH_NBYTES_MAX : fair < BATCH_NBYTES_MIN ? BATCH_NBYTES_MIN : fair;
}

/*
 * Plan the next batch. Called by one thread at a time. Compressed clusters are not cut, and count as a whole, as even a part of one
 * has all of it inflated; all other runs are cut where the batch is full. A batch to be written goes one way; one of zeroes is
 * longer. A run that cannot be planned ends the batch before it; the next claim meets it first, and fails. (But a source that fails
 * is not asked again.) A run is looked up once, in however many batches it ends: some file systems look for the next hole page by
 * page.
 */
static fq_status plan(fq_job *job, fq_batch *b, fq_error *error)
{
    const uint64_t batch_nbytes = batch_nbytes_of(job);
    const size_t runs_max = job->reader->remote ? FQ_BATCH_RUNS_REMOTE : FQ_BATCH_RUNS;
    uint64_t work = 0;

    b->guest_off = job->cursor;
    while (b->count < runs_max && work < batch_nbytes && job->cursor < job->end) {
        fq_run *run = &b->runs[b->count];
        const uint64_t room = batch_nbytes - work;
        fq_error at;
        fq_status status = FQ_OK;

        if (job->rest.nbytes > 0)
            *run = job->rest;
        else
            status = fq_resolve(job->reader, job->cursor, job->end - job->cursor, job->write != NULL, job->request, run, &at);
        job->rest.nbytes = 0;
        if (status != FQ_OK) {
            if (b->count > 0 && status != FQ_ERR_SOURCE)
                return FQ_OK;
            *error = at;
            return status;
        }
        if (job->write && b->count > 0 && way_of(job, run) != way_of(job, &b->runs[0])) {
            job->rest = *run;
            return FQ_OK;
        }
        if (job->write && way_of(job, run) == WAY_ZEROES) {
            if (!job->zeroes_are_free && run->nbytes > ZEROES_NBYTES_MAX)
                cut_run(job, run, ZEROES_NBYTES_MAX);
        } else if (run->nbytes > room && run->kind != FQ_COMPRESSED) {
            cut_run(job, run, room);
        }
        if (run->kind == FQ_COMPRESSED)
            job->compressed = true;
        b->hit[b->count] = NULL;
        b->late[b->count] = false;
        b->count++;
        b->nbytes += run->nbytes;
        work += run->kind == FQ_COMPRESSED ? fq_cluster_size(&run->layer->geometry) : run->nbytes;
        job->cursor += run->nbytes;
    }
    return FQ_OK;
}

void fq_job_fail(fq_job *job, const fq_error *error)
{
    pthread_mutex_lock(&job->lock);
    if (job->error.status == FQ_OK || error->guest_off < job->error.guest_off)
        job->error = *error;
    pthread_mutex_unlock(&job->lock);
    if (error->status == FQ_ERR_SOURCE) /* what the others still want of it is not asked for */
        atomic_store(&job->cancelled, true);
    atomic_store(&job->stop, true);
}

uint64_t fq_now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void fq_job_poll(void *arg)
{
    fq_job *job = arg;
    uint64_t now;

    if (!job->request || !job->request->poll)
        return;
    now = fq_now_ms();
    if (job->polled_at_ms == 0)
        job->polled_at_ms = now;
    if (now - job->polled_at_ms < FQ_POLL_MS)
        return;
    job->polled_at_ms = now;
    if (job->request->poll(job->request->user, atomic_load(&job->done_nbytes))) {
        const fq_error stopped = {.status = FQ_ERR_CANCELLED, .guest_off = FQ_NOWHERE, .host_off = FQ_NOWHERE, .value = FQ_NOWHERE};

        atomic_store(&job->cancelled, true);
        fq_job_fail(job, &stopped);
    }
}

void fq_job_take_turn(fq_job *job, bool is_caller)
{
    pthread_mutex_lock(&job->lock);
    while (job->fetching) {
        if (!is_caller) {
            pthread_cond_wait(&job->turn, &job->lock);
            continue;
        }
        fq_wait_briefly(&job->turn, &job->lock);
        pthread_mutex_unlock(&job->lock);
        fq_job_poll(job);
        pthread_mutex_lock(&job->lock);
    }
    job->fetching = true;
    pthread_mutex_unlock(&job->lock);
}

void fq_job_give_turn(fq_job *job, fq_status status)
{
    if (status == FQ_ERR_SOURCE) { /* before the next one takes its turn: a source that failed is asked no more */
        atomic_store(&job->cancelled, true);
        atomic_store(&job->stop, true);
    }
    pthread_mutex_lock(&job->lock);
    job->fetching = false;
    pthread_cond_signal(&job->turn);
    pthread_mutex_unlock(&job->lock);
}

/* Claim a batch and do it. Returns false when there is nothing left to claim. */
static bool work_once(fq_job *job, fq_scratch *scratch, fq_batch *b)
{
    fq_iovec buffer = {0};
    fq_dest own = {&buffer, 1, 0};
    const fq_dest *dest = job->dest ? job->dest : &own;
    const bool ordered = job->reader->ordered, in_turn = ordered || job->reader->remote;
    bool copied = false, fetched; /* not so: zeroes, which write() makes itself */
    fq_error error;
    fq_status status = FQ_OK;

    if (in_turn)
        fq_job_take_turn(job, b->by_caller);
    else
        pthread_mutex_lock(&job->lock);
    b->count = 0;
    b->nbytes = 0;
    if (!atomic_load(&job->stop))
        status = plan(job, b, &error);
    if (b->count == 0)
        job->cursor = job->end; /* after an error: nobody else needs to meet it */
    if (!in_turn)
        pthread_mutex_unlock(&job->lock);
    else if (!ordered)
        fq_job_give_turn(job, status);

    if (b->count > 0 && job->write && way_of(job, &b->runs[0]) == WAY_COPY)
        copied = job->copy(job, b);
    fetched = b->count > 0 && !copied && !(job->write && fq_run_reads_zero(&b->runs[0]));
    if (fetched && !job->dest) {
        if (!fq_scratch_grow(&scratch->gather, &scratch->gather_capacity, (size_t)b->nbytes))
            status = fq_fail(&error, FQ_ERR_NOMEM, b->guest_off, FQ_NOWHERE, FQ_NOWHERE);
        buffer = (fq_iovec){scratch->gather, (size_t)b->nbytes, 0};
        own.guest_off = b->guest_off;
    }
    if (fetched && status == FQ_OK)
        status = fq_batch_fetch(job, b, scratch, dest, &error);
    if (ordered)
        fq_job_give_turn(job, status);

    if (fetched && status == FQ_OK)
        status = fq_batch_inflate(job, b, scratch, dest, &error);
    fq_batch_release(job, b);
    if (status == FQ_OK && job->write && b->count > 0 && !copied)
        status = job->write(job, b->guest_off, buffer.base, b->nbytes, b->by_caller, &error);
    if (status == FQ_OK && job->digest && b->count > 0)
        status = fq_digest_take(job, job->digest, b->guest_off, b->guest_off, buffer.base, b->nbytes, b->by_caller, &error);
    if (status != FQ_OK)
        fq_job_fail(job, &error);
    atomic_fetch_add(&job->done_nbytes, b->nbytes);
    return b->count > 0;
}

static void work(void *arg, bool is_caller)
{
    fq_job *job = arg;
    fq_scratch *scratch = fq_scratch_get();
    fq_batch b;

    b.by_caller = is_caller;
    if (!scratch) {
        const fq_error error = {.status = FQ_ERR_NOMEM, .guest_off = FQ_NOWHERE, .host_off = FQ_NOWHERE, .value = FQ_NOWHERE};

        fq_job_fail(job, &error);
        return;
    }
    while (!atomic_load(&job->stop) && work_once(job, scratch, &b))
        if (is_caller)
            fq_job_poll(job);
    fq_scratch_put(scratch);
}

fq_status fq_job_run(fq_job *job, unsigned threads, fq_error *error)
{
    return fq_job_run_by(job, threads, work, error);
}

fq_status fq_job_run_by(fq_job *job, unsigned threads, void (*fn)(void *job, bool is_caller), fq_error *error)
{
    job->threads = threads;
    fq_pool_run(threads > 1 ? threads - 1 : 0, fn, fq_job_poll, job);
    fq_job_destroy(job);
    if (job->error.status != FQ_OK)
        *error = job->error;
    return job->error.status;
}

/* ---- scattered reads */

/*
 * Is there work for more than one thread? Two compressed clusters are, what is plain or inflated already is from a certain size on,
 * zeroes are not. Looks at a few runs only, through tables that the read itself needs next. What is wrong with the image is met
 * again there, and reported there; a source that fails is not asked again.
 */
static fq_status worth_threads(fq_reader *r, uint64_t guest_off, uint64_t nbytes, const fq_request *request, bool *worth,
                               fq_error *error)
{
    uint64_t data = 0;
    int compressed = 0;

    *worth = false;
    for (int i = 0; i < FQ_BATCH_RUNS && nbytes > 0; i++) {
        fq_run run;
        const fq_status status = fq_resolve(r, guest_off, nbytes, false, request, &run, error);

        if (status != FQ_OK)
            return status == FQ_ERR_SOURCE ? status : FQ_OK;
        if (run.kind == FQ_COMPRESSED && fq_cache_look(run.layer->clusters, run.layer->owner, run.entry) == FQ_ABSENT)
            compressed++;
        else if (!fq_run_reads_zero(&run))
            data += run.nbytes;
        if (compressed >= 2 || data >= PARALLEL_DATA_NBYTES) {
            *worth = true;
            return FQ_OK;
        }
        guest_off += run.nbytes;
        nbytes -= run.nbytes;
    }
    *worth = nbytes >= PARALLEL_DATA_NBYTES;
    return FQ_OK;
}

fq_status fq_reader_preadv(fq_reader *r, const fq_iovec *iov, size_t niov, uint64_t guest_off, const fq_request *request,
                           fq_error *error)
{
    const uint64_t nbytes = niov ? iov[niov - 1].start + iov[niov - 1].nbytes : 0;
    const fq_dest dest = {iov, niov, guest_off};
    unsigned threads = nbytes > BATCH_NBYTES_MIN ? r->threads : 1;
    fq_status status;
    unsigned ahead = 0;
    bool worth;
    fq_job job;

    if (guest_off > r->size || nbytes > r->size - guest_off)
        return fq_fail(error, FQ_ERR_ARGUMENT, guest_off, FQ_NOWHERE, nbytes);
    if (nbytes == 0)
        return FQ_OK;
    if (nbytes < BATCH_NBYTES_MAX)
        ahead = fq_ahead_note(r, guest_off, nbytes);
    if (threads > 1) {
        status = worth_threads(r, guest_off, nbytes, request, &worth, error);
        if (status != FQ_OK)
            return status;
        if (!worth)
            threads = 1;
    }
    fq_ahead_start(r, ahead);
    fq_job_init(&job, r, guest_off, nbytes, request);
    job.dest = &dest;
    job.keep = nbytes < r->keep_nbytes;
    status = fq_job_run(&job, threads, error);
    if (status == FQ_OK) {
        fq_count(&r->bytes_returned, nbytes);
        if (nbytes < BATCH_NBYTES_MAX)
            fq_ahead_learn(r, job.compressed);
    }
    return status;
}

fq_status fq_reader_fill(fq_reader *r, uint8_t *buf, size_t nbytes, uint64_t guest_off, unsigned threads, const fq_request *request,
                         fq_error *error)
{
    const fq_request quiet = {.user = request ? request->user : NULL};
    const fq_iovec iov = {buf, nbytes, 0};
    const fq_dest dest = {&iov, 1, guest_off};
    fq_job job;

    fq_job_init(&job, r, guest_off, nbytes, &quiet);
    job.dest = &dest;
    return fq_job_run(&job, threads, error);
}
