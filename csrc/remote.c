/*
 * remote.c - what a batch needs of remote files, fetched by one call before all else is done
 *
 * To ask a remote file costs as much as many clusters' bytes. So the ranges that a batch is going to read are listed before, those
 * that lie near each other as one, and are fetched at once; the ways of reading in batch.c then find them in scratch->remote, and
 * do not know of it. A range that was not foreseen is fetched on its own.
 *
 * What a file can make us allocate here: as much as for the input in batch.c, and the gaps between a batch's ranges.
 */
#include "internal.h"

#include <string.h>

#define NOT_YET SIZE_MAX

/* To read over it is cheaper than a second range; not less than batch.c's, or a group of clusters could lie in two ranges. */
enum { REMOTE_GAP = 64 << 10 };

fq_status fq_remote_read(const fq_batch *b, const fq_scratch *scratch, fq_source *source, const fq_request *request, uint8_t *to,
                         size_t nbytes, uint64_t host_off, size_t *got, fq_error *error)
{
    for (size_t i = 0; b && i < b->fetched_count; i++) {
        const fq_fetched *f = &b->fetched[i];
        const uint64_t rel = host_off - f->host_off;

        if (f->source != source || host_off < f->host_off || rel > f->nbytes || nbytes > f->nbytes - rel)
            continue;
        *got = rel >= f->got ? 0 : f->got - rel < nbytes ? f->got - (size_t)rel : nbytes;
        memcpy(to, scratch->remote + f->at + rel, *got);
        return FQ_OK;
    }
    return fq_source_read(source, request, to, nbytes, host_off, got, error);
}

/* What the batch needs of remote files. Each way of reading has ranges of its own, as each puts runs together in its own order. */
typedef enum remote_need { WHOLE_CLUSTERS, PARTS_OF_CLUSTERS, PLAIN_DATA, REMOTE_NEEDS } remote_need;

/* The range of the file that a run needs; false if it needs none, or is of another kind. */
static bool needs_range(const fq_batch *b, size_t i, remote_need need, fq_fetched *range)
{
    const fq_run *run = &b->runs[i];
    fq_reader *layer = run->layer;

    if (run->kind == FQ_DATA && need == PLAIN_DATA) {
        const uint64_t sector = layer->crypt.run ? FQ_SECTOR_NBYTES : 1, before = run->host_off % sector;
        const uint64_t nbytes = (before + run->nbytes + sector - 1) / sector * sector;

        *range = (fq_fetched){layer->data, run->host_off - before, (size_t)nbytes, 0, NOT_YET};
    } else if (run->kind == FQ_COMPRESSED && need == (fq_is_whole(run) ? WHOLE_CLUSTERS : PARTS_OF_CLUSTERS)) {
        if (fq_is_whole(run) ? !fq_is_to_be_fetched(b, i) : fq_cache_look(layer->clusters, layer->owner, run->entry) != FQ_ABSENT)
            return false;
        *range = (fq_fetched){layer->source, run->host_off, run->in_nbytes, 0, NOT_YET};
    } else {
        return false;
    }
    return fq_source_is_remote(range->source);
}

static void list_ranges(fq_batch *b)
{
    for (remote_need need = 0; need < REMOTE_NEEDS; need++) {
        fq_fetched *last = NULL, range;

        for (size_t i = 0; i < b->count; i++) {
            if (!needs_range(b, i, need, &range))
                continue;
            if (last && last->source == range.source && range.host_off >= last->host_off &&
                range.host_off - last->host_off <= last->nbytes + REMOTE_GAP) {
                const size_t end = (size_t)(range.host_off - last->host_off) + range.nbytes;

                if (end > last->nbytes)
                    last->nbytes = end;
                continue;
            }
            last = &b->fetched[b->fetched_count++];
            *last = range;
        }
    }
}

/* One call for each of the files: there is mostly one. */
fq_status fq_remote_fetch(fq_job *job, fq_batch *b, fq_scratch *scratch, fq_error *error)
{
    fq_range ranges[FQ_BATCH_RUNS_REMOTE];
    size_t total = 0;

    list_ranges(b);
    for (size_t i = 0; i < b->fetched_count; i++) {
        b->fetched[i].at = total;
        total += b->fetched[i].nbytes;
    }
    if (!fq_scratch_grow(&scratch->remote, &scratch->remote_capacity, total)) {
        fq_fail(error, FQ_ERR_NOMEM, b->runs[0].guest_off, FQ_NOWHERE, FQ_NOWHERE);
        error->depth = b->runs[0].depth;
        return error->status;
    }
    for (size_t i = 0; i < b->fetched_count; i++) {
        fq_source *source = b->fetched[i].source;
        size_t count = 0;
        fq_status status;

        if (b->fetched[i].got != NOT_YET)
            continue;
        for (size_t k = i; k < b->fetched_count; k++) {
            const fq_fetched *f = &b->fetched[k];

            if (f->source == source)
                ranges[count++] = (fq_range){f->host_off, f->nbytes, scratch->remote + f->at, 0};
        }
        status = fq_source_read_ranges(source, job->request, ranges, count, error);
        if (status != FQ_OK) {
            error->guest_off = b->guest_off;
            return status;
        }
        count = 0;
        for (size_t k = i; k < b->fetched_count; k++)
            if (b->fetched[k].source == source)
                b->fetched[k].got = ranges[count++].got;
    }
    return FQ_OK;
}
