/*
 * test_faults_writing.c - exports and written images while memory, threads, the source and the target fail, at every place where
 * they can
 *
 * An operation opens what it needs, and returns the first status that is not FQ_OK; its bytes are right if all are.
 */
#include "faults.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>

static uint8_t file_made[4 * SIZE];

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

static void test_writing(void)
{
    static fq_status (*const operations[])(setting *s) = {op_export_sparse, op_export_all, op_write, op_write_over,
                                                          op_write_stream};
    static const setting ways[] = {{.encoder = &fq_encoder_libz, .cluster_bits = 16},
                                   {.encoder = &fq_encoder_zstd, .cluster_bits = 12, .tables_nbytes = 1},
#ifdef FQ_HAVE_ISAL
                                   {.encoder = &fq_encoder_isal, .cluster_bits = 16},
#endif
                                   {.encoder = NULL, .cluster_bits = 9, .tables_nbytes = 1}};
    image m = make_image(FQ_CODEC_ZSTD);
    const int fd = temporary_file(m.file, m.nbytes), out = temporary_file(m.file, 1);

    m.size = SIZE;
    for (unsigned threads = 1; threads <= 3; threads += 2)
        for (fault f = 0; f < FAULTS; f++)
            for (size_t k = 0; k < sizeof(ways) / sizeof(*ways) && f != NO_THREAD; k++) { /* they are there by now */
                setting s = ways[k];

                s.m = &m;
                s.fd = fd;
                s.out = out;
                s.threads = threads;
                for (size_t i = k == 0 ? 0 : 2; i < sizeof(operations) / sizeof(*operations); i++) /* exports have one way */
                    strike_everywhere(operations[i], &s, f);
            }
    close(fd);
    close(out);
    free_image(&m);
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
            if (atomic_load(&calls) >= n)
                injected[NO_THREAD] += (unsigned long)(atomic_load(&calls) - n + 1);
        }
    close(fd);
    close(out);
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
    struct pollfd wanted = {.fd = folder, .events = POLLIN};
    fq_written written;
    fq_error error;

    CHECK(fq_write(NULL, 12345, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EBADF);
    CHECK(fq_write(NULL, folder, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EISDIR);
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none.rlim_max = before.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    if (poll(&wanted, 1, 0) < 0) /* again and again; but not under valgrind, which keeps the limit to itself */
        CHECK(fq_write(NULL, folder, NULL, &o, &written, NULL, &error) == FQ_ERR_READ && error.sys_errno == EINVAL);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    close(folder);
    close(s.out);
}

int main(void)
{
    test_threads_that_do_not_start();
    test_writing();
    test_stream_that_is_none();
    give_back_scratches();
    tell_injected("faults of writing");
    return 0;
}
