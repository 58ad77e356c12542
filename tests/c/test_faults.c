/*
 * test_faults.c - what fails below the core, at every place where it can, one after the other
 *
 * Memory, threads, reads and writes come from wrappers here (the linker's --wrap), of which the nth call fails, for every n until
 * all of an operation succeeds. It must then end with the status that the fault has, or with the right bytes; nothing may be left
 * allocated; and once the fault is over the same reader has to read on. To be run under ASan, which finds what is used after it
 * was freed, and what the codecs' libraries leave.
 */
#include "material.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <zstd_errors.h>
#ifdef FQ_HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif

/* ---- faults */

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

/* Under TSan, which is slow, and without libdeflate, where little is different, some places do. */
#if defined(__SANITIZE_THREAD__) || !defined(FQ_HAVE_LIBDEFLATE)
enum { STEP = 7 };
#else
enum { STEP = 1 };
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

/* ---- operations: each opens what it needs, and returns the first status that is not FQ_OK; its bytes are right if all are */

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

static uint8_t found[ROOM], file_made[4 * SIZE];

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

/* The whole, pieces that are scattered, steps that are read ahead of, and a map. */
static fq_status read_all(const setting *s, fq_source *source, fq_error *error)
{
    fq_reader *reader = NULL;
    fq_status status = open_with(s, source, NULL, &reader, error);
    fq_extent extents[2 * CLUSTERS];
    uint64_t end = 0;
    size_t count;

    for (size_t off = 0; status == FQ_OK && off < 5 * CLUSTER; off += 9000)
        status = expect(s, reader, 9000, off, error);
    if (status == FQ_OK)
        status = expect(s, reader, 3 * CLUSTER, 8 * CLUSTER - 700, error);
    if (status == FQ_OK)
        status = expect(s, reader, s->m->size, 0, error);
    if (status == FQ_OK)
        status = fq_reader_map(reader, 0, s->m->size, extents, 2 * CLUSTERS, &count, NULL, error);
    for (size_t i = 0; status == FQ_OK && i < count; end += extents[i++].nbytes)
        CHECK(extents[i].guest_off == end);
    CHECK(status != FQ_OK || end == s->m->size);
    if (reader) { /* nothing wrong was kept */
        fq_error again;

        atomic_store(&armed, false);
        CHECK(expect(s, reader, s->m->size, 0, &again) == FQ_OK);
        CHECK(expect(s, reader, 10, CLUSTER - 5, &again) == FQ_OK);
    }
    fq_reader_close(reader);
    return status;
}

static fq_status op_descriptor(setting *s)
{
    fq_source *source = fq_source_fd(s->fd, true);
    const fq_status status = read_all(s, source, &s->error);

    fq_source_free(source);
    return status;
}

static fq_status op_chain(setting *s)
{
    fq_source *source = fq_source_fd(s->fd, true);
    fq_reader *below = NULL, *reader = NULL;
    fq_status status = open_with(s, source, NULL, &below, &s->error);

    if (status == FQ_OK)
        status = open_with(s, source, below, &reader, &s->error);
    if (status == FQ_OK)
        status = expect(s, reader, s->m->size, 0, &s->error);
    if (status == FQ_OK)
        status = expect(s, reader, 5000, CLUSTER - 100, &s->error);
    fq_reader_close(reader);
    fq_reader_close(below);
    fq_source_free(source);
    return status;
}

static fq_status op_callback(setting *s)
{
    memory at = {.m = s->m};
    fq_source *source = fq_source_callback(read_memory, &at, s->m->nbytes);
    const fq_status status = read_all(s, source, &s->error);

    fq_source_free(source);
    return status;
}

static fq_status op_remote(setting *s)
{
    memory at = {.m = s->m};
    fq_source *source = fq_source_remote(read_memory_ranges, &at, s->m->nbytes);
    const fq_status status = read_all(s, source, &s->error);

    fq_source_free(source);
    return status;
}

static fq_status export_to(setting *s, uint64_t grain, bool reads_zero)
{
    const fq_target target = {s->out, grain, reads_zero, false};
    fq_source *source = fq_source_fd(s->fd, true);
    fq_reader *reader = NULL;
    fq_status status = open_with(s, source, NULL, &reader, &s->error);
    uint64_t written;

    CHECK(ftruncate(s->out, 0) == 0 && ftruncate(s->out, (off_t)s->m->size) == 0);
    if (status == FQ_OK)
        status = fq_export(reader, 0, s->m->size, &target, &written, NULL, &s->error);
    fq_reader_close(reader);
    fq_source_free(source);
    atomic_store(&armed, false);
    CHECK(status != FQ_OK || pread(s->out, found, s->m->size, 0) == (ssize_t)s->m->size);
    CHECK(status != FQ_OK || memcmp(found, s->m->contents, s->m->size) == 0);
    return status;
}

static fq_status op_export_sparse(setting *s)
{
    return export_to(s, 4096, true);
}

static fq_status op_export_all(setting *s)
{
    return export_to(s, 0, false);
}

static fq_write_options options_of(const setting *s)
{
    return (fq_write_options){.fd = s->out,
                              .geometry = {.version = 3,
                                           .cluster_bits = s->cluster_bits,
                                           .codec = s->encoder == &fq_encoder_zstd ? FQ_CODEC_ZSTD : FQ_CODEC_DEFLATE},
                              .refcount_order = 4,
                              .encoder = s->encoder,
                              .grain = 4096,
                              .level = 1,
                              .threads = s->threads,
                              .tables_nbytes = s->tables_nbytes};
}

/* What was written reads as what it was made of. Nothing is armed. */
static void check_made(const setting *s, const fq_write_options *o, const fq_written *written, size_t nbytes)
{
    const image made = {.file = file_made, .nbytes = (size_t)written->nbytes};
    memory at = {.m = &made};
    fq_source *source = fq_source_callback(read_memory, &at, written->nbytes);
    const fq_reader_options options = {.geometry = o->geometry,
                                       .size = written->size,
                                       .l1_off = written->l1_off,
                                       .l1_entries = written->l1_entries,
                                       .largest_cluster = (size_t)1 << s->cluster_bits,
                                       .table_cache_nbytes = 1 << 20,
                                       .threads = 1};
    fq_reader *reader;
    fq_error error;

    CHECK(written->nbytes <= sizeof(file_made) && written->size >= nbytes && written->size <= ROOM);
    memset(file_made, 0, sizeof(file_made));
    CHECK(pread(s->out, file_made, written->nbytes, 0) >= 0);
    CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(expect(s, reader, nbytes, 0, &error) == FQ_OK);
    fq_reader_close(reader);
    fq_source_free(source);
}

static fq_status op_write(setting *s)
{
    const fq_write_options o = options_of(s);
    fq_source *source = fq_source_fd(s->fd, true);
    fq_reader *reader = NULL;
    fq_status status = open_with(s, source, NULL, &reader, &s->error);
    fq_written written;

    CHECK(ftruncate(s->out, 0) == 0);
    if (status == FQ_OK)
        status = fq_write(reader, -1, NULL, &o, &written, NULL, &s->error);
    fq_reader_close(reader);
    fq_source_free(source);
    atomic_store(&armed, false);
    if (status == FQ_OK)
        check_made(s, &o, &written, s->m->size);
    return status;
}

static fq_status op_write_over(setting *s)
{
    const fq_write_options o = options_of(s);
    fq_source *source = fq_source_fd(s->fd, true);
    fq_reader *reader = NULL, *below = NULL;
    fq_status status = open_with(s, source, NULL, &reader, &s->error);
    fq_written written;

    CHECK(ftruncate(s->out, 0) == 0);
    if (status == FQ_OK)
        status = open_with(s, source, NULL, &below, &s->error);
    if (status == FQ_OK)
        status = fq_write(reader, -1, below, &o, &written, NULL, &s->error);
    CHECK(status != FQ_OK || written.compressed + written.plain == 0); /* there is no difference */
    fq_reader_close(reader);
    fq_reader_close(below);
    fq_source_free(source);
    return status;
}

/* A stream: a file with the contents, read by its position. */
static fq_status op_write_stream(setting *s)
{
    static int stream = -1;
    const fq_write_options o = options_of(s);
    fq_written written;
    fq_status status;

    if (stream < 0)
        stream = temporary_file(s->m->contents, s->m->size);
    CHECK(lseek(stream, 0, SEEK_SET) == 0 && ftruncate(s->out, 0) == 0);
    status = fq_write(NULL, stream, NULL, &o, &written, NULL, &s->error);
    atomic_store(&armed, false);
    if (status == FQ_OK && kind != READ_NOTHING) /* which is the end of a stream */
        check_made(s, &o, &written, s->m->size);
    return status;
}

static void report(void *opaque, const fq_finding *finding, uint64_t times)
{
    (void)finding;
    *(uint64_t *)opaque += times;
}

/* A check of what is no image: the L1 table alone counts. */
static fq_status op_check(setting *s)
{
    uint64_t findings = 0;
    fq_source *source = fq_source_fd(s->fd, true);
    const fq_check_options options = {.geometry = {.version = 3, .cluster_bits = BITS, .codec = s->m->codec},
                                      .refcount_order = 4,
                                      .refcount_table_entries = 1,
                                      .refcount_table_off = 2 * CLUSTER,
                                      .report = report,
                                      .opaque = &findings};
    const fq_l1_range range = {0, 1, 0, 1, 0};
    fq_check *check = NULL;
    fq_status status = source ? fq_check_open(source, &options, NULL, &check, &s->error) : FQ_ERR_NOMEM;

    if (status == FQ_OK)
        status = fq_check_use(check, FQ_ROLE_L1, 0, 8, 1, &s->error);
    if (status == FQ_OK)
        status = fq_check_l1(check, &range, NULL, &s->error);
    if (status == FQ_OK)
        status = fq_check_finish(check, NULL, &s->error);
    CHECK(status != FQ_OK || (findings > 0 && fq_check_result(check)->compressed_clusters == 20));
    fq_check_close(check);
    fq_source_free(source);
    return status;
}

/* ---- one fault after the other */

static void give_back_scratches(void)
{
    kind = NO_MEMORY_FROM_THEN_ON;
    atomic_store(&calls, 0);
    atomic_store(&nth, 1);
    atomic_store(&armed, true);
    for (fq_scratch *s; (s = fq_scratch_get());) {
        fq_inflater_free(s->inflater);
        free(s->in);
        free(s->out);
        free(s->gather);
        free(s->crypt);
        free(s->remote);
        free(s);
    }
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

static unsigned long injected[FAULTS];

static void strike_everywhere(fq_status (*op)(setting *s), setting *s, fault f)
{
    bool reached = true;
    int step;

    for (int n = 1; reached; n += step) {
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
            fprintf(stderr, "fault %d, call %d of %d, %u threads: %s, errno %d\n", (int)f, n, atomic_load(&calls), s->threads,
                    fq_status_sentence(status), s->error.sys_errno);
            exit(1);
        }
        give_back_scratches();
        if (atomic_load(&live) != before) {
            fprintf(stderr, "fault %d, call %d: %d allocations are left\n", (int)f, n, atomic_load(&live) - before);
            exit(1);
        }
        step = n < 150 ? STEP : n / 20; /* small clusters are many writes */
    }
}

static void test_operations(void)
{
    static fq_status (*const reads[])(setting *s) = {op_descriptor, op_chain, op_callback, op_remote, op_check};
    static fq_status (*const writes[])(setting *s) = {op_export_sparse, op_export_all, op_write, op_write_over, op_write_stream};
    static const setting ways[] = {{.encoder = &fq_encoder_libz, .cluster_bits = 16},
                                   {.encoder = &fq_encoder_zstd, .cluster_bits = 12, .tables_nbytes = 1},
#ifdef FQ_HAVE_ISAL
                                   {.encoder = &fq_encoder_isal, .cluster_bits = 16},
#endif
                                   {.encoder = NULL, .cluster_bits = 9, .tables_nbytes = 1}};

    for (unsigned threads = 1; threads <= 3; threads += 2)
        for (int codec = 0; codec < FQ_CODEC_COUNT; codec++) {
            image m = make_image((fq_codec)codec);
            const int fd = temporary_file(m.file, m.nbytes), out = temporary_file(m.file, 1);

            m.size = SIZE;
            for (fault f = 0; f < FAULTS; f++) {
                setting s = {.m = &m, .fd = fd, .out = out, .threads = threads, .cluster_bits = 16};

                if (f == NO_THREAD) /* they are there by now */
                    continue;
                for (size_t i = 0;
                     i < sizeof(reads) / sizeof(*reads) && f < (codec == FQ_CODEC_DEFLATE_LIBZ ? NO_THREAD : WRITE_EIO); i++)
                    strike_everywhere(reads[i], &s, f);
                for (size_t k = 0; k < sizeof(ways) / sizeof(*ways) && codec == FQ_CODEC_ZSTD; k++) {
                    s.encoder = ways[k].encoder;
                    s.cluster_bits = ways[k].cluster_bits;
                    s.tables_nbytes = ways[k].tables_nbytes;
                    for (size_t i = k == 0 ? 0 : 2; i < sizeof(writes) / sizeof(*writes); i++)
                        strike_everywhere(writes[i], &s, f);
                }
            }
            close(fd);
            close(out);
            free_image(&m);
        }
}

/* None of the pool's threads can be started; then one. To be done first, as those that are started stay. */
static void test_threads_that_do_not_start(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes), out = temporary_file(m.file, 1);
    fq_status (*const ops[])(setting *s) = {op_export_sparse, op_export_all, op_write, op_write_over};

    m.size = SIZE;
    for (int n = 1; n <= 2; n++)
        for (size_t i = 0; i < sizeof(ops) / sizeof(*ops); i++) {
            setting s = {.m = &m, .fd = fd, .out = out, .threads = 4, .encoder = &fq_encoder_libz, .cluster_bits = 16};

            kind = NO_THREAD;
            atomic_store(&calls, 0);
            atomic_store(&nth, n);
            atomic_store(&armed, true);
            CHECK(ops[i](&s) == FQ_OK);
            atomic_store(&armed, false);
            CHECK(n > 1 || atomic_load(&calls) > 0);
            injected[NO_THREAD] += (unsigned long)atomic_load(&calls);
        }
    close(fd);
    close(out);
    free_image(&m);
}

/* ---- callbacks that do not keep to what they are asked */

typedef struct rogue {
    memory at;
    int answer; /* what the nth call answers: more than was asked for, -1, or 0 */
    int nth;
    atomic_int calls;
} rogue;

enum { TOO_MUCH = 1, FAILS, ENDS, ANSWERS };

static ptrdiff_t read_rogue(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    rogue *r = opaque;

    if (atomic_load(&armed) && atomic_fetch_add(&r->calls, 1) + 1 == r->nth)
        return r->answer == TOO_MUCH ? (ptrdiff_t)nbytes + 1 : r->answer == FAILS ? -1 : 0;
    return read_memory(&r->at, user, buf, nbytes > 3000 ? nbytes / 2 : nbytes, host_off); /* short, all the time */
}

static int read_rogue_ranges(void *opaque, void *user, fq_range *ranges, size_t count)
{
    rogue *r = opaque;
    const bool strikes_now = atomic_load(&armed) && atomic_fetch_add(&r->calls, 1) + 1 == r->nth;
    const int ret = read_memory_ranges(&r->at, user, ranges, count);

    if (strikes_now && r->answer == FAILS)
        return -1;
    if (strikes_now)
        ranges[count - 1].got = r->answer == TOO_MUCH ? ranges[count - 1].nbytes + 1 : 0;
    return ret;
}

static void test_rogues(unsigned threads)
{
    image m = make_image(FQ_CODEC_DEFLATE);

    m.size = SIZE;
    kind = FAULTS; /* none of the others */
    for (int remote = 0; remote < 2; remote++)
        for (int answer = TOO_MUCH; answer < ANSWERS; answer++)
            for (int n = 1, reached = 1; reached; n++) {
                rogue r = {.at = {.m = &m}, .answer = answer, .nth = n};
                const setting s = {.m = &m, .threads = threads};
                fq_source *source =
                    remote ? fq_source_remote(read_rogue_ranges, &r, m.nbytes) : fq_source_callback(read_rogue, &r, m.nbytes);
                fq_error error;
                fq_status status;

                atomic_store(&armed, true);
                status = read_all(&s, source, &error);
                reached = atomic_load(&r.calls) >= n;
                CHECK(status == FQ_OK || is_right(READ_NOTHING, status, &error) || status == FQ_ERR_SOURCE);
                CHECK(answer == ENDS || status == FQ_OK || status == FQ_ERR_SOURCE);
                CHECK(reached || status == FQ_OK);
                fq_source_free(source);
            }
    free_image(&m);
}

/* A descriptor that can neither be waited for nor read: not waited for. */
static void test_stream_that_is_none(void)
{
    const setting s = {
        .out = temporary_file((const uint8_t *)"x", 1), .threads = 2, .encoder = &fq_encoder_libz, .cluster_bits = 16};
    const fq_write_options o = options_of(&s);
    const int folder = open("/", O_RDONLY);
    struct rlimit before, none = {0};
    fq_written written;
    fq_error error;

    CHECK(fq_write(NULL, 12345, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EBADF);
    CHECK(fq_write(NULL, folder, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EISDIR);
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none.rlim_max = before.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0); /* poll fails, again and again */
    CHECK(fq_write(NULL, folder, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EINVAL);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    close(folder);
    close(s.out);
}

int main(void)
{
    test_threads_that_do_not_start();
    test_operations();
    test_rogues(1);
    test_rogues(3);
    test_stream_that_is_none();
    give_back_scratches();
    printf("faults: all tests passed; injected, by class:");
    for (fault f = 0; f < FAULTS; f++)
        printf(" %lu", injected[f]);
    printf("\n");
    return 0;
}
