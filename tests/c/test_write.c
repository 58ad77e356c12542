/*
 * test_write.c - images written from images, without Python: many threads, refcounts at their limits, tables that are relieved
 */
#include "material.h"

#include <stdio.h>
#include <stdlib.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

static uint8_t *write_image(fq_reader *reader, int stream, const fq_write_options *with, fq_written *written)
{
    char name[] = "/tmp/fastqcow-test-XXXXXX";
    fq_write_options o = *with;
    uint8_t *file;
    fq_error error;

    o.fd = mkstemp(name);
    CHECK(o.fd >= 0);
    unlink(name);
    CHECK(fq_write(reader, stream, NULL, &o, written, NULL, &error) == FQ_OK);
    file = calloc(1, written->nbytes);
    CHECK(file && pread(o.fd, file, written->nbytes, 0) == (ssize_t)written->nbytes);
    close(o.fd);
    return file;
}

static void check_contents(const image *m, uint8_t *file, const fq_written *written, const fq_geometry *geometry)
{
    const image made = {.file = file, .nbytes = written->nbytes};
    memory at = {.m = &made};
    fq_source *source = fq_source_callback(read_memory, &at, written->nbytes);
    const fq_reader_options options = {.geometry = *geometry,
                                       .size = m->size,
                                       .l1_off = written->l1_off,
                                       .l1_entries = written->l1_entries,
                                       .largest_cluster = (size_t)1 << geometry->cluster_bits,
                                       .cluster_cache_nbytes = 1 << 20,
                                       .table_cache_nbytes = 1 << 20,
                                       .threads = 1};
    uint8_t *found = malloc(m->size);
    fq_reader *reader;
    fq_error error;

    CHECK(found && fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(read_at(reader, found, m->size, 0, &error) == FQ_OK);
    CHECK(memcmp(found, m->contents, m->size) == 0);
    fq_reader_close(reader);
    fq_source_free(source);
    free(found);
}

static void test_geometry(const fq_encoder *encoder, int level, unsigned cluster_bits, uint32_t refcount_order,
                          size_t tables_nbytes)
{
    image m = make_image(FQ_CODEC_DEFLATE);
    const int fd = temporary_file(m.file, m.nbytes);
    fq_source *source = fq_source_fd(fd, false);
    uint8_t *first = NULL;
    fq_written written, before = {0};

    for (unsigned threads = 1; threads <= 5; threads += 2) {
        const fq_write_options o = {.geometry = {.version = 3,
                                                 .cluster_bits = cluster_bits,
                                                 .codec = encoder == &fq_encoder_zstd ? FQ_CODEC_ZSTD : FQ_CODEC_DEFLATE},
                                    .refcount_order = refcount_order,
                                    .encoder = encoder,
                                    .level = level,
                                    .grain = encoder ? 4096 : 1 << 15, /* blocks of several clusters */
                                    .threads = threads,
                                    .tables_nbytes = tables_nbytes};
        fq_reader *reader = open_image(&m, source, NULL, threads, 1 << 20);
        uint8_t *file = write_image(reader, -1, &o, &written);

        check_contents(&m, file, &written, &o.geometry);
        if (first) {
            CHECK(written.nbytes == before.nbytes && memcmp(file, first, written.nbytes) == 0);
            free(file);
        } else {
            first = file;
        }
        before = written;
        fq_reader_close(reader);
    }
    free(first);
    fq_source_free(source);
    close(fd);
    free_image(&m);
}

/* Input and output end at guard pages, whatever the room is: a stream that fits, or none. */
static void test_encode_within_its_buffers(const fq_encoder *encoder, int level)
{
    void *state = encoder->open(level);
    unsigned fit = 0;

    CHECK(state);
    for (unsigned bits = 9; bits <= 21; bits += 4)
        for (size_t nbytes = (size_t)1 << bits, room = nbytes - 1; room > 0; room = room * 3 / 4) {
            uint8_t *in = guarded(nbytes), *out = guarded(room), *found = malloc(nbytes);
            size_t out_nbytes;

            CHECK(found);
            fill(in, nbytes / 2, bits);
            memcpy(in + nbytes / 2, in, nbytes / 4); /* repeats from far away, and zeroes */
            CHECK(encoder->run(state, in, nbytes, out, room, &out_nbytes) == FQ_OK && out_nbytes <= room);
            if (out_nbytes > 0 && encoder == &fq_encoder_zstd) {
                CHECK(ZSTD_decompress(found, nbytes, out, out_nbytes) == nbytes);
            } else if (out_nbytes > 0) {
                z_stream z = {.next_in = out, .avail_in = (uInt)out_nbytes, .next_out = found, .avail_out = (uInt)nbytes};

                CHECK(inflateInit2(&z, -12) == Z_OK && inflate(&z, Z_FINISH) == Z_STREAM_END);
                CHECK(z.avail_in == 0 && z.total_out == nbytes && inflateEnd(&z) == Z_OK);
            }
            CHECK(out_nbytes == 0 || memcmp(in, found, nbytes) == 0);
            fit += out_nbytes > 0;
            unguard(in, nbytes);
            unguard(out, room);
            free(found);
        }
    CHECK(fit >= 4);
    encoder->close(state);
}

/*
 * The same disk makes the same file, wherever encoders lie in memory. ISA-L hashes the stream's address, from its bit 16 on, for
 * the third byte of what it is given at once: so the string that starts there, and comes again later, is that of one state's
 * address.
 */
static void test_same_stream_from_any_state(const fq_encoder *encoder, int level)
{
    enum { STATES = 4, SHORT = 512, AT = 2, AGAIN = 100, NBYTES = 16 };
    uint8_t in[SHORT], first[SHORT], out[SHORT];
    size_t first_nbytes = 0, out_nbytes;
    void *states[STATES];

    for (unsigned i = 0; i < STATES; i++)
        CHECK((states[i] = encoder->open(level)) != NULL);
    for (unsigned of = 0; of < STATES; of++) {
        const uint32_t address = (uint32_t)((uintptr_t)states[of] >> 16);

        fill(in, SHORT, of);
        memcpy(in + AT, &address, sizeof(address));
        memcpy(in + AGAIN, in + AT, NBYTES);
        in[AGAIN - 1] = (uint8_t)~in[AT - 1];
        for (unsigned i = 0; i < STATES; i++) {
            CHECK(encoder->run(states[i], in, SHORT, out, SHORT - 1, &out_nbytes) == FQ_OK && out_nbytes > 0);
            if (i == 0)
                memcpy(first, out, first_nbytes = out_nbytes);
            CHECK(out_nbytes == first_nbytes && memcmp(out, first, first_nbytes) == 0);
        }
    }
    for (unsigned i = 0; i < STATES; i++)
        encoder->close(states[i]);
}

#if defined(FQ_HAVE_ISAL) && defined(__x86_64__)
/* The parts of the vector registers that are in use, as XGETBV tells of them; 0 where a processor does not. */
static uint32_t registers_in_use(void)
{
    uint32_t eax, ebx, ecx, edx;

    if (!__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE) ||
        !__get_cpuid_count(13, 1, &eax, &ebx, &ecx, &edx) || !(eax & 1 << 2))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(1));
    return eax;
}

/* Their upper halves (of AVX, of AVX-512) make what comes next on the thread slow while they are in use: see isal.c. */
static void test_isal_leaves_no_slow_thread(void)
{
    enum { UPPER_HALVES = 1 << 2 | 1 << 6 };
    static uint8_t in[CLUSTER], out[CLUSTER];
    const uint32_t before = registers_in_use();
    void *state = fq_encoder_isal.open(1);
    size_t out_nbytes;

    CHECK(state);
    fill(in, CLUSTER, 1);
    CHECK(fq_encoder_isal.run(state, in, CLUSTER, out, CLUSTER - 1, &out_nbytes) == FQ_OK && out_nbytes > 0);
    CHECK((registers_in_use() & ~before & UPPER_HALVES) == 0);
    fq_encoder_isal.close(state);
}
#endif

int main(void)
{
    const size_t usual = 0, at_once = 1;

#if defined(FQ_HAVE_ISAL) && defined(__x86_64__)
    test_isal_leaves_no_slow_thread(); /* first: it looks for what was not so before */
#endif
    for (uint32_t order = 0; order <= 6; order++)
        test_geometry(&fq_encoder_libz, 1, 9, order, order % 2 ? usual : at_once);
    test_geometry(&fq_encoder_libz, 6, 16, 4, usual);
    test_geometry(&fq_encoder_zstd, 3, 12, 4, at_once);
    test_geometry(&fq_encoder_zstd, 3, 21, 1, usual);
    test_geometry(NULL, 0, 12, 3, at_once);
#ifdef FQ_HAVE_ISAL
    test_geometry(&fq_encoder_isal, 1, 16, 4, usual);
    test_encode_within_its_buffers(&fq_encoder_isal, 1);
    test_same_stream_from_any_state(&fq_encoder_isal, 1);
#endif
    test_encode_within_its_buffers(&fq_encoder_libz, 6);
    test_encode_within_its_buffers(&fq_encoder_zstd, 3);
    test_same_stream_from_any_state(&fq_encoder_libz, 6);
    test_same_stream_from_any_state(&fq_encoder_zstd, 3);
    printf("test_write: OK\n");
    return 0;
}
