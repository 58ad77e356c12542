/*
 * digest.c - the bytes of a job to a digest, in the order of the disk
 *
 * Batches are made by many threads and come in any order, and a digest takes bytes in one. Nobody hands them over, nor keeps them:
 * who has made a batch waits until it is that batch's turn, and has it digested itself, while others go on inflating theirs. As
 * batches are claimed in order, the one whose turn it is is always under way. The memory is what the batches have anyway.
 *
 * Zeroes that tables tell of are digested without being read, a piece at a time, as there may be any number of them.
 */
#include "internal.h"

enum { ZEROES_NBYTES = 1 << 20 };

void fq_digest_init(fq_digest *d)
{
    *d = (fq_digest){.next = 0};
    pthread_mutex_init(&d->lock, NULL);
    fq_cond_init(&d->turn);
}

void fq_digest_destroy(fq_digest *d)
{
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->turn);
}

static bool wait_for_turn(fq_job *job, fq_digest *d, uint64_t from, bool is_caller)
{
    bool is_ours;

    pthread_mutex_lock(&d->lock);
    while (d->next != from && !atomic_load(&job->stop)) {
        fq_wait_briefly(&d->turn, &d->lock);
        if (is_caller) {
            pthread_mutex_unlock(&d->lock);
            fq_job_poll(job);
            pthread_mutex_lock(&d->lock);
        }
    }
    is_ours = d->next == from;
    pthread_mutex_unlock(&d->lock);
    return is_ours;
}

static bool digest_zeroes(fq_job *job, uint64_t nbytes, bool is_caller)
{
    while (nbytes > 0) {
        const uint64_t n = nbytes < ZEROES_NBYTES ? nbytes : ZEROES_NBYTES;

        if (is_caller)
            fq_job_poll(job);
        if (atomic_load(&job->stop) || job->request->digest(job->request->user, NULL, n) != 0)
            return false;
        nbytes -= n;
    }
    return true;
}

fq_status fq_digest_take(fq_job *job, fq_digest *d, uint64_t from, uint64_t guest_off, const uint8_t *bytes, uint64_t nbytes,
                         bool is_caller, fq_error *error)
{
    const uint64_t zeroes = guest_off - from + (bytes ? 0 : nbytes);

    if (!wait_for_turn(job, d, from, is_caller) || !digest_zeroes(job, zeroes, is_caller) ||
        (bytes && job->request->digest(job->request->user, bytes, nbytes) != 0))
        return fq_fail(error, FQ_ERR_CANCELLED, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
    pthread_mutex_lock(&d->lock);
    d->next = guest_off + nbytes;
    pthread_cond_broadcast(&d->turn);
    pthread_mutex_unlock(&d->lock);
    return FQ_OK;
}
