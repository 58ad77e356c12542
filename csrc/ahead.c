/*
 * ahead.c - read-ahead: the clusters that a reader of small pieces will want next are inflated by workers meanwhile
 *
 * Who reads a compressed image in order, piece by piece, inflates on one core while the others sleep. So reads that continue one
 * another are recognised, as one of several streams, and behind the last one a window of clusters is inflated into the cache. The
 * window is twice as long as what the stream had read before, up to a limit: single reads cost nothing, a long run gets all
 * threads. A jump starts another stream, and what the least recent one still had before it is dropped.
 *
 * Who reads here and there mostly comes back near by: files lie close together, and are read in pieces. So where a read has to
 * inflate a cluster, the next few behind it are inflated too, if that is worth it: each cluster inflated ahead takes credit, and
 * each one that is then read gives twice that. Credit is earned before there is any, by clusters that reads inflate themselves
 * where an earlier one would have had them inflated. So reads far from one another cost nothing more, and others little that is of
 * no use.
 *
 * Workers claim one cluster at a time. A reader that comes to a cluster which is being inflated does not wait idly either, but
 * claims the next one (fq_ahead_help): so reader and workers together reach the speed of all threads.
 *
 * What must hold: all windows together are at most an eighth of the cache's budget, or clusters would be pushed out before they are
 * read, as the cache keeps three quarters for what is used again, and has its shards unevenly filled. Errors are not kept: the
 * reader meets them itself when it comes there. The lock is only ever tried by those who read, so that many threads do not queue
 * here, and that a child after fork, in which it may be held for good, does without read-ahead.
 */
#include "internal.h"
#include "layout.h"

enum {
    GAP_NBYTES = 128 << 10,    /* a read so far behind the last one, or less, continues it: file systems skip what they know */
    THREAD_NBYTES = 512 << 10, /* of window for each thread */
    UNIT_NBYTES_MIN = 64 << 10,
    CLUSTER_NBYTES_MIN = 16 << 10, /* smaller ones are read together, and inflated faster than they are handed over */
    LONG_NBYTES = 16 << 10,        /* where most reads continue others, the first one of so much will be continued too */
    ORDER_MAX = 16,
    RECENT_READS = 16,
    NEAR_UNITS = 3, /* inflated behind a miss */
    CREDIT_MAX = 32,
    CREDIT_OF_USE = 2,
};

/* Called with the lock. The next cluster that some stream wants, in *guest_off; false if there is none. */
static bool claim(fq_reader *r, uint64_t *guest_off)
{
    fq_stream *found = NULL;

    for (size_t i = 0; i < FQ_STREAMS; i++) {
        fq_stream *s = &r->ahead.streams[i];

        if (s->claimed < s->limit && (!found || s->used_at > found->used_at))
            found = s;
    }
    if (!found)
        return false;
    *guest_off = found->claimed;
    found->claimed = (found->claimed | (r->ahead.unit - 1)) + 1;
    return true;
}

static void inflate_ahead(fq_reader *r, uint64_t guest_off, fq_scratch *scratch)
{
    const uint64_t end = guest_off + r->ahead.unit < r->size ? guest_off + r->ahead.unit : r->size;
    fq_error error;
    fq_run run;

    for (; guest_off < end; guest_off += run.nbytes) {
        if (fq_resolve(r, guest_off, end - guest_off, false, NULL, &run, &error) != FQ_OK)
            return;
        if (run.kind == FQ_COMPRESSED && fq_batch_warm(&run, scratch))
            atomic_fetch_sub_explicit(&r->ahead.credit, 1, memory_order_relaxed);
    }
}

static bool work_once(fq_reader *r, fq_scratch *scratch)
{
    uint64_t guest_off;
    bool claimed;

    pthread_mutex_lock(&r->ahead.lock);
    claimed = claim(r, &guest_off);
    pthread_mutex_unlock(&r->ahead.lock);
    if (claimed)
        inflate_ahead(r, guest_off, scratch);
    return claimed;
}

static void work(void *arg, bool is_caller)
{
    fq_reader *r = arg;
    fq_scratch *scratch = fq_scratch_get();

    (void)is_caller;
    if (!scratch)
        return;
    while (!atomic_load_explicit(&r->ahead.stop, memory_order_relaxed) &&
           (work_once(r, scratch) || fq_cache_add_spare(r->clusters)))
        ;
    fq_scratch_put(scratch);
}

void fq_ahead_help(fq_reader *r, fq_scratch *scratch)
{
    uint64_t guest_off;
    bool claimed;

    if (r->ahead.window_max == 0 || pthread_mutex_trylock(&r->ahead.lock) != 0)
        return;
    claimed = claim(r, &guest_off);
    pthread_mutex_unlock(&r->ahead.lock);
    if (claimed)
        inflate_ahead(r, guest_off, scratch);
}

/*
 * Called with the lock. The stream that a read continues, or the least recently used one, to be begun anew there. *active counts
 * those among which the cache is to be shared.
 */
static fq_stream *stream_at(fq_reader *r, uint64_t guest_off, unsigned *active)
{
    fq_stream *oldest = &r->ahead.streams[0], *found = NULL;

    *active = 1;
    for (size_t i = 0; i < FQ_STREAMS; i++) {
        fq_stream *s = &r->ahead.streams[i];

        if (!found && s->used_at && guest_off >= s->next && guest_off - s->next <= GAP_NBYTES)
            found = s;
        else
            *active += s->limit > 0 && r->ahead.clock - s->used_at < RECENT_READS;
        if (s->used_at < oldest->used_at)
            oldest = s;
    }
    if (found) {
        r->ahead.order = r->ahead.order + 2 < ORDER_MAX ? r->ahead.order + 2 : ORDER_MAX;
        return found;
    }
    r->ahead.order -= r->ahead.order > 0;
    *oldest = (fq_stream){.next = guest_off};
    return oldest;
}

unsigned fq_ahead_note(fq_reader *r, uint64_t guest_off, uint64_t nbytes)
{
    const uint64_t unit = r->ahead.unit;
    uint64_t unclaimed, window, window_max;
    unsigned active;
    bool to_the_end;
    fq_stream *s;

    if (r->ahead.window_max == 0 || pthread_mutex_trylock(&r->ahead.lock) != 0)
        return 0;
    s = stream_at(r, guest_off, &active);
    s->used_at = ++r->ahead.clock;
    window_max = r->ahead.share / active < r->ahead.window_max ? r->ahead.share / active : r->ahead.window_max;
    window = 2 * s->read_nbytes;
    if (nbytes >= LONG_NBYTES && (s->read_nbytes > 0 || r->ahead.order >= ORDER_MAX / 4))
        window += 2 * nbytes;
    if (window > window_max)
        window = window_max;
    s->next = guest_off + nbytes;
    s->read_nbytes += nbytes;
    s->limit = s->next < r->size - (window < r->size ? window : r->size) ? s->next + window : r->size;
    if (window == 0)
        s->limit = 0;
    if (s->claimed < s->next)
        s->claimed = ((s->next - 1) | (unit - 1)) + 1;
    unclaimed = s->limit > s->claimed ? s->limit - s->claimed : 0;
    to_the_end = s->limit == r->size;
    pthread_mutex_unlock(&r->ahead.lock);
    /* Waking a worker costs more than a small read: not before there is something to do for it. */
    if (unclaimed == 0 || !atomic_load_explicit(&r->ahead.worthwhile, memory_order_relaxed) ||
        (unclaimed < window / 2 && !to_the_end))
        return 0;
    return unclaimed / unit < r->threads - 1 ? (unsigned)(unclaimed / unit) + 1 : r->threads - 1;
}

/* Called with the lock. Whether one of the last misses would have had this cluster inflated. */
static bool was_near(const fq_reader *r, uint64_t unit)
{
    for (size_t i = 0; i < FQ_MISSES; i++)
        if (unit > r->ahead.missed[i] && unit - r->ahead.missed[i] <= NEAR_UNITS)
            return true;
    return false;
}

void fq_ahead_missed(fq_reader *r, uint64_t guest_off)
{
    fq_stream *last = &r->ahead.streams[0];
    uint64_t near = NEAR_UNITS * r->ahead.unit;
    bool more;

    if (r->ahead.window_max < near || pthread_mutex_trylock(&r->ahead.lock) != 0)
        return;
    for (size_t i = 1; i < FQ_STREAMS; i++)
        if (r->ahead.streams[i].used_at > last->used_at)
            last = &r->ahead.streams[i];
    if (was_near(r, guest_off / r->ahead.unit))
        fq_ahead_used(r);
    r->ahead.missed[r->ahead.misses++ % FQ_MISSES] = (last->next - 1) / r->ahead.unit;
    near = last->next < r->size - (near < r->size ? near : r->size) ? last->next + near : r->size;
    more = last->limit < near && last->claimed < near && atomic_load_explicit(&r->ahead.credit, memory_order_relaxed) > 0;
    if (more)
        last->limit = near;
    pthread_mutex_unlock(&r->ahead.lock);
    if (more || fq_cache_wants_spares(r->clusters))
        fq_pool_start(&r->ahead.job, 1);
}

void fq_ahead_used(fq_reader *r)
{
    if (atomic_load_explicit(&r->ahead.credit, memory_order_relaxed) < CREDIT_MAX)
        atomic_fetch_add_explicit(&r->ahead.credit, CREDIT_OF_USE, memory_order_relaxed);
}

void fq_ahead_start(fq_reader *r, unsigned helpers)
{
    if (helpers > 0)
        fq_pool_start(&r->ahead.job, helpers);
}

void fq_ahead_learn(fq_reader *r, bool compressed)
{
    if (atomic_load_explicit(&r->ahead.worthwhile, memory_order_relaxed) != compressed)
        atomic_store_explicit(&r->ahead.worthwhile, compressed, memory_order_relaxed);
}

void fq_ahead_open(fq_reader *r, size_t cache_nbytes)
{
    uint64_t wanted, largest = 0;

    pthread_mutex_init(&r->ahead.lock, NULL);
    r->ahead.job = (fq_pool_job){.fn = work, .arg = r};
    for (const fq_reader *layer = r; layer; layer = layer->backing)
        if (!layer->raw && fq_cluster_size(&layer->geometry) > largest)
            largest = fq_cluster_size(&layer->geometry);
    r->ahead.unit = largest > UNIT_NBYTES_MIN ? largest : UNIT_NBYTES_MIN;
    r->ahead.share = cache_nbytes / 8;
    wanted = r->threads * (THREAD_NBYTES > 4 * r->ahead.unit ? THREAD_NBYTES : 4 * r->ahead.unit);
    /* File objects are read in their order, and by those who can be told of their exceptions; remote files read ahead themselves.
     */
    if (r->threads > 1 && !r->ordered && !r->remote && !r->raw && largest >= CLUSTER_NBYTES_MIN && r->ahead.share >= r->ahead.unit)
        r->ahead.window_max = wanted < r->ahead.share ? wanted : r->ahead.share;
}

void fq_ahead_close(fq_reader *r)
{
    atomic_store(&r->ahead.stop, true);
    fq_pool_stop(&r->ahead.job);
    pthread_mutex_destroy(&r->ahead.lock);
}
