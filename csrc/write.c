/*
 * write.c - a disk to the clusters and tables of an image
 *
 * Threads claim stretches of the disk in order, read them by the one read path, and encode their clusters, each by itself. What
 * they have made goes into a ring, in which it waits for its turn; whoever finds the oldest stretch ready gives it its place in the
 * file and writes it, and goes on with the next one while that is ready too. So nobody waits for a slower neighbour unless the ring
 * is full, one thread at a time writes, and what is written where depends on the order of the disk alone.
 *
 * Stretches of zeroes that the source's tables or holes tell of are not claimed, so an empty disk costs nothing. Sources that may
 * be streams are read by one thread at a time, in order.
 *
 * What a job allocates: the ring, bounded to RING_NBYTES or two stretches; and for each thread a stretch to read into, with a
 * backing file two, and an encoder: so many threads as make do with THREADS_NBYTES, but one at least.
 */
#include "internal.h"
#include "layout.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    STRETCH_NBYTES = 512 << 10,
    STRETCH_NBYTES_REMOTE = 4 << 20, /* as much as is asked for at a time: see reader.c */
    RING_NBYTES = 48 << 20,
    GRAIN_NBYTES_MAX = 16 << 20, /* as for QEMU */
    THREADS_NBYTES = 96 << 20,
    RING_PER_THREAD = 4, /* stretches: what is slow to encode is several times slower than what is quick */
};

typedef enum fate { LEFT_OUT, ZEROES, PLAIN, COMPRESSED } fate;

typedef struct piece {
    fate fate;
    uint32_t nbytes; /* in `out`; those of a plain cluster are all of it */
    uint64_t bitmap;
} piece;

typedef struct stretch {
    uint64_t guest_off;
    uint64_t before; /* where the one before it ends; zeroes lie between them */
    size_t count;    /* clusters */
    piece *pieces;   /* whose bytes lie in `out`, one behind the other */
    uint8_t *out;
    bool ready;
} stretch;

typedef struct write_job {
    fq_job job;
    const fq_write_options *o;
    fq_reader *reader, *backing;
    int stream;
    bool ordered, stream_ended;
    uint64_t size; /* of the disk; of a stream, what has come of it */
    uint64_t claimed_until;
    fq_digest digest;
    uint64_t data_until; /* the run of the source that the cursor is in is not of zeroes */
    uint64_t cluster_size, stretch_nbytes;
    uint64_t block_nbytes; /* zeroes are left out by blocks of so many bytes: a cluster, or several; 0: no zeroes are */
    unsigned threads;
    fq_space *space;
    fq_written *written;

    pthread_mutex_t lock; /* of the ring */
    pthread_cond_t room;
    stretch *ring;
    uint64_t ring_count, claimed, placed; /* stretches; both numbers only grow */
    bool placing;
} write_job;

/* What one thread has for itself. */
typedef struct bench {
    void *encoder;       /* its state; NULL where there is none */
    uint8_t *in, *below; /* a stretch, and the same of the backing file */
    bool by_caller;
} bench;

/* ---- claiming */

/* The run of zeroes at an offset, or of something else; zeroes follow the end of a backing file. */
static fq_status resolve(write_job *w, fq_reader *r, uint64_t off, uint64_t nbytes, bool *zeroes, uint64_t *run_nbytes,
                         fq_error *error)
{
    fq_run run;
    fq_status status;

    *zeroes = true;
    *run_nbytes = nbytes;
    if (off >= r->size)
        return FQ_OK;
    status = fq_resolve(r, off, nbytes < r->size - off ? nbytes : r->size - off, true, w->job.request, &run, error);
    if (status == FQ_OK) {
        *zeroes = fq_run_reads_zero(&run);
        *run_nbytes = run.nbytes;
    }
    return status;
}

/*
 * Move the cursor past whole blocks that are known to be zeroes, in the backing file too. A run that is not is looked up once, in
 * however many stretches it ends: some file systems look for the next hole page by page.
 */
static fq_status skip_zeroes(write_job *w, bool is_caller, fq_error *error)
{
    fq_job *job = &w->job;

    while (w->block_nbytes > 0 && job->cursor < job->end && job->cursor >= w->data_until && !atomic_load(&job->stop)) {
        uint64_t nbytes;
        bool zeroes;
        fq_status status = resolve(w, w->reader, job->cursor, job->end - job->cursor, &zeroes, &nbytes, error);

        if (status == FQ_OK && w->backing && zeroes) {
            status = resolve(w, w->backing, job->cursor, nbytes, &zeroes, &nbytes, error);
            error->in_backing = status != FQ_OK;
        }
        if (status != FQ_OK)
            return status;
        if (!zeroes)
            w->data_until = job->cursor + nbytes;
        if (nbytes < job->end - job->cursor)
            nbytes &= ~(w->block_nbytes - 1);
        if (!zeroes || nbytes == 0)
            break;
        job->cursor += nbytes;
        atomic_fetch_add(&job->done_nbytes, nbytes);
        if (is_caller)
            fq_job_poll(job);
    }
    return FQ_OK;
}

/* Wait for a place in the ring; NULL when the job stops. By the one thread that has its turn. */
static stretch *wait_for_room(write_job *w, bool is_caller)
{
    stretch *s = NULL;

    pthread_mutex_lock(&w->lock);
    while (w->claimed == w->placed + w->ring_count && !atomic_load(&w->job.stop)) {
        fq_wait_briefly(&w->room, &w->lock);
        if (is_caller) {
            pthread_mutex_unlock(&w->lock);
            fq_job_poll(&w->job);
            pthread_mutex_lock(&w->lock);
        }
    }
    if (!atomic_load(&w->job.stop))
        s = &w->ring[w->claimed % w->ring_count];
    pthread_mutex_unlock(&w->lock);
    return s;
}

/* Fill the buffer from the stream, or up to its end. */
static fq_status read_stream(write_job *w, uint8_t *buf, size_t nbytes, size_t *got, bool is_caller, fq_error *error)
{
    struct pollfd wanted = {.fd = w->stream, .events = POLLIN};

    *got = 0;
    while (*got < nbytes && !atomic_load(&w->job.stop)) {
        ssize_t n;

        if (is_caller)
            fq_job_poll(&w->job);
        n = poll(&wanted, 1, FQ_POLL_MS); /* a signal ends it, where a read would wait on */
        if (n == 0)
            continue;
        if (n > 0)
            n = read(w->stream, buf + *got, nbytes - *got);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0) {
            const int sys_errno = errno;

            fq_fail(error, FQ_ERR_READ, FQ_NOWHERE, w->size + *got, FQ_NOWHERE);
            error->sys_errno = sys_errno;
            return FQ_ERR_READ;
        }
        if (n == 0)
            break;
        *got += (size_t)n;
    }
    return FQ_OK;
}

static fq_status read_reader(write_job *w, uint8_t *buf, size_t nbytes, uint64_t guest_off, fq_error *error)
{
    return fq_reader_fill(w->reader, buf, nbytes, guest_off, w->ordered ? w->threads : 1, w->job.request, error);
}

/* The next stretch of a stream. One that has ended is asked no more. */
static fq_status claim_of_stream(write_job *w, bench *b, size_t *nbytes, fq_error *error)
{
    fq_status status;

    *nbytes = 0;
    if (w->stream_ended)
        return FQ_OK;
    status = read_stream(w, b->in, (size_t)w->stretch_nbytes, nbytes, b->by_caller, error);
    w->stream_ended = *nbytes < w->stretch_nbytes;
    w->size += *nbytes;
    if (status == FQ_OK && w->size > INT64_MAX - w->stretch_nbytes)
        status = fq_fail(error, FQ_ERR_TOO_LARGE, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    return status;
}

/* Claim the next stretch: of *nbytes of the disk, or of none where there is no more. Its bytes are there if they come in order. */
static fq_status claim(write_job *w, bench *b, stretch **out, size_t *nbytes, fq_error *error)
{
    fq_job *job = &w->job;
    fq_status status = FQ_OK;

    *nbytes = 0;
    if (w->reader)
        status = skip_zeroes(w, b->by_caller, error);
    if (status != FQ_OK || (w->reader && job->cursor == job->end))
        return status;
    *out = wait_for_room(w, b->by_caller);
    if (!*out)
        return FQ_OK;
    if (!w->reader) {
        status = claim_of_stream(w, b, nbytes, error);
    } else {
        *nbytes = (size_t)(job->end - job->cursor < w->stretch_nbytes ? job->end - job->cursor : w->stretch_nbytes);
        if (w->ordered)
            status = read_reader(w, b->in, *nbytes, job->cursor, error);
    }
    if (status != FQ_OK || *nbytes == 0)
        return status;
    (*out)->guest_off = job->cursor;
    (*out)->before = w->claimed_until;
    (*out)->count = (size_t)((*nbytes + w->cluster_size - 1) / w->cluster_size);
    job->cursor += *nbytes;
    w->claimed_until = job->cursor;
    pthread_mutex_lock(&w->lock);
    w->claimed++;
    pthread_mutex_unlock(&w->lock);
    return FQ_OK;
}

/* ---- encoding */

/* What the backing file has where the stretch lies; zeroes behind its end. */
static fq_status read_below(write_job *w, bench *b, uint64_t guest_off, size_t nbytes, fq_error *error)
{
    const uint64_t size = w->backing->size, there = guest_off < size ? size - guest_off : 0;
    const size_t n = there < nbytes ? (size_t)there : nbytes;
    fq_status status = FQ_OK;

    if (n > 0)
        status = fq_reader_fill(w->backing, b->below, n, guest_off, 1, w->job.request, error);
    error->in_backing = status != FQ_OK;
    memset(b->below + n, 0, nbytes - n);
    return status;
}

/*
 * An extended entry tells of the zeroes in a plain cluster, in its upper half; the lower half says what is stored. Zeroes count
 * from the grain on.
 */
static uint64_t bitmap_of(const write_job *w, const uint8_t *cluster)
{
    const size_t subcluster = (size_t)w->cluster_size / FQ_SUBCLUSTERS, grain = (size_t)w->o->grain;
    const size_t nbytes = grain < subcluster ? subcluster : grain;
    uint64_t bitmap = 0;

    if (!w->o->geometry.extended_l2)
        return 0;
    for (unsigned i = 0; i < FQ_SUBCLUSTERS; i++) {
        const size_t block = i * subcluster & ~(nbytes - 1);
        const bool zeroes = grain > 0 && nbytes <= w->cluster_size && fq_is_zero(cluster + block, nbytes);

        bitmap |= UINT64_C(1) << (zeroes ? FQ_SUBCLUSTERS + i : i);
    }
    return bitmap;
}

/* may_leave_out: zeroes need not be stored. */
static fq_status encode_cluster(const write_job *w, const bench *b, const uint8_t *cluster, const uint8_t *below,
                                bool may_leave_out, uint8_t *out, piece *p)
{
    const size_t nbytes = (size_t)w->cluster_size;

    *p = (piece){.fate = LEFT_OUT};
    if (below && memcmp(cluster, below, nbytes) == 0)
        return FQ_OK;
    if (may_leave_out && fq_is_zero(cluster, nbytes)) {
        if (!below)
            return FQ_OK;
        if (w->o->geometry.version >= 3) {
            p->fate = ZEROES;
            return FQ_OK;
        }
    }
    if (b->encoder) {
        size_t n;
        const fq_status status = w->o->encoder->run(b->encoder, cluster, nbytes, out, nbytes - 1, &n);

        if (status != FQ_OK)
            return status;
        if (n > 0) {
            *p = (piece){.fate = COMPRESSED, .nbytes = (uint32_t)n};
            return FQ_OK;
        }
    }
    memcpy(out, cluster, nbytes);
    *p = (piece){.fate = PLAIN, .nbytes = (uint32_t)nbytes, .bitmap = bitmap_of(w, cluster)};
    return FQ_OK;
}

static fq_status encode(write_job *w, bench *b, stretch *s, size_t nbytes, fq_error *error)
{
    const size_t whole = s->count * (size_t)w->cluster_size;
    uint8_t *out = s->out;
    bool may_leave_out = w->block_nbytes > 0;
    fq_status status = FQ_OK;

    memset(b->in + nbytes, 0, whole - nbytes);
    if (w->backing)
        status = read_below(w, b, s->guest_off, whole, error);
    for (size_t i = 0; i < s->count && status == FQ_OK; i++) {
        const size_t at = i * (size_t)w->cluster_size;

        if (w->block_nbytes > w->cluster_size && at % w->block_nbytes == 0)
            may_leave_out = fq_is_zero(b->in + at, w->block_nbytes < whole - at ? (size_t)w->block_nbytes : whole - at);
        status = encode_cluster(w, b, b->in + at, w->backing ? b->below + at : NULL, may_leave_out, out, &s->pieces[i]);
        if (status != FQ_OK)
            return fq_fail(error, status, s->guest_off + at, FQ_NOWHERE, FQ_NOWHERE);
        out += s->pieces[i].nbytes;
        if (b->by_caller)
            fq_job_poll(&w->job);
        if (atomic_load(&w->job.cancelled))
            return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    }
    return status;
}

/* ---- placing, by one thread at a time, in the order of the disk */

static fq_status place_piece(write_job *w, uint64_t cluster, const piece *p, uint64_t *host_off, fq_error *error)
{
    const fq_geometry *g = &w->o->geometry;
    uint64_t entry = 0, bitmap = p->bitmap;
    fq_status status = FQ_OK;

    if (p->fate == COMPRESSED) {
        status = fq_space_packed(w->space, p->nbytes, host_off, error);
        entry = fq_encode_compressed(g, *host_off, p->nbytes);
        if (status == FQ_OK && entry == 0)
            return fq_fail(error, FQ_ERR_TOO_LARGE, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        w->written->compressed++;
    } else if (p->fate == PLAIN) {
        status = fq_space_cluster(w->space, host_off, error);
        entry = FQ_L2_COPIED | *host_off;
        w->written->plain++;
    } else {
        *host_off = 0;
        entry = g->extended_l2 ? 0 : FQ_L2_ZERO;
        bitmap = UINT64_C(0xffffffff) << FQ_SUBCLUSTERS;
        w->written->zero++;
    }
    return status == FQ_OK ? fq_space_map(w->space, cluster, entry, bitmap, error) : status;
}

/* Give the pieces of a stretch their places, and write those that come to lie side by side at once. */
static fq_status place(write_job *w, const stretch *s, fq_error *error)
{
    const uint64_t first = s->guest_off / w->cluster_size;
    const uint8_t *from = s->out;
    uint64_t to = 0;
    size_t run = 0, done;

    for (size_t i = 0; i < s->count; i++) {
        const piece *p = &s->pieces[i];
        uint64_t host_off;
        fq_status status;

        if (p->fate == LEFT_OUT)
            continue;
        status = place_piece(w, first + i, p, &host_off, error);
        if (status != FQ_OK)
            return status;
        if (p->nbytes > 0 && run > 0 && host_off != to + run) {
            status = fq_pwrite(w->o->fd, from, run, to, &done, error);
            if (status != FQ_OK)
                return status;
            from += run;
            run = 0;
        }
        if (run == 0)
            to = host_off;
        run += p->nbytes;
        w->written->data_nbytes += p->nbytes;
    }
    return run > 0 ? fq_pwrite(w->o->fd, from, run, to, &done, error) : FQ_OK;
}

/* Place what is ready, unless another thread is at it, who will find this too. */
static fq_status place_ready(write_job *w, bool is_caller, fq_error *error)
{
    fq_status status = FQ_OK;

    pthread_mutex_lock(&w->lock);
    while (!w->placing && !atomic_load(&w->job.stop)) {
        stretch *s = &w->ring[w->placed % w->ring_count];

        if (w->placed == w->claimed || !s->ready)
            break;
        w->placing = true;
        pthread_mutex_unlock(&w->lock);
        status = place(w, s, error);
        if (is_caller)
            fq_job_poll(&w->job);
        pthread_mutex_lock(&w->lock);
        w->placing = false;
        if (status != FQ_OK)
            break;
        s->ready = false;
        w->placed++;
        pthread_cond_signal(&w->room);
    }
    pthread_mutex_unlock(&w->lock);
    return status;
}

/* ---- the job */

/* Do one stretch. Returns false when there is nothing left to do. */
static bool write_once(write_job *w, bench *b)
{
    fq_job *job = &w->job;
    fq_status status = FQ_OK;
    stretch *s = NULL;
    size_t nbytes = 0;
    fq_error error;

    fq_job_take_turn(job, b->by_caller);
    if (!atomic_load(&job->stop))
        status = claim(w, b, &s, &nbytes, &error);
    fq_job_give_turn(job, status);
    if (status == FQ_OK && nbytes > 0) {
        if (w->reader && !w->ordered)
            status = read_reader(w, b->in, nbytes, s->guest_off, &error);
        if (status == FQ_OK)
            status = encode(w, b, s, nbytes, &error);
        if (status == FQ_OK && job->request && job->request->digest)
            status = fq_digest_take(job, &w->digest, s->before, s->guest_off, b->in, nbytes, b->by_caller, &error);
    }
    if (status == FQ_OK && nbytes > 0) {
        pthread_mutex_lock(&w->lock);
        s->ready = true;
        pthread_mutex_unlock(&w->lock);
        atomic_fetch_add(&job->done_nbytes, nbytes);
        status = place_ready(w, b->by_caller, &error);
    }
    if (status != FQ_OK)
        fq_job_fail(job, &error);
    return nbytes > 0;
}

static void write_main(void *arg, bool is_caller)
{
    write_job *w = arg; /* the job is its first member */
    bench b = {.by_caller = is_caller};
    const fq_encoder *encoder = w->o->encoder;

    b.in = malloc((size_t)w->stretch_nbytes);
    if (w->backing)
        b.below = malloc((size_t)w->stretch_nbytes);
    if (encoder)
        b.encoder = encoder->open(w->o->level);
    if (!b.in || (w->backing && !b.below) || (encoder && !b.encoder)) {
        fq_error error;

        fq_fail(&error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
        fq_job_fail(&w->job, &error);
    }
    while (!atomic_load(&w->job.stop) && write_once(w, &b))
        if (is_caller)
            fq_job_poll(&w->job);
    if (b.encoder)
        encoder->close(b.encoder);
    free(b.in);
    free(b.below);
}

/* How many threads there are to be, that find room for what each allocates. */
static unsigned threads_of(const write_job *w)
{
    const fq_encoder *encoder = w->o->encoder;
    const size_t state_nbytes = encoder ? encoder->state_nbytes(w->o->level, (size_t)w->cluster_size) : 0;
    const size_t room = THREADS_NBYTES / (state_nbytes + (size_t)w->stretch_nbytes * (w->backing ? 2 : 1));

    return room < 1 ? 1 : room < w->o->threads ? (unsigned)room : w->o->threads;
}

static bool make_ring(write_job *w)
{
    const uint64_t fits = RING_NBYTES / w->stretch_nbytes, wanted = (uint64_t)w->threads * RING_PER_THREAD;
    const size_t clusters = (size_t)(w->stretch_nbytes / w->cluster_size);

    w->ring_count = wanted < fits ? wanted : fits;
    if (w->ring_count < 2)
        w->ring_count = 2;
    w->ring = calloc((size_t)w->ring_count, sizeof(*w->ring));
    for (uint64_t i = 0; w->ring && i < w->ring_count; i++) {
        w->ring[i].pieces = malloc(clusters * sizeof(piece));
        w->ring[i].out = malloc((size_t)w->stretch_nbytes);
        if (!w->ring[i].pieces || !w->ring[i].out)
            return false;
    }
    return w->ring != NULL;
}

static void free_ring(write_job *w)
{
    for (uint64_t i = 0; w->ring && i < w->ring_count; i++) {
        free(w->ring[i].pieces);
        free(w->ring[i].out);
    }
    free(w->ring);
}

/* Zeroes behind the last stretch, up to the size of the disk that was made. */
static fq_status digest_rest(write_job *w, uint64_t size, const fq_request *request, fq_error *error)
{
    fq_status status = FQ_OK;

    if (request && request->digest) {
        fq_job_init(&w->job, w->reader, 0, 0, request);
        status = fq_digest_take(&w->job, &w->digest, w->claimed_until, size, NULL, 0, true, error);
        fq_job_destroy(&w->job);
    }
    return status;
}

static bool are_sound(const fq_write_options *o)
{
    const fq_geometry *g = &o->geometry;

    if (o->encoder && (o->level < o->encoder->level_min || o->level > o->encoder->level_max))
        return false;
    if (o->grain & (o->grain - 1) || o->grain > GRAIN_NBYTES_MAX)
        return false;
    return (g->version == 2 || g->version == 3) && g->cluster_bits >= (g->extended_l2 ? 14 : 9) && g->cluster_bits <= 21 &&
           !(g->version == 2 && (g->extended_l2 || o->refcount_order != 4)) && o->refcount_order <= 6 && o->threads > 0;
}

fq_status fq_write(fq_reader *reader, int stream, fq_reader *backing, const fq_write_options *o, fq_written *written,
                   const fq_request *request, fq_error *error)
{
    write_job w = {.o = o, .reader = reader, .backing = backing, .stream = stream, .written = written};
    const bool remote = (reader && reader->remote) || (backing && backing->remote);
    fq_status status;

    *written = (fq_written){0};
    if (!are_sound(o))
        return fq_fail(error, FQ_ERR_ARGUMENT, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    w.cluster_size = fq_cluster_size(&o->geometry);
    if (o->grain > 0)
        w.block_nbytes = o->encoder || o->grain < w.cluster_size ? w.cluster_size : o->grain;
    w.stretch_nbytes = remote ? STRETCH_NBYTES_REMOTE : STRETCH_NBYTES;
    if (w.stretch_nbytes < w.cluster_size)
        w.stretch_nbytes = w.cluster_size;
    if (w.stretch_nbytes < w.block_nbytes)
        w.stretch_nbytes = w.block_nbytes;
    w.threads = threads_of(&w);
    w.size = reader ? reader->size : 0;
    w.ordered = reader && reader->ordered;
    w.space = fq_space_new(o->fd, &o->geometry, o->refcount_order, o->tables_nbytes);
    fq_job_init(&w.job, reader, 0, w.size, request);
    fq_digest_init(&w.digest);
    pthread_mutex_init(&w.lock, NULL);
    fq_cond_init(&w.room);
    if (!w.space || !make_ring(&w)) {
        status = fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    } else {
        status = fq_job_run_by(&w.job, w.threads < w.ring_count ? w.threads : (unsigned)w.ring_count, write_main, error);
    }
    written->size = (w.size + 511) & ~UINT64_C(511);
    if (status == FQ_OK)
        status = digest_rest(&w, written->size, request, error);
    if (status == FQ_OK)
        status = fq_space_finish(w.space, written->size, written, error);
    free_ring(&w);
    fq_space_free(w.space);
    fq_digest_destroy(&w.digest);
    pthread_mutex_destroy(&w.lock);
    pthread_cond_destroy(&w.room);
    return status;
}
