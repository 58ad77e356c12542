/*
 * test_core.c - the core without Python, to be run under ASan and UBSan
 */
#include "material.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

/* The caches' blocks come from here (the linker's --wrap): all other memory there is still is. */
static atomic_bool no_memory;
void *__real_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes);
void *__wrap_aligned_alloc(size_t alignment, size_t nbytes)
{
    return atomic_load(&no_memory) ? NULL : __real_aligned_alloc(alignment, nbytes);
}

static void test_sentences(void)
{
    for (int i = 0; i < FQ_STATUS_COUNT; i++)
        CHECK(strlen(fq_status_sentence((fq_status)i)) > 5);
    CHECK(strcmp(fq_status_sentence((fq_status)12345), "an unknown status") == 0);
}

/* The codec has the verdict and the bytes of libz. */
static void check_against_libz(fq_codec codec, const uint8_t *in, size_t in_nbytes, const uint8_t *out, size_t out_nbytes,
                               fq_status found)
{
    uint8_t *control = malloc(out_nbytes);

    CHECK(codec == FQ_CODEC_ZSTD || fq_inflate(FQ_CODEC_DEFLATE_LIBZ, in, in_nbytes, control, out_nbytes) == found);
    CHECK(codec == FQ_CODEC_ZSTD || found != FQ_OK || memcmp(out, control, out_nbytes) == 0);
    free(control);
}

/* Input and output end at guard pages, for every length of the input: no codec reads or writes past its buffer. */
static void test_inflate_within_its_buffers(fq_codec codec, int memory_level)
{
    enum { OUT = 8192 };
    uint8_t *plain = malloc(OUT), *stream = malloc(2 * OUT), *out = guarded(OUT);
    size_t nbytes;

    fill(plain, OUT, 1);
    nbytes = codec == FQ_CODEC_ZSTD ? ZSTD_compress(stream, 2 * OUT, plain, OUT, 3)
                                    : deflate_raw(plain, OUT, stream, 2 * OUT, memory_level);
    for (size_t cut = 0; cut <= nbytes; cut += cut + 40 < nbytes ? 37 : 1) {
        uint8_t *in = guarded(cut + 1) + 1;
        const fq_status status = (memcpy(in, stream, cut), fq_inflate(codec, in, cut, out, OUT));

        CHECK(cut < nbytes || status == FQ_OK);
        CHECK(status != FQ_OK || memcmp(out, plain, OUT) == 0);
        check_against_libz(codec, in, cut, out, OUT, status);
        unguard(in - 1, cut + 1);
    }
    for (size_t i = 0; i < nbytes; i += 3 * EACH) {
        uint8_t *in = guarded(nbytes);

        memcpy(in, stream, nbytes);
        in[i] ^= (uint8_t)(1 << i % 8);
        check_against_libz(codec, in, nbytes, out, OUT, fq_inflate(codec, in, nbytes, out, OUT));
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
    fq_source *sources[] = {fq_source_callback(read_memory, &at, m.nbytes), fq_source_fd(fd, true),
                            fq_source_remote(read_memory_ranges, &at, m.nbytes)};
    fq_error error;

    for (int i = 0; i < 3; i++) {
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

/* All that a read needs is asked for by one call, once; also of two files, and where both ends cut a cluster. */
static void test_remote(void)
{
    image m = make_image(FQ_CODEC_DEFLATE), top = {.size = m.size, .nbytes = 2 * CLUSTER, .codec = m.codec};
    memory at = {.m = &m}, top_at = {.m = &top};
    fq_source *source = fq_source_remote(read_memory_ranges, &at, m.nbytes), *above;
    fq_reader *reader = open_image(&m, source, NULL, 1, 8 << 20), *overlay;
    uint8_t *whole = malloc(m.size);
    fq_error error;
    int reads;

    CHECK(read_at(reader, whole, m.size, 0, &error) == FQ_OK);
    reads = atomic_load(&at.reads);
    CHECK(memcmp(whole, m.contents, m.size) == 0);
    CHECK(reads == 3 && atomic_load(&at.most_ranges) > 5); /* the L1 table, the L2 table, the rest */
    CHECK(read_at(reader, whole, m.size - CLUSTER - 300, 100, &error) == FQ_OK);
    CHECK(memcmp(whole, m.contents + 100, m.size - CLUSTER - 300) == 0);
    CHECK(atomic_load(&at.reads) == reads + 1);
    fq_reader_close(reader);

    /* An image with an empty L2 table over it, but for one data cluster that is this table's own. */
    top.file = calloc(1, top.nbytes);
    CHECK(top.file);
    store_be64(top.file, UINT64_C(1) << 63 | CLUSTER);
    store_be64(top.file + CLUSTER + 8 * 7, CLUSTER);
    above = fq_source_remote(read_memory_ranges, &top_at, top.nbytes);
    reader = open_image(&m, source, NULL, 1, 8 << 20);
    overlay = open_image(&top, above, reader, 1, 8 << 20);
    atomic_store(&at.reads, 0);
    atomic_store(&top_at.reads, 0);
    CHECK(read_at(overlay, whole, m.size, 0, &error) == FQ_OK);
    CHECK(memcmp(whole, m.contents, 7 * CLUSTER) == 0 && memcmp(whole + 7 * CLUSTER, top.file + CLUSTER, CLUSTER) == 0);
    CHECK(memcmp(whole + 8 * CLUSTER, m.contents + 8 * CLUSTER, m.size - 8 * CLUSTER) == 0);
    CHECK(atomic_load(&at.reads) == 2 && atomic_load(&top_at.reads) == 2); /* of each an L2 table, and the rest */
    fq_reader_close(overlay);
    fq_reader_close(reader);
    fq_source_free(above);
    fq_source_free(source);
    free(top.file);
    free(whole);
    free_image(&m);
}

static void test_failing_source(bool remote)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    memory at = {.m = &m};
    fq_source *source =
        remote ? fq_source_remote(read_memory_ranges, &at, m.nbytes) : fq_source_callback(read_memory, &at, m.nbytes);
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

    for (int k = 0; k < 300; k += EACH) {
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

/* Depends on the order of the bytes. */
static int add_up(void *user, const uint8_t *bytes, uint64_t nbytes)
{
    uint64_t *sum = user;

    for (uint64_t i = 0; i < nbytes; i++)
        *sum = (*sum + (bytes ? bytes[i] : 0)) * UINT64_C(0x100000001b3) + 1;
    return 0;
}

static int refuse(void *user, const uint8_t *bytes, uint64_t nbytes)
{
    (void)user, (void)bytes, (void)nbytes;
    return -1;
}

static void test_digest(unsigned threads)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes), out = temporary_file((const uint8_t *)"x", 1);
    fq_source *source = fq_source_fd(fd, false);
    fq_reader *reader = open_image(&m, source, NULL, threads, 1 << 20);
    const fq_target target = {out, 4096, true, true};
    uint64_t found = 0, expected = 0, written;
    const fq_request request = {&found, NULL, add_up}, failing = {&found, NULL, refuse};
    fq_error error;

    CHECK(ftruncate(out, 0) == 0 && ftruncate(out, (off_t)m.size) == 0);
    add_up(&expected, m.contents, m.size);
    CHECK(fq_export(reader, 0, m.size, &target, &written, &request, &error) == FQ_OK);
    CHECK(found == expected);
    found = expected = 0;
    add_up(&expected, m.contents + 1000, m.size - 5000);
    CHECK(fq_export(reader, 1000, m.size - 5000, &target, &written, &request, &error) == FQ_OK);
    CHECK(found == expected);
    CHECK(fq_export(reader, 0, m.size, &target, &written, &failing, &error) == FQ_ERR_CANCELLED);
    close(out);
    fq_reader_close(reader);
    fq_source_free(source);
    close(fd);
    free_image(&m);
}

static void test_export(uint64_t grain, bool reads_zero, bool offload, unsigned threads)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes), out = temporary_file((const uint8_t *)"x", 1);
    fq_source *source = fq_source_fd(fd, false);
    fq_reader *reader = open_image(&m, source, NULL, threads, 1 << 20);
    const fq_target target = {out, grain, reads_zero, offload};
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
    const fq_target full = {open("/dev/full", O_WRONLY), 4096, true, false}, closed = {-1, 4096, true, true};
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

int main(void)
{
    test_sentences();
    for (int codec = 0; codec < FQ_CODEC_COUNT; codec++) {
        for (int memory_level = codec == FQ_CODEC_ZSTD ? 9 : 1; memory_level <= 9; memory_level += 8)
            test_inflate_within_its_buffers((fq_codec)codec, memory_level);
        test_damage((fq_codec)codec);
        test_reads((fq_codec)codec, 1, 0);
        test_reads((fq_codec)codec, 4, 4 << 20);
    }
    test_remote();
    test_failing_source(false);
    test_failing_source(true);
    test_backing_and_map();
    test_open_refuses();
    test_without_memory();
    for (int i = 0; i < 16; i++)
        test_export(i & 1 ? 4096 : 0, i & 2, i & 8, i & 4 ? 3 : 1);
    test_digest(1);
    test_digest(4);
    test_export_that_fails();
    puts("core: all tests passed");
    return 0;
}
