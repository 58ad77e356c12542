/*
 * write.c - a disk, written as an image and read back: its bytes, tables that a check finds nothing wrong with, and the same file
 * from however many threads
 *
 * The input is options, and the disk in pieces: what a piece holds, how long it is, and a byte.
 */
#include "fuzz.h"

enum { DISK_NBYTES_MAX = 3 << 19, LONG_NBYTES = 4096 }; /* longer than what a thread claims at a time */

typedef struct disk {
    uint8_t bytes[DISK_NBYTES_MAX];
    size_t nbytes;
} disk;

static void fill(disk *d, input *in)
{
    d->nbytes = 0;
    while (in->left > 0) {
        const unsigned kind = (unsigned)take_number(in, 1), length = (unsigned)take_number(in, 1);
        const size_t wanted = kind >= 0xe0 ? (size_t)length * LONG_NBYTES : (size_t)length << (kind >> 5);
        const size_t room = DISK_NBYTES_MAX - d->nbytes, n = wanted < room ? wanted : room;
        uint32_t value = (uint32_t)take_number(in, 1);
        uint8_t *to = d->bytes + d->nbytes;

        if ((kind & 3) < 2) {
            memset(to, kind & 1 ? (int)value : 0, n);
        } else {
            for (size_t i = 0; i < n; i++) {
                value = value * 1103515245 + 12345;
                to[i] = kind & 1 ? (uint8_t)(value >> 16) : (uint8_t)take_number(in, 1);
            }
        }
        d->nbytes += n;
    }
}

static void complain(void *opaque, const fq_finding *found, uint64_t times)
{
    (void)opaque;
    fprintf(stderr, "%s, %llu times, at %llx\n", fq_finding_sentence(found->kind), (unsigned long long)times,
            (unsigned long long)found->host_off);
}

static void check_tables(fq_source *source, const fq_write_options *o, const fq_written *w)
{
    const uint64_t cluster_size = fq_cluster_size(&o->geometry);
    const fq_check_options options = {.geometry = o->geometry,
                                      .refcount_order = o->refcount_order,
                                      .refcount_table_entries = (uint32_t)(w->refcount_table_clusters * cluster_size / 8),
                                      .refcount_table_off = w->refcount_table_off,
                                      .report = complain};
    const fq_l1_range l1 = {w->l1_off, w->l1_entries, 0, 1, 0};
    const fq_check_counts *found;
    fq_error error;
    fq_check *c;

    CHECK(fq_check_open(source, &options, NULL, &c, &error) == FQ_OK);
    CHECK(fq_check_use(c, FQ_ROLE_HEADER, 0, cluster_size, 1, &error) == FQ_OK);
    CHECK(fq_check_use(c, FQ_ROLE_REFCOUNT_TABLE, w->refcount_table_off, w->refcount_table_clusters * cluster_size, 1, &error) ==
          FQ_OK);
    CHECK(fq_check_use(c, FQ_ROLE_L1, w->l1_off, (uint64_t)w->l1_entries * 8, 1, &error) == FQ_OK);
    CHECK(fq_check_l1(c, &l1, NULL, &error) == FQ_OK && fq_check_finish(c, NULL, &error) == FQ_OK);
    found = fq_check_result(c);
    CHECK(found->corruptions + found->leaks + found->check_errors + found->overlaps == 0);
    CHECK(found->compressed_clusters == w->compressed && found->image_end_off == w->nbytes);
    fq_check_close(c);
}

static void read_back(const disk *d, fq_reader *backing, int fd, const fq_write_options *o, const fq_written *w)
{
    static uint8_t found[DISK_NBYTES_MAX + 512];
    fq_source *source = fq_source_fd(fd, false);
    const fq_reader_options options = {.geometry = o->geometry,
                                       .size = w->size,
                                       .l1_off = w->l1_off,
                                       .l1_entries = w->l1_entries,
                                       .largest_cluster = (size_t)1 << o->geometry.cluster_bits,
                                       .cluster_cache_nbytes = 1 << 18,
                                       .table_cache_nbytes = 1 << 18,
                                       .threads = 1};
    fq_reader *reader;
    fq_error error;

    CHECK(source && fq_reader_open_qcow2(source, NULL, backing, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(read_at(reader, found, (size_t)w->size, 0, &error) == FQ_OK && memcmp(found, d->bytes, d->nbytes) == 0);
    for (size_t i = d->nbytes; i < w->size; i++)
        CHECK(found[i] == 0);
    fq_reader_close(reader);
    check_tables(source, o, w);
    fq_source_free(source);
}

static void write_with_holes(int fd, const disk *d)
{
    enum { PAGE = 4096 };

    CHECK(ftruncate(fd, (off_t)d->nbytes) == 0 && lseek(fd, 0, SEEK_SET) == 0);
    for (size_t at = 0, n; at < d->nbytes; at += n) {
        n = d->nbytes - at < PAGE ? d->nbytes - at : PAGE;
        if (!fq_is_zero(d->bytes + at, n))
            CHECK(pwrite(fd, d->bytes + at, n, (off_t)at) == (ssize_t)n);
    }
}

/* Where the disk comes from: a callback, a descriptor, or a stream. */
typedef enum origin { BY_CALLBACK, BY_DESCRIPTOR, BY_STREAM } origin;

static void write_disk(const disk *d, origin origin, fq_reader *backing, const fq_write_options *o, fq_written *written)
{
    static int fd = -1;
    file f = {d->bytes, d->nbytes};
    const fq_reader_options options = {.size = (d->nbytes + 511) & ~UINT64_C(511), .threads = o->threads};
    fq_source *source = NULL;
    fq_reader *reader = NULL;
    fq_error error;

    if (origin != BY_CALLBACK)
        write_with_holes(emptied(&fd), d);
    if (origin != BY_STREAM) {
        source = origin == BY_CALLBACK ? fq_source_callback(read_file, &f, d->nbytes) : fq_source_fd(fd, true);
        CHECK(source && fq_reader_open_raw(source, &options, &reader, &error) == FQ_OK);
    }
    CHECK(fq_write(reader, fd, backing, o, written, NULL, &error) == FQ_OK);
    CHECK(written->size == options.size);
    fq_reader_close(reader);
    fq_source_free(source);
}

static void compare_files(int fd, int other, size_t nbytes)
{
    static uint8_t a[1 << 16], b[1 << 16];

    for (size_t at = 0; at < nbytes; at += sizeof(a)) {
        const ssize_t n = pread(fd, a, sizeof(a), (off_t)at);

        CHECK(pread(other, b, sizeof(b), (off_t)at) == n && memcmp(a, b, n > 0 ? (size_t)n : 0) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
#ifdef FQ_HAVE_ISAL
    static const fq_encoder *const encoders[] = {NULL, &fq_encoder_libz, &fq_encoder_isal, &fq_encoder_zstd};
#else
    static const fq_encoder *const encoders[] = {NULL, &fq_encoder_libz, &fq_encoder_libz, &fq_encoder_zstd};
#endif
    enum { LEVELS_MAX = 9 }; /* above them, zstd is slow */
    static int fds[2] = {-1, -1};
    static disk d, base;
    input in = {data, nbytes};
    const fq_encoder *encoder = encoders[take_number(&in, 1) % 4];
    const unsigned cluster_bits = 9 + (unsigned)take_number(&in, 1) % 9;
    const unsigned flags = (unsigned)take_number(&in, 1), more = (unsigned)take_number(&in, 1);
    const int level_max = encoder && encoder->level_max < LEVELS_MAX ? encoder->level_max : LEVELS_MAX;
    const int above = (int)take_number(&in, 1),
              level = encoder ? encoder->level_min + above % (level_max - encoder->level_min + 1) : 0;
    const bool extended = flags & 1 && cluster_bits >= 14, is_v2 = flags & 2 && !extended;
    fq_write_options o = {
        .geometry = {is_v2 ? 2 : 3, cluster_bits, extended, false, encoder == &fq_encoder_zstd ? FQ_CODEC_ZSTD : FQ_CODEC_DEFLATE},
        .refcount_order = is_v2 ? 4 : more % 7,
        .encoder = encoder,
        .level = level,
        .grain = flags & 4 ? 0 : UINT64_C(512) << (more & 15),
        .tables_nbytes = flags & 8 ? 1 : 0};
    file f = {base.bytes, 0};
    fq_source *source = NULL;
    fq_reader *backing = NULL;
    fq_written written[2];
    fq_error error;

    fill(&d, &in);
    if (flags & 16) { /* a backing file that has the first half of the disk, but for some bytes */
        const fq_reader_options options = {.size = (d.nbytes / 2 + 511) & ~UINT64_C(511), .threads = 1};

        f.nbytes = base.nbytes = d.nbytes / 2;
        memcpy(base.bytes, d.bytes, base.nbytes);
        for (size_t at = more; at < base.nbytes; at += 5000)
            base.bytes[at] ^= 1;
        source = fq_source_callback(read_file, &f, f.nbytes);
        CHECK(source && fq_reader_open_raw(source, &options, &backing, &error) == FQ_OK);
    }
    for (int i = 0; i < 2; i++) {
        o.fd = emptied(&fds[i]);
        o.threads = i ? 1 + (more >> 4 & 3) : 1;
        write_disk(&d, i ? (origin)(flags >> 5 & 3) % 3 : BY_CALLBACK, backing, &o, &written[i]);
    }
    read_back(&d, backing, fds[0], &o, &written[0]);
    CHECK(written[0].nbytes == written[1].nbytes && written[0].l1_off == written[1].l1_off);
    compare_files(fds[0], fds[1], (size_t)written[0].nbytes);
    fq_reader_close(backing);
    fq_source_free(source);
    return 0;
}
