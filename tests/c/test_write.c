/*
 * test_write.c - images written from images, without Python: many threads, refcounts at their limits, tables that are relieved
 */
#include "material.h"

#include <stdio.h>
#include <stdlib.h>

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

int main(void)
{
    const size_t usual = 0, at_once = 1;

    for (uint32_t order = 0; order <= 6; order++)
        test_geometry(&fq_encoder_libz, 1, 9, order, order % 2 ? usual : at_once);
    test_geometry(&fq_encoder_libz, 6, 16, 4, usual);
    test_geometry(&fq_encoder_zstd, 3, 12, 4, at_once);
    test_geometry(&fq_encoder_zstd, 3, 21, 1, usual);
    test_geometry(NULL, 0, 12, 3, at_once);
#ifdef FQ_HAVE_ISAL
    for (int level = 0; level <= 3; level++)
        test_geometry(&fq_encoder_isal, level, 16, 4, usual);
#endif
    printf("test_write: OK\n");
    return 0;
}
