/*
 * scratch.c - buffers and codec states that outlive one call
 *
 * A thread at work takes one from a list and puts it back when it is done, so there are never more than there were threads at work
 * at once, and the one that was used last, whose memory is warm, is used next. A list under a lock rather than thread-local
 * storage: callers are threads that we did not start, and would leave their state behind when they end.
 */
#include "internal.h"

#include <stdlib.h>

enum {
    KEPT_SCRATCHES = 32,
    KEPT_NBYTES = 4 << 20, /* larger buffers, which only 2 MiB clusters need, are given back */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static fq_scratch *kept;
static unsigned kept_count;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The lock is held for a few instructions only; holding it over fork keeps the child's list whole. */
static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

static void set_up(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}

fq_scratch *fq_scratch_get(void)
{
    fq_scratch *s;

    pthread_once(&once, set_up);
    pthread_mutex_lock(&lock);
    s = kept;
    if (s) {
        kept = s->next;
        kept_count--;
    }
    pthread_mutex_unlock(&lock);
    if (s)
        return s;

    s = calloc(1, sizeof(*s));
    if (s && !(s->inflater = fq_inflater_new())) {
        free(s);
        return NULL;
    }
    return s;
}

static void scratch_trim(uint8_t **buf, size_t *capacity)
{
    if (*capacity > KEPT_NBYTES) {
        free(*buf);
        *buf = NULL;
        *capacity = 0;
    }
}

void fq_scratch_free(fq_scratch *s)
{
    if (!s)
        return;
    fq_inflater_free(s->inflater);
    free(s->in);
    free(s->out);
    free(s->gather);
    free(s->crypt);
    free(s->remote);
    free(s);
}

void fq_scratch_put(fq_scratch *s)
{
    scratch_trim(&s->in, &s->in_capacity);
    scratch_trim(&s->out, &s->out_capacity);
    scratch_trim(&s->gather, &s->gather_capacity);
    scratch_trim(&s->remote, &s->remote_capacity);
    pthread_mutex_lock(&lock);
    if (kept_count < KEPT_SCRATCHES) {
        s->next = kept;
        kept = s;
        kept_count++;
        s = NULL;
    }
    pthread_mutex_unlock(&lock);
    fq_scratch_free(s);
}

/* The old contents are not kept: free and allocate moves no bytes where realloc would. */
bool fq_scratch_grow(uint8_t **buf, size_t *capacity, size_t nbytes)
{
    if (*capacity >= nbytes)
        return true;
    free(*buf);
    *capacity = 0;
    *buf = malloc(nbytes);
    if (!*buf)
        return false;
    *capacity = nbytes;
    return true;
}

fq_status fq_inflate(fq_codec codec, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    fq_scratch *s = fq_scratch_get();
    fq_status status;

    if (!s)
        return FQ_ERR_NOMEM;
    status = fq_inflater_run(s->inflater, codec, in, in_nbytes, out, out_nbytes);
    fq_scratch_put(s);
    return status;
}
