/*
 * check.h - what check.c (tables, from the L1 down) and refcounts.c (counters and what they are compared with) share
 */
#ifndef FASTQCOW_CHECK_H
#define FASTQCOW_CHECK_H

#include "internal.h"
#include "layout.h"

enum {
    USES_BITS = 10, /* log2 of the clusters to a page of counters */
    L2_BITS = 8,
    L1_SLICE_ENTRIES = 8192,
    BLOCK_SLOTS = 256,
    BLOCK_SLICE_NBYTES = 4096,
};

typedef struct uses_page {
    uint32_t count[1 << USES_BITS];
    uint8_t roles[1 << USES_BITS];
} uses_page;

typedef struct l2_table {
    uint32_t active, inactive; /* references from the active L1 table and from those of snapshots */
    uint32_t l1_index;         /* of one that is active */
} l2_table;

typedef struct block_slice {
    uint64_t host_off; /* FQ_NOWHERE: empty */
    uint8_t bytes[BLOCK_SLICE_NBYTES];
} block_slice;

struct fq_check {
    fq_source *source;
    fq_check_options options;
    uint64_t file_nbytes, clusters;
    uint64_t *refcount_table; /* in the machine's byte order */
    uses_page **uses;
    l2_table **l2_pages;
    uint64_t counters_nbytes, unaligned_nbytes;
    block_slice *blocks;
    uint64_t *l1;
    uint8_t *l2;
    fq_check_counts counts;
    uint64_t reports[FQ_FINDING_KINDS];
};

void fq_check_report(fq_check *check, const fq_finding *found, uint64_t times);
void fq_check_report_at(fq_check *check, fq_finding_kind kind, uint64_t guest_off, uint64_t host_off, uint64_t value,
                        uint64_t times);
/* A page of counters, all zero. */
fq_status fq_check_page(fq_check *check, void **page, size_t nbytes, fq_error *error);
void fq_check_count(uint32_t *to, uint64_t n);
/* What the end of the file cuts off counts as zeroes: that it lies there is found by what refers to it. */
fq_status fq_check_read(fq_check *check, uint8_t *buf, size_t nbytes, uint64_t host_off, const fq_request *request,
                        fq_error *error);
/* The refcount as it stands in the file. *known: false where its table points to no place that a block can have. */
fq_status fq_check_stored(fq_check *check, uint64_t cluster, const fq_request *request, uint64_t *refcount, bool *known,
                          fq_error *error);
/* The references of one range. The last cluster of a file may be cut; what lies farther behind its end is not there. */
fq_status fq_check_refer(fq_check *check, fq_role role, uint64_t guest_off, uint64_t host_off, uint64_t nbytes, uint64_t times,
                         fq_error *error);
static inline bool fq_check_cancelled(const fq_request *request)
{
    return request && request->poll && request->poll(request->user, 0);
}

/* Refcount blocks, and the refcounts in them against the references that were counted. */
fq_status fq_check_compare(fq_check *check, const fq_request *request, fq_error *error);

#endif
