/*
 * test_core.c - the core without Python, to be run under ASan, UBSan and TSan
 *
 * Images are made in memory and read through callbacks and descriptors. Buffers end at a page that cannot be touched (guarded()),
 * so that one byte too many ends the program, also where a sanitizer does not look, as inside of libdeflate.
 */
#include "internal.h"
#include "layout.h"
#include "testing.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

enum { BITS = 16, CLUSTER = 1 << BITS, CLUSTERS = 48, TABLES = 3 * CLUSTER };

/* ---- material */

/* nbytes that end where the process's memory does. */
static uint8_t *guarded(size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (nbytes + page - 1) / page;
    uint8_t *at = mmap(NULL, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(at != MAP_FAILED);
    CHECK(mprotect(at + pages * page, page, PROT_NONE) == 0);
    return at + pages * page - nbytes;
}

static void unguard(uint8_t *at, size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (nbytes + page - 1) / page;

    munmap(at + nbytes - pages * page, (pages + 1) * page);
}

static void fill(uint8_t *to, size_t nbytes, uint32_t seed)
{
    for (size_t i = 0; i < nbytes; i++) {
        seed = seed * 1103515245 + 12345;
        to[i] = (uint8_t)(seed >> 16 & 7) + 'a'; /* three bits of news a byte */
    }
}

static size_t deflate_raw(const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room)
{
    z_stream z = {.next_in = (Bytef *)in, .avail_in = (uInt)in_nbytes, .next_out = out, .avail_out = (uInt)room};

    CHECK(deflateInit2(&z, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) == Z_OK);
    CHECK(deflate(&z, Z_FINISH) == Z_STREAM_END);
    deflateEnd(&z);
    return z.total_out;
}

static void store_be64(uint8_t *to, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        to[i] = (uint8_t)(value >> (56 - 8 * i));
}

typedef struct image {
    uint8_t *file, *contents;
    size_t nbytes, size;
    fq_codec codec;
} image;

/* The L1 table is at 0, the L2 table at CLUSTER; clusters take turns: compressed (two), data, zero, nothing. */
static image make_image(fq_codec codec)
{
    image m = {.size = (size_t)CLUSTERS * CLUSTER, .codec = codec};
    size_t at = TABLES;

    m.file = calloc(1, TABLES + 2 * m.size);
    m.contents = calloc(1, m.size);
    CHECK(m.file && m.contents);
    store_be64(m.file, UINT64_C(1) << 63 | CLUSTER);
    for (unsigned i = 0; i < CLUSTERS; i++) {
        uint8_t *cluster = m.contents + (size_t)i * CLUSTER, *entry = m.file + CLUSTER + 8 * i;

        if (i % 5 <= 1) {
            size_t n;

            fill(cluster, CLUSTER, i);
            n = codec == FQ_CODEC_ZSTD ? ZSTD_compress(m.file + at, CLUSTER, cluster, CLUSTER, 3)
                                       : deflate_raw(cluster, CLUSTER, m.file + at, CLUSTER);
            store_be64(entry, FQ_L2_COMPRESSED | ((at % 512 + n + 511) / 512 - 1) << (62 - (BITS - 8)) | at);
            at += n;
        } else if (i % 5 == 2) {
            at = (at + CLUSTER - 1) / CLUSTER * CLUSTER;
            fill(cluster, CLUSTER, i);
            memcpy(m.file + at, cluster, CLUSTER);
            store_be64(entry, at);
            at += CLUSTER;
        } else if (i % 5 == 3) {
            store_be64(entry, FQ_L2_ZERO);
        }
    }
    m.nbytes = at;
    return m;
}

static void free_image(image *m)
{
    free(m->file);
    free(m->contents);
}

typedef struct memory {
    const image *m;
    atomic_int fail; /* the reads from now on fail */
    atomic_int reads;
} memory;

static ptrdiff_t read_memory(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    memory *at = opaque;

    (void)user;
    atomic_fetch_add(&at->reads, 1);
    if (atomic_load(&at->fail))
        return -1;
    if (host_off >= at->m->nbytes)
        return 0;
    if (nbytes > at->m->nbytes - host_off)
        nbytes = at->m->nbytes - host_off;
    memcpy(buf, at->m->file + host_off, nbytes);
    return (ptrdiff_t)nbytes;
}

static fq_reader *open_image(const image *m, fq_source *source, fq_reader *backing, unsigned threads, size_t cache)
{
    const fq_reader_options options = {
        .geometry = {.version = 3, .cluster_bits = BITS, .codec = m->codec},
        .size = m->size,
        .l1_off = 0,
        .l1_entries = 1,
        .largest_cluster = CLUSTER,
        .cluster_cache_nbytes = cache,
        .table_cache_nbytes = 1 << 20,
        .threads = threads,
    };
    fq_reader *reader;
    fq_error error;

    CHECK(fq_reader_open_qcow2(source, NULL, backing, NULL, &options, NULL, &reader, &error) == FQ_OK);
    return reader;
}

static fq_status read_at(fq_reader *reader, uint8_t *to, size_t nbytes, uint64_t off, fq_error *error)
{
    const fq_iovec iov = {to, nbytes, 0};

    return fq_reader_preadv(reader, &iov, 1, off, NULL, error);
}

static int temporary_file(const uint8_t *bytes, size_t nbytes)
{
    char name[] = "/tmp/fastqcow-test-XXXXXX";
    const int fd = mkstemp(name);

    CHECK(fd >= 0);
    unlink(name);
    CHECK(pwrite(fd, bytes, nbytes, 0) == (ssize_t)nbytes);
    return fd;
}

/* The caches' blocks come from here (the linker's --wrap): all other memory there is still is. */
static atomic_bool no_memory;
void *__real_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes)
{
    return atomic_load(&no_memory) ? NULL : __real_aligned_alloc(alignment, nbytes);
}

/* ---- tests */

static void test_sentences(void)
{
    for (int i = 0; i < FQ_STATUS_COUNT; i++)
        CHECK(strlen(fq_status_sentence((fq_status)i)) > 5);
    CHECK(strcmp(fq_status_sentence((fq_status)12345), "an unknown status") == 0);
}

/* Input and output end at guard pages, for every length of the input: no codec reads or writes past its buffer. */
static void test_inflate_within_its_buffers(fq_codec codec)
{
    enum { OUT = 8192 };
    uint8_t *plain = malloc(OUT), *stream = malloc(2 * OUT), *out = guarded(OUT);
    size_t nbytes;

    fill(plain, OUT, 1);
    nbytes = codec == FQ_CODEC_ZSTD ? ZSTD_compress(stream, 2 * OUT, plain, OUT, 3) : deflate_raw(plain, OUT, stream, 2 * OUT);
    for (size_t cut = 0; cut <= nbytes; cut += cut + 40 < nbytes ? 37 : 1) {
        uint8_t *in = guarded(cut + 1) + 1;
        const fq_status status = (memcpy(in, stream, cut), fq_inflate(codec, in, cut, out, OUT));

        CHECK(cut < nbytes || status == FQ_OK);
        CHECK(status != FQ_OK || memcmp(out, plain, OUT) == 0);
        unguard(in - 1, cut + 1);
    }
    for (size_t i = 0; i < nbytes; i += 3) {
        uint8_t *in = guarded(nbytes);

        memcpy(in, stream, nbytes);
        in[i] ^= (uint8_t)(1 << i % 8);
        fq_inflate(codec, in, nbytes, out, OUT);
        unguard(in, nbytes);
    }
    CHECK(fq_inflate(codec, stream, nbytes, out, OUT) == FQ_OK); /* the state is good after all that */
    CHECK(fq_inflate(codec, stream, nbytes, out, OUT - 1) == (codec == FQ_CODEC_ZSTD ? FQ_ERR_INFLATED_LONG : FQ_OK));
    CHECK(fq_inflate((fq_codec)99, stream, nbytes, out, OUT) == FQ_ERR_ARGUMENT);
    unguard(out, OUT);
    free(plain);
    free(stream);
}

static void test_reads(fq_codec codec, unsigned threads, size_t cache)
{
    image m = make_image(codec);
    memory at = {.m = &m};
    const int fd = temporary_file(m.file, m.nbytes);
    fq_source *sources[] = {fq_source_callback(read_memory, &at, m.nbytes), fq_source_fd(fd, true)};
    fq_error error;

    for (int i = 0; i < 2; i++) {
        fq_reader *reader = open_image(&m, sources[i], NULL, threads, cache);
        uint8_t *whole = guarded(m.size);
        uint32_t seed = 5;

        CHECK(read_at(reader, whole, m.size, 0, &error) == FQ_OK);
        CHECK(memcmp(whole, m.contents, m.size) == 0);
        unguard(whole, m.size);
        for (int k = 0; k < 60; k++) {
            const size_t off = (seed = seed * 1103515245 + 12345) % m.size, n = (seed >> 3) % 200000 % (m.size - off) + 1;
            uint8_t *part = guarded(n);
            fq_iovec iov[4] = {{part, n / 3, 0}, {NULL, 0, n / 3}, {part + n / 3, n / 7, n / 3}};

            iov[3] = (fq_iovec){part + n / 3 + n / 7, n - n / 3 - n / 7, n / 3 + n / 7};
            CHECK(fq_reader_preadv(reader, iov, 4, off, NULL, &error) == FQ_OK);
            CHECK(memcmp(part, m.contents + off, n) == 0);
            unguard(part, n);
        }
        CHECK(read_at(reader, m.file, 1, m.size, &error) == FQ_ERR_ARGUMENT);
        fq_reader_close(reader);
        fq_source_free(sources[i]);
    }
    close(fd);
    free_image(&m);
}

static void test_failing_source(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
    fq_reader *reader = open_image(&m, source, NULL, 4, 1 << 20);
    uint8_t *whole = malloc(m.size);
    fq_error error;

    atomic_store(&at.fail, 1);
    CHECK(read_at(reader, whole, m.size, 0, &error) == FQ_ERR_SOURCE);
    CHECK(error.guest_off == 0 && error.host_off == CLUSTER);
    atomic_store(&at.fail, 0);
    CHECK(read_at(reader, whole, 10, 5, &error) == FQ_OK);
    atomic_store(&at.fail, 1);
    CHECK(read_at(reader, whole, 10, CLUSTER + 5, &error) == FQ_ERR_SOURCE);
    CHECK(error.guest_off == CLUSTER + 5);
    CHECK(read_at(reader, whole, 10, 7, &error) == FQ_OK); /* cached */
    atomic_store(&at.fail, 0);
    CHECK(read_at(reader, whole, m.size, 0, &error) == FQ_OK);
    CHECK(memcmp(whole, m.contents, m.size) == 0);
    fq_reader_close(reader);
    fq_source_free(source);
    free(whole);
    free_image(&m);
}

/* Whatever a byte of the tables or of the streams becomes: an error or bytes, nothing else. */
static void test_damage(fq_codec codec)
{
    image m = make_image(codec);
    memory at = {.m = &m};
    uint8_t *whole = guarded(m.size);
    uint32_t seed = 9;

    for (int k = 0; k < 300; k++) {
        const size_t place = (seed = seed * 1103515245 + 12345) >> 8;
        const size_t off = k % 3 == 0   ? place % 8
                           : k % 3 == 1 ? CLUSTER + place % (8 * CLUSTERS)
                                        : TABLES + place % (m.nbytes - TABLES);
        const uint8_t before = m.file[off];
        fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
        fq_extent extents[16];
        fq_reader *reader;
        fq_error error;
        size_t count;

        m.file[off] = (uint8_t)(seed >> 24);
        reader = open_image(&m, source, NULL, 2, 1 << 20);
        read_at(reader, whole, m.size, 0, &error);
        read_at(reader, whole + m.size - 3000, 3000, CLUSTER - 1500, &error);
        fq_reader_map(reader, 0, m.size, extents, 16, &count, NULL, &error);
        fq_reader_close(reader);
        fq_source_free(source);
        m.file[off] = before;
    }
    unguard(whole, m.size);
    free_image(&m);
}

typedef struct hammer {
    fq_reader *reader;
    const image *m;
    uint32_t seed;
} hammer;

static void *hammer_main(void *arg)
{
    hammer *h = arg;
    uint8_t *part = malloc(300000);
    fq_error error;

    for (int k = 0; k < 150; k++) {
        const size_t off = (h->seed = h->seed * 1103515245 + 12345) % h->m->size, room = h->m->size - off;
        size_t n = k % 4 ? 1 + (h->seed >> 5) % 5000 : 300000;

        n = n < room ? n : room;
        CHECK(read_at(h->reader, part, n, off, &error) == FQ_OK);
        CHECK(memcmp(part, h->m->contents + off, n) == 0);
    }
    free(part);
    return NULL;
}

/* Many threads on one reader, whose cache has room for three clusters, while pool workers help each of them. */
static void test_threads(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes);
    fq_source *source = fq_source_fd(fd, false);
    fq_reader *reader = open_image(&m, source, NULL, 3, 3 * CLUSTER);
    pthread_t threads[8];
    hammer hammers[8];
    fq_stats stats;

    for (unsigned i = 0; i < 8; i++) {
        hammers[i] = (hammer){reader, &m, i + 1};
        CHECK(pthread_create(&threads[i], NULL, hammer_main, &hammers[i]) == 0);
    }
    for (unsigned i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    fq_reader_stats(reader, &stats);
    CHECK(stats.clusters_inflated > 0 && stats.cache_hits > 0 && stats.bytes_returned > m.size);
    fq_reader_close(reader);
    fq_source_free(source);
    close(fd);
    free_image(&m);
}

/* One thread reads from start to end in small pieces, so that workers inflate ahead of it. */
static void *stroll_main(void *arg)
{
    hammer *h = arg;
    const size_t step = 1000 * h->seed;
    uint8_t *part = malloc(step);
    fq_error error;

    for (size_t off = 0; off < h->m->size; off += step) {
        const size_t n = h->m->size - off < step ? h->m->size - off : step;

        CHECK(read_at(h->reader, part, n, off, &error) == FQ_OK);
        CHECK(memcmp(part, h->m->contents + off, n) == 0);
    }
    free(part);
    return NULL;
}

/* Several streams at once; and readers that are closed while workers are still inflating for them. */
static void test_read_ahead(size_t cache)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes);
    fq_source *source = fq_source_fd(fd, false);

    for (int i = 0; i < 10; i++) {
        fq_reader *reader = open_image(&m, source, NULL, 3, cache);
        pthread_t threads[3];
        hammer hammers[3];

        for (unsigned k = 0; k < 3; k++) {
            hammers[k] = (hammer){reader, &m, k * k * 20 + 1};
            CHECK(pthread_create(&threads[k], NULL, stroll_main, &hammers[k]) == 0);
        }
        for (unsigned k = 0; k < 3; k++)
            pthread_join(threads[k], NULL);
        fq_reader_close(reader);
    }
    for (size_t parts = 1; parts <= 30; parts++) {
        fq_reader *reader = open_image(&m, source, NULL, 3, cache);
        uint8_t piece[4096];
        fq_error error;

        for (size_t off = 0; off < parts * sizeof(piece) * 4; off += sizeof(piece))
            CHECK(read_at(reader, piece, sizeof(piece), off, &error) == FQ_OK);
        fq_reader_close(reader);
    }
    fq_source_free(source);
    close(fd);
    free_image(&m);
}

static int stop_at_once(void *user, uint64_t done)
{
    (void)done;
    ++*(int *)user;
    return 1;
}

static void test_export(uint64_t grain, bool reads_zero, unsigned threads)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes), out = temporary_file((const uint8_t *)"x", 1);
    fq_source *source = fq_source_fd(fd, false);
    fq_reader *reader = open_image(&m, source, NULL, threads, 1 << 20);
    const fq_target target = {out, grain, reads_zero};
    uint8_t *found = malloc(m.size);
    uint64_t written;
    fq_error error;

    CHECK(ftruncate(out, reads_zero ? 0 : (off_t)m.size) == 0);
    if (!reads_zero) {
        memset(found, 0xaa, m.size);
        CHECK(pwrite(out, found, m.size, 0) == (ssize_t)m.size);
    }
    CHECK(ftruncate(out, (off_t)m.size) == 0);
    CHECK(fq_export(reader, 0, m.size, &target, &written, NULL, &error) == FQ_OK);
    CHECK(written <= m.size && (grain || reads_zero || written == m.size));
    CHECK(pread(out, found, m.size, 0) == (ssize_t)m.size);
    CHECK(memcmp(found, m.contents, m.size) == 0);
    free(found);
    close(out);
    fq_reader_close(reader);
    fq_source_free(source);
    close(fd);
    free_image(&m);
}

static void test_export_that_fails(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
    fq_reader *reader = open_image(&m, source, NULL, 2, 1 << 20);
    const fq_target full = {open("/dev/full", O_WRONLY), 4096, true}, closed = {-1, 4096, true};
    uint64_t written;
    fq_error error;

    if (full.fd >= 0) {
        CHECK(fq_export(reader, 0, m.size, &full, &written, NULL, &error) == FQ_ERR_WRITE);
        CHECK(error.sys_errno == ENOSPC);
        close(full.fd);
    }
    CHECK(fq_export(reader, 0, m.size, &closed, &written, NULL, &error) == FQ_ERR_WRITE && error.sys_errno == EBADF);
    CHECK(fq_export(reader, 1, m.size, &closed, &written, NULL, &error) == FQ_ERR_ARGUMENT);
    fq_reader_close(reader);
    fq_source_free(source);
    free_image(&m);
}

/* A source slow enough for the poll to come, which stops the read. */
static ptrdiff_t read_slowly(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    usleep(20000);
    return read_memory(opaque, user, buf, nbytes, host_off);
}

static void test_cancel(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_slowly, &at, m.nbytes);
    fq_reader *reader = open_image(&m, source, NULL, 1, 1 << 20);
    int polls = 0;
    const fq_request request = {&polls, stop_at_once};
    uint8_t *whole = malloc(m.size);
    const fq_iovec iov = {whole, m.size, 0};
    fq_error error;

    CHECK(fq_reader_preadv(reader, &iov, 1, 0, &request, &error) == FQ_ERR_CANCELLED);
    CHECK(polls == 1);
    fq_reader_close(reader);
    fq_source_free(source);
    free(whole);
    free_image(&m);
}

/* A map of compressed clusters, each of which is looked at, takes long enough for the poll to come. */
static void test_cancelled_map(void)
{
    enum { L1_ENTRIES = 65, ENTRIES = 512 / 8, L2 = 1024 };
    uint8_t file[L2 + 512];
    const image m = {.file = file, .nbytes = sizeof(file), .size = (size_t)L1_ENTRIES * ENTRIES * 512};
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
    const fq_reader_options options = {
        .geometry = {.version = 3, .cluster_bits = 9, .codec = FQ_CODEC_DEFLATE},
        .size = m.size,
        .l1_entries = L1_ENTRIES,
        .largest_cluster = 512,
        .table_cache_nbytes = 1 << 20,
        .threads = 1,
    };
    int polls = 0;
    const fq_request request = {&polls, stop_at_once}, without_poll = {&polls, NULL};
    fq_reader *reader;
    fq_extent extent;
    fq_error error;
    size_t count;

    for (unsigned i = 0; i < L1_ENTRIES; i++)
        store_be64(file + 8 * i, L2);
    for (unsigned i = 0; i < ENTRIES; i++)
        store_be64(file + L2 + 8 * i, FQ_L2_COMPRESSED | 512);
    CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(fq_reader_map(reader, 0, m.size, &extent, 1, &count, &request, &error) == FQ_ERR_CANCELLED);
    CHECK(polls == 1);
    CHECK(fq_reader_map(reader, 0, m.size, &extent, 1, &count, &without_poll, &error) == FQ_OK);
    CHECK(count == 1 && extent.nbytes == m.size && extent.kind == FQ_COMPRESSED);
    fq_reader_close(reader);
    fq_source_free(source);
}

/* Without memory for an L2 table, then for a cluster, it says so; and reads on once there is some. */
static void test_without_memory(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
    fq_reader *reader = open_image(&m, source, NULL, 1, 1 << 20);
    uint8_t found[10];
    fq_error error;

    atomic_store(&no_memory, true);
    CHECK(read_at(reader, found, sizeof(found), 5, &error) == FQ_ERR_NOMEM);
    CHECK(error.guest_off == 5 && error.host_off == CLUSTER && error.value == FQ_NOWHERE);
    atomic_store(&no_memory, false);
    CHECK(read_at(reader, found, sizeof(found), 2 * CLUSTER, &error) == FQ_OK);
    atomic_store(&no_memory, true);
    CHECK(read_at(reader, found, sizeof(found), 5, &error) == FQ_ERR_NOMEM);
    CHECK(error.guest_off == 5);
    atomic_store(&no_memory, false);
    CHECK(read_at(reader, found, sizeof(found), 5, &error) == FQ_OK);
    CHECK(memcmp(found, m.contents + 5, sizeof(found)) == 0);
    fq_reader_close(reader);
    fq_source_free(source);
    free_image(&m);
}

/* The child has no workers; its reads still end, and are right. */
static void test_fork(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes);
    fq_source *source = fq_source_fd(fd, false);
    fq_reader *reader = open_image(&m, source, NULL, 4, 1 << 20);
    uint8_t *whole = malloc(m.size);
    fq_error error;
    pid_t child;
    int status;

    CHECK(read_at(reader, whole, m.size, 0, &error) == FQ_OK);
    child = fork();
    if (child == 0) {
        alarm(60);
        memset(whole, 0, m.size);
        _exit(read_at(reader, whole, m.size, 0, &error) == FQ_OK && memcmp(whole, m.contents, m.size) == 0 ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    fq_reader_close(reader);
    fq_source_free(source);
    close(fd);
    free(whole);
    free_image(&m);
}

static void test_backing_and_map(void)
{
    image m = make_image(FQ_CODEC_DEFLATE), top = make_image(FQ_CODEC_ZSTD);
    memory at = {.m = &m}, top_at = {.m = &top};
    fq_source *below = fq_source_callback(read_memory, &at, m.nbytes),
              *above = fq_source_callback(read_memory, &top_at, top.nbytes);
    fq_reader *base = open_image(&m, below, NULL, 2, 1 << 20), *reader = open_image(&top, above, base, 2, 1 << 20);
    uint8_t *whole = malloc(top.size);
    fq_extent extents[2 * CLUSTERS];
    fq_error error;
    uint64_t end = 0;
    size_t count;

    CHECK(read_at(reader, whole, top.size, 0, &error) == FQ_OK);
    for (unsigned i = 0; i < CLUSTERS; i++)
        CHECK(memcmp(whole + (size_t)i * CLUSTER, (i % 5 == 4 ? m : top).contents + (size_t)i * CLUSTER, CLUSTER) == 0);
    CHECK(fq_reader_map(reader, 0, top.size, extents, 2 * CLUSTERS, &count, NULL, &error) == FQ_OK);
    for (size_t i = 0; i < count; i++) {
        CHECK(extents[i].guest_off == end);
        end += extents[i].nbytes;
        CHECK(extents[i].depth == (extents[i].guest_off / CLUSTER % 5 == 4));
    }
    CHECK(end == top.size);
    CHECK(fq_reader_map(reader, 0, top.size + 1, extents, 1, &count, NULL, &error) == FQ_ERR_ARGUMENT);
    CHECK(fq_reader_map(reader, 2, 1, extents, 1, &count, NULL, &error) == FQ_ERR_ARGUMENT);
    fq_reader_close(reader);
    fq_reader_close(base);
    fq_source_free(above);
    fq_source_free(below);
    free(whole);
    free_image(&m);
    free_image(&top);
}

static void test_open_refuses(void)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source = fq_source_callback(read_memory, &at, m.nbytes);
    const fq_geometry bad[] = {
        {3, 8, false, false, 0}, {3, 22, false, false, 0}, {3, 13, true, false, 0}, {3, 16, false, false, (fq_codec)7}};
    fq_reader_options options = {.size = 1, .l1_entries = 1, .table_cache_nbytes = 1 << 20};
    fq_reader *reader;
    fq_error error;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        options.geometry = bad[i];
        CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_ERR_ARGUMENT);
    }
    options.geometry = (fq_geometry){3, 16, false, false, FQ_CODEC_DEFLATE};
    options.l1_off = m.nbytes - 4;
    CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_ERR_L1_EOF);
    CHECK(error.host_off == options.l1_off && error.value == m.nbytes);
    fq_source_free(source);
    free_image(&m);
}

#ifdef __SANITIZE_THREAD__
/* Without this TSan ends a forked child that starts threads, which is what test_fork is about. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "die_after_fork=0";
}
#endif

int main(void)
{
    test_sentences();
    for (int codec = 0; codec < FQ_CODEC_COUNT; codec++) {
        test_inflate_within_its_buffers((fq_codec)codec);
        test_damage((fq_codec)codec);
        test_reads((fq_codec)codec, 1, 0);
        test_reads((fq_codec)codec, 4, 4 << 20);
    }
    test_failing_source();
    test_threads();
    test_read_ahead(16 * CLUSTER);
    test_read_ahead(3 * CLUSTER);
    test_backing_and_map();
    test_open_refuses();
    test_cancel();
    test_cancelled_map();
    test_without_memory();
    test_fork();
    for (int i = 0; i < 8; i++)
        test_export(i & 1 ? 4096 : 0, i & 2, i & 4 ? 3 : 1);
    test_export_that_fails();
    puts("core: all tests passed");
    return 0;
}
