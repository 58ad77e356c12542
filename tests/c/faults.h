/*
 * faults.h - calls below the core that fail, one after the other, while an operation of it runs
 *
 * Memory, threads, reads and writes come from wrappers here (the linker's --wrap), of which the nth call fails, for every n until
 * all of an operation succeeds. It must then end with the status that the fault has, or with the right bytes; nothing may be left
 * allocated; and once the fault is over the same reader has to read on. To be run under ASan, which finds what is used after it
 * was freed, and what the codecs' libraries leave.
 */
#ifndef FASTQCOW_FAULTS_H
#define FASTQCOW_FAULTS_H

#include "material.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <zstd_errors.h>
#ifdef FQ_HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif

typedef enum fault {
    NO_MEMORY,
    NO_MEMORY_FROM_THEN_ON,
    NO_THREAD,
    READ_EIO,
    READ_EINTR,
    READ_SHORT,
    READ_NOTHING, /* as if the file ended there */
    WRITE_EIO,
    WRITE_ENOSPC,
    WRITE_EINTR,
    WRITE_SHORT,
    WRITE_NOTHING,
    FAULTS
} fault;

static const char *const fault_names[FAULTS] = {
    "no memory once", "no memory from then on", "no thread",    "read: EIO",    "read: EINTR",   "read: short", "read: end of file",
    "write: EIO",     "write: ENOSPC",          "write: EINTR", "write: short", "write: nothing"};
static unsigned long injected[FAULTS];

static void tell_injected(const char *of)
{
    printf("%s: all tests passed; faults injected, by class:\n", of);
    for (fault f = 0; f < FAULTS; f++)
        if (injected[f])
            printf("%8lu %s\n", injected[f], fault_names[f]);
}

/* Without libdeflate, where little is different, each seventh place does. */
#ifdef FQ_HAVE_LIBDEFLATE
enum { STEP = EACH };
#else
enum { STEP = 7 };
#endif

static atomic_bool armed;
static _Atomic fault kind;
static atomic_int calls, nth; /* of the kind that is armed */
static atomic_int live;       /* allocations of the core */

static bool is_memory(void)
{
    return kind == NO_MEMORY || kind == NO_MEMORY_FROM_THEN_ON;
}

/* Whether a call that belongs to the armed kind of fault is the one to fail. */
static bool strikes(bool concerned)
{
    int n;

    if (!atomic_load(&armed) || !concerned)
        return false;
    n = atomic_fetch_add(&calls, 1) + 1;
    return kind == NO_MEMORY_FROM_THEN_ON || kind == NO_THREAD ? n >= atomic_load(&nth) : n == atomic_load(&nth);
}

static void *counted(void *made)
{
    if (made)
        atomic_fetch_add(&live, 1);
    return made;
}

void *__real_malloc(size_t nbytes);
void *__wrap_malloc(size_t nbytes);
void *__wrap_malloc(size_t nbytes)
{
    return strikes(is_memory()) ? NULL : counted(__real_malloc(nbytes));
}

void *__real_calloc(size_t count, size_t nbytes);
void *__wrap_calloc(size_t count, size_t nbytes);
void *__wrap_calloc(size_t count, size_t nbytes)
{
    return strikes(is_memory()) ? NULL : counted(__real_calloc(count, nbytes));
}

void *__real_realloc(void *old, size_t nbytes);
void *__wrap_realloc(void *old, size_t nbytes);
void *__wrap_realloc(void *old, size_t nbytes)
{
    if (strikes(is_memory()))
        return NULL;
    return old ? __real_realloc(old, nbytes) : counted(__real_realloc(old, nbytes));
}

void *__real_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes)
{
    return strikes(is_memory()) ? NULL : counted(__real_aligned_alloc(alignment, nbytes));
}

void __real_free(void *old);
void __wrap_free(void *old);
void __wrap_free(void *old)
{
    if (old)
        atomic_fetch_sub(&live, 1);
    __real_free(old);
}

/* What the libraries allocate is out of reach, but not how they say that they could not. */
int __real_inflateInit2_(z_streamp z, int bits, const char *version, int nbytes);
int __wrap_inflateInit2_(z_streamp z, int bits, const char *version, int nbytes);
int __wrap_inflateInit2_(z_streamp z, int bits, const char *version, int nbytes)
{
    return strikes(is_memory()) ? Z_MEM_ERROR : __real_inflateInit2_(z, bits, version, nbytes);
}

int __real_deflateInit2_(z_streamp z, int level, int method, int bits, int mem, int strategy, const char *version, int nbytes);
int __wrap_deflateInit2_(z_streamp z, int level, int method, int bits, int mem, int strategy, const char *version, int nbytes);
int __wrap_deflateInit2_(z_streamp z, int level, int method, int bits, int mem, int strategy, const char *version, int nbytes)
{
    return strikes(is_memory()) ? Z_MEM_ERROR : __real_deflateInit2_(z, level, method, bits, mem, strategy, version, nbytes);
}

ZSTD_DCtx *__real_ZSTD_createDCtx(void);
ZSTD_DCtx *__wrap_ZSTD_createDCtx(void);
ZSTD_DCtx *__wrap_ZSTD_createDCtx(void)
{
    return strikes(is_memory()) ? NULL : __real_ZSTD_createDCtx();
}

ZSTD_CCtx *__real_ZSTD_createCCtx(void);
ZSTD_CCtx *__wrap_ZSTD_createCCtx(void);
ZSTD_CCtx *__wrap_ZSTD_createCCtx(void)
{
    return strikes(is_memory()) ? NULL : __real_ZSTD_createCCtx();
}

size_t __real_ZSTD_compress2(ZSTD_CCtx *c, void *out, size_t room, const void *in, size_t nbytes);
size_t __wrap_ZSTD_compress2(ZSTD_CCtx *c, void *out, size_t room, const void *in, size_t nbytes);
size_t __wrap_ZSTD_compress2(ZSTD_CCtx *c, void *out, size_t room, const void *in, size_t nbytes)
{
    return strikes(is_memory()) ? (size_t)-ZSTD_error_memory_allocation : __real_ZSTD_compress2(c, out, room, in, nbytes);
}

size_t __real_ZSTD_decompressDCtx(ZSTD_DCtx *d, void *out, size_t room, const void *in, size_t nbytes);
size_t __wrap_ZSTD_decompressDCtx(ZSTD_DCtx *d, void *out, size_t room, const void *in, size_t nbytes);
size_t __wrap_ZSTD_decompressDCtx(ZSTD_DCtx *d, void *out, size_t room, const void *in, size_t nbytes)
{
    return strikes(is_memory()) ? (size_t)-ZSTD_error_memory_allocation : __real_ZSTD_decompressDCtx(d, out, room, in, nbytes);
}

#ifdef FQ_HAVE_LIBDEFLATE
struct libdeflate_decompressor *__real_libdeflate_alloc_decompressor(void);
struct libdeflate_decompressor *__wrap_libdeflate_alloc_decompressor(void);
struct libdeflate_decompressor *__wrap_libdeflate_alloc_decompressor(void)
{
    return strikes(is_memory()) ? NULL : __real_libdeflate_alloc_decompressor();
}
#endif

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    return strikes(kind == NO_THREAD) ? EAGAIN : __real_pthread_create(thread, attr, fn, arg);
}

/* What a read or a write is to return in place of what it would do: -1 and an errno, fewer bytes, or SIZE_MAX for nothing unusual.
 */
static size_t fate_of_read(size_t nbytes)
{
    if (!strikes(kind >= READ_EIO && kind <= READ_NOTHING))
        return SIZE_MAX;
    errno = kind == READ_EIO ? EIO : EINTR;
    return kind == READ_SHORT ? (nbytes + 1) / 2 : 0;
}

static bool read_fails(void)
{
    return kind == READ_EIO || kind == READ_EINTR;
}

ssize_t __real_pread64(int fd, void *buf, size_t nbytes, off_t off);
ssize_t __wrap_pread64(int fd, void *buf, size_t nbytes, off_t off);
ssize_t __wrap_pread64(int fd, void *buf, size_t nbytes, off_t off)
{
    const size_t n = fate_of_read(nbytes);

    return n == 0 ? (read_fails() ? -1 : 0) : __real_pread64(fd, buf, n < nbytes ? n : nbytes, off);
}

ssize_t __real_read(int fd, void *buf, size_t nbytes);
ssize_t __wrap_read(int fd, void *buf, size_t nbytes);
ssize_t __wrap_read(int fd, void *buf, size_t nbytes)
{
    const size_t n = fate_of_read(nbytes);

    return n == 0 ? (read_fails() ? -1 : 0) : __real_read(fd, buf, n < nbytes ? n : nbytes);
}

int __real_poll(struct pollfd *fds, nfds_t count, int ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int ms);
int __wrap_poll(struct pollfd *fds, nfds_t count, int ms)
{
    if (!strikes(kind == READ_EIO || kind == READ_EINTR))
        return __real_poll(fds, count, ms);
    errno = kind == READ_EIO ? EIO : EINTR;
    return -1;
}

ssize_t __real_pwrite64(int fd, const void *buf, size_t nbytes, off_t off);
ssize_t __wrap_pwrite64(int fd, const void *buf, size_t nbytes, off_t off);
ssize_t __wrap_pwrite64(int fd, const void *buf, size_t nbytes, off_t off)
{
    if (!strikes(kind >= WRITE_EIO))
        return __real_pwrite64(fd, buf, nbytes, off);
    if (kind == WRITE_SHORT)
        return __real_pwrite64(fd, buf, (nbytes + 1) / 2, off);
    errno = kind == WRITE_EIO ? EIO : kind == WRITE_ENOSPC ? ENOSPC : EINTR;
    return kind == WRITE_NOTHING ? 0 : -1;
}

/* What an operation works on. */
typedef struct setting {
    const image *m;
    int fd, out;
    unsigned threads;
    const fq_encoder *encoder;
    unsigned cluster_bits;
    size_t tables_nbytes;
    fq_error error;
} setting;

enum { SIZE = 11 * CLUSTER, ROOM = 2 * SIZE };

static uint8_t found[ROOM];

static fq_status open_with(const setting *s, fq_source *source, fq_reader *backing, fq_reader **reader, fq_error *error)
{
    const fq_reader_options options = {.geometry = {.version = 3, .cluster_bits = BITS, .codec = s->m->codec},
                                       .size = s->m->size,
                                       .l1_entries = 1,
                                       .largest_cluster = CLUSTER,
                                       .cluster_cache_nbytes = 16 * CLUSTER,
                                       .table_cache_nbytes = 1 << 20,
                                       .threads = s->threads};

    return source ? fq_reader_open_qcow2(source, NULL, backing, NULL, &options, NULL, reader, error)
                  : fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
}

static fq_status expect(const setting *s, fq_reader *reader, size_t nbytes, uint64_t off, fq_error *error)
{
    fq_status status;

    memset(found, 0xaa, nbytes);
    status = read_at(reader, found, nbytes, off, error);
    CHECK(status != FQ_OK || memcmp(found, s->m->contents + off, nbytes) == 0);
    return status;
}

static void give_back_scratches(void)
{
    kind = NO_MEMORY_FROM_THEN_ON;
    atomic_store(&calls, 0);
    atomic_store(&nth, 1);
    atomic_store(&armed, true);
    for (fq_scratch *s; (s = fq_scratch_get());)
        fq_scratch_free(s);
    atomic_store(&armed, false);
}

static bool is_right(fault f, fq_status status, const fq_error *error)
{
    if (status == FQ_OK)
        return true;
    switch (f) {
    case NO_MEMORY:
    case NO_MEMORY_FROM_THEN_ON:
        return status == FQ_ERR_NOMEM;
    case READ_EIO:
        return status == FQ_ERR_READ && error->sys_errno == EIO;
    case READ_NOTHING:
        return status == FQ_ERR_SHORT_READ || status == FQ_ERR_L1_EOF || status == FQ_ERR_L2_EOF ||
               status == FQ_ERR_COMPRESSED_EOF || status == FQ_ERR_INFLATED_SHORT || status == FQ_ERR_ZSTD;
    case WRITE_EIO:
    case WRITE_NOTHING:
        return status == FQ_ERR_WRITE && error->sys_errno == EIO;
    case WRITE_ENOSPC:
        return status == FQ_ERR_WRITE && error->sys_errno == ENOSPC;
    default:
        return false; /* interrupted, or done in parts: it goes on; without a thread the others do the work */
    }
}

static void strike_everywhere(fq_status (*op)(setting *s), setting *s, fault f)
{
    bool reached = true;

    for (int n = 1; reached; n += STEP) {
        const int before = (give_back_scratches(), atomic_load(&live));
        fq_status status;

        kind = f;
        atomic_store(&calls, 0);
        atomic_store(&nth, n);
        memset(&s->error, 0, sizeof(s->error));
        atomic_store(&armed, true);
        status = op(s);
        atomic_store(&armed, false);
        reached = atomic_load(&calls) >= n;
        injected[f] += reached;
        if (!is_right(f, status, &s->error) || (!reached && status != FQ_OK)) {
            fprintf(stderr, "%s, call %d of %d, %u threads: %s, errno %d\n", fault_names[f], n, atomic_load(&calls), s->threads,
                    fq_status_sentence(status), s->error.sys_errno);
            exit(1);
        }
        give_back_scratches();
        if (atomic_load(&live) != before) {
            fprintf(stderr, "%s, call %d: %d allocations are left\n", fault_names[f], n, atomic_load(&live) - before);
            exit(1);
        }
    }
}

#endif
