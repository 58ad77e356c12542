/*
 * export.c - a range of a reader to a descriptor
 *
 * Threads claim batches as any read does, inflate into a buffer of their own, and write by position what is not zero: nothing is
 * handed over, nothing is put in order. Ranges that the tables already call zero are not claimed as data and cost nothing, however
 * long.
 *
 * Zeroes inside data are found a grain at a time (4 KiB as qemu-img does, at offsets that are multiples of it): the first word
 * tells for almost every grain that it is not zero; for one that may be, memcmp with itself one word on runs at memory speed.
 *
 * On demand, plain data is copied by the kernel, which on file systems that share blocks costs nothing. Nobody looks for zeroes
 * then.
 */
#include "internal.h"
#include "layout.h"

#include <fcntl.h>
#include <unistd.h>

enum { ZEROES_NBYTES = 64 << 10 };

static const uint8_t zeroes[ZEROES_NBYTES];

typedef struct export_to {
    const fq_target *target;
    atomic_uint_fast64_t written;
    atomic_bool cannot_punch, cannot_copy;
} export_to;

static fq_status write_at(export_to *to, const uint8_t *p, size_t nbytes, uint64_t off, fq_error *error)
{
    size_t done;
    const fq_status status = fq_pwrite(to->target->fd, p, nbytes, off, &done, error);

    fq_count(&to->written, done);
    return status;
}

/* Make a range of the target read as zeroes: as a hole where it can have one and should, else by writing them. */
static fq_status write_zeroes(fq_job *job, export_to *to, uint64_t off, uint64_t nbytes, bool is_caller, fq_error *error)
{
    if (to->target->reads_zero)
        return FQ_OK;
#ifdef FALLOC_FL_PUNCH_HOLE
    if (to->target->grain > 0 && !atomic_load(&to->cannot_punch)) {
        if (fallocate(to->target->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)nbytes) == 0)
            return FQ_OK;
        atomic_store(&to->cannot_punch, true);
    }
#endif
    while (nbytes > 0 && !atomic_load(&job->stop)) {
        const size_t n = nbytes < ZEROES_NBYTES ? (size_t)nbytes : ZEROES_NBYTES;
        const fq_status status = write_at(to, zeroes, n, off, error);

        if (status != FQ_OK)
            return status;
        off += n;
        nbytes -= n;
        if (is_caller)
            fq_job_poll(job);
    }
    return FQ_OK;
}

/* Write a buffer, leaving out the grains that are zero. Grains lie at multiples of their size; the ends of the range may cut one.
 */
static fq_status write_sparse(fq_job *job, export_to *to, const uint8_t *p, uint64_t nbytes, uint64_t off, bool is_caller,
                              fq_error *error)
{
    const uint64_t grain = to->target->grain;
    uint64_t at = 0, run = 0; /* [run, at) is of one kind */
    bool run_is_zero = false;

    if (grain == 0)
        return write_at(to, p, (size_t)nbytes, off, error);
    while (run < nbytes) {
        uint64_t n = grain - (off + at) % grain;
        bool zero;

        if (n > nbytes - at)
            n = nbytes - at;
        zero = n > 0 && fq_is_zero(p + at, (size_t)n);
        if (at > run && (n == 0 || zero != run_is_zero)) {
            const fq_status status = run_is_zero ? write_zeroes(job, to, off + run, at - run, is_caller, error)
                                                 : write_at(to, p + run, (size_t)(at - run), off + run, error);

            if (status != FQ_OK)
                return status;
            run = at;
        }
        run_is_zero = zero;
        at += n;
    }
    return FQ_OK;
}

static fq_status write_batch(fq_job *job, uint64_t guest_off, const uint8_t *bytes, uint64_t nbytes, bool is_caller,
                             fq_error *error)
{
    return bytes ? write_sparse(job, job->arg, bytes, nbytes, guest_off, is_caller, error)
                 : write_zeroes(job, job->arg, guest_off, nbytes, is_caller, error);
}

/* What stops it is met again where the bytes are read and written, and reported there. */
static bool copy_batch(fq_job *job, const fq_batch *b)
{
    export_to *to = job->arg;

    for (size_t i = 0; i < b->count; i++) {
        const fq_run *run = &b->runs[i];

        if (atomic_load(&to->cannot_copy))
            return false;
        if (!fq_source_copy(run->layer->data, run->host_off, to->target->fd, run->guest_off, run->nbytes)) {
            atomic_store(&to->cannot_copy, true);
            return false;
        }
    }
    fq_count(&to->written, b->nbytes);
    return true;
}

fq_status fq_export(fq_reader *r, uint64_t guest_off, uint64_t nbytes, const fq_target *target, uint64_t *written,
                    const fq_request *request, fq_error *error)
{
    const bool digested = request && request->digest;
    export_to to = {.target = target};
    fq_digest digest;
    fq_status status;
    fq_job job;

    *written = 0;
    if (guest_off > r->size || nbytes > r->size - guest_off)
        return fq_fail(error, FQ_ERR_ARGUMENT, guest_off, FQ_NOWHERE, nbytes);
    fq_job_init(&job, r, guest_off, nbytes, request);
    job.write = write_batch;
    job.zeroes_are_free = target->reads_zero;
    job.copy = target->offload && !digested ? copy_batch : NULL;
    job.digest = digested ? &digest : NULL;
    job.arg = &to;
    fq_digest_init(&digest);
    digest.next = guest_off;
    status = fq_job_run(&job, r->threads, error);
    fq_digest_destroy(&digest);
    *written = atomic_load(&to.written);
    return status;
}
