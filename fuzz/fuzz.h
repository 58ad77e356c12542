/*
 * fuzz.h - what the fuzz targets share
 *
 * A target is a function of bytes, which libFuzzer calls, or replay.c. What it checks it checks by CHECK.
 */
#ifndef FASTQCOW_FUZZ_H
#define FASTQCOW_FUZZ_H

#include "internal.h"
#include "layout.h"
#include "testing.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

/* ---- memory between pages that cannot be touched, also where a sanitizer does not look, as inside of the codecs' libraries */

typedef struct arena {
    uint8_t *start;
    size_t nbytes;
} arena;

static inline arena new_arena(size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (nbytes + page - 1) / page * page;
    uint8_t *at = mmap(NULL, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(at != MAP_FAILED && mprotect(at + page, whole, PROT_READ | PROT_WRITE) == 0);
    return (arena){at + page, whole};
}

typedef enum side { BEFORE, BEHIND, SIDES } side;

/* nbytes that a page which cannot be touched lies right before, or right behind. */
static inline uint8_t *guarded_at(const arena *a, side side, size_t nbytes)
{
    CHECK(nbytes <= a->nbytes);
    return side == BEFORE ? a->start : a->start + a->nbytes - nbytes;
}

/* ---- input, taken piece by piece; zeroes where there is no more */

typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

static inline uint64_t take_number(input *in, size_t nbytes)
{
    uint64_t number = 0;

    for (size_t i = 0; i < nbytes; i++) {
        number = number << 8 | (in->left ? *in->at : 0);
        if (in->left) {
            in->at++;
            in->left--;
        }
    }
    return number;
}

/* ---- files in memory */

typedef struct file {
    const uint8_t *bytes;
    size_t nbytes;
} file;

static inline ptrdiff_t read_file(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    const file *f = opaque;

    (void)user;
    if (host_off >= f->nbytes)
        return 0;
    if (nbytes > f->nbytes - host_off)
        nbytes = f->nbytes - (size_t)host_off;
    memcpy(buf, f->bytes + host_off, nbytes);
    return (ptrdiff_t)nbytes;
}

static inline int read_file_ranges(void *opaque, void *user, fq_range *ranges, size_t count)
{
    for (size_t i = 0; i < count; i++)
        ranges[i].got = (size_t)read_file(opaque, user, ranges[i].buf, ranges[i].nbytes, ranges[i].host_off);
    return 0;
}

/* A descriptor of a file without a name, which is emptied for each input. */
static inline int emptied(int *fd)
{
    if (*fd < 0)
        *fd = memfd_create("fuzz", 0);
    CHECK(*fd >= 0 && ftruncate(*fd, 0) == 0);
    return *fd;
}

static inline fq_status read_at(fq_reader *reader, uint8_t *to, size_t nbytes, uint64_t off, fq_error *error)
{
    const fq_iovec iov = {to, nbytes, 0};

    return fq_reader_preadv(reader, &iov, 1, off, NULL, error);
}

#endif
