/*
 * image.c - an image, read in several ways, which must agree in bytes and in verdict
 *
 * One reader is plain: one thread, no cache, a callback. The other one has threads, a cache, and a source of another kind, and
 * reads in pieces and to scattered buffers. Both have the same layers below them, and the same toy of a cipher, if any.
 */
#include "image.h"

enum {
    EXTENTS_MAX = 12,
    WINDOW_NBYTES = 70000,
    WINDOW_NBYTES_MAX = 1 << 18,
    READ_NBYTES_MAX = 1 << 19, /* by one input */
};

typedef struct stack {
    fq_source *source, *data;
    fq_reader *raw, *below, *reader;
} stack;

typedef struct counted_file {
    file file;
    atomic_int left; /* reads, until one fails; negative: none does */
} counted_file;

static ptrdiff_t read_counted(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    counted_file *f = opaque;

    if (atomic_load(&f->left) >= 0 && atomic_fetch_sub(&f->left, 1) == 0) {
        atomic_store(&f->left, 0);
        return -1;
    }
    return read_file(&f->file, user, buf, nbytes, host_off);
}

static int run_cipher(void *opaque, void *user, fq_cipher cipher, uint8_t *blocks, size_t nbytes)
{
    (void)opaque, (void)user;
    for (size_t i = 0; i < nbytes; i++)
        blocks[i] ^= (uint8_t)(0x51 + cipher + i % 16);
    return 0;
}

static int fd_of(const file *f)
{
    static int fd = -1;

    CHECK(pwrite(emptied(&fd), f->bytes, f->nbytes, 0) == (ssize_t)f->nbytes);
    return fd;
}

/* What the plan's bits mean. */
static unsigned threads_of(const image *m)
{
    return 1 + (m->plan & 3);
}

static fq_source *source_of(const image *m, counted_file *f, bool plain)
{
    if (plain || (m->plan >> 2 & 3) == 0)
        return fq_source_callback(read_counted, f, f->file.nbytes);
    return (m->plan >> 2 & 3) == 1 ? fq_source_remote(read_file_ranges, &f->file, f->file.nbytes)
                                   : fq_source_fd(fd_of(&f->file), m->plan >> 2 & 1);
}

static fq_reader_options options_of(const image *m, bool plain)
{
    static const size_t cache_nbytes[] = {0, 100000, 1 << 20, 32 << 20};
    fq_reader_options o = {.geometry = m->geometry,
                           .size = m->size,
                           .l1_off = m->l1_off,
                           .l1_entries = m->l1_entries,
                           .largest_cluster = (size_t)1 << m->geometry.cluster_bits,
                           .cluster_cache_nbytes = plain ? 0 : cache_nbytes[m->plan >> 4 & 3],
                           .table_cache_nbytes = plain ? 0 : (size_t)((m->plan >> 6 & 1) << 20),
                           .threads = plain ? 1 : threads_of(m)};

    if (m->plan >> 7 & 1)
        o.crypt = (fq_crypt){
            (fq_mode)(m->plan >> 8 & 3), (fq_iv)((m->plan >> 10 & 3) % FQ_IV_COUNT), 16, m->plan >> 12 & 1, run_cipher, NULL};
    return o;
}

/* As the image, but with the L1 table where that of a snapshot is. */
static fq_reader_options options_of_snapshot(const image *m, bool plain)
{
    fq_reader_options o = options_of(m, plain);

    o.l1_off = m->snapshots_off;
    o.l1_entries = m->l1_entries < 64 ? m->l1_entries : 64;
    o.size = m->size / 2;
    return o;
}

/* False where the L1 table cannot be read. */
static bool open_stack(const image *m, counted_file *f, bool plain, stack *s)
{
    fq_reader_options o = options_of(m, plain), raw = o, snapshot = options_of_snapshot(m, plain);
    const bool has_backing = m->plan >> 13 & 1, is_qcow2 = m->plan >> 14 & 1;
    fq_error error;
    fq_status status = FQ_OK;

    *s = (stack){.source = source_of(m, f, plain)};
    CHECK(s->source);
    raw.size = f->file.nbytes;
    raw.crypt.run = NULL;
    if (has_backing) {
        CHECK(fq_reader_open_raw(s->source, &raw, &s->raw, &error) == FQ_OK);
        if (is_qcow2)
            status = fq_reader_open_qcow2(s->source, s->source, s->raw, NULL, &snapshot, NULL, &s->below, &error);
    }
    if (status == FQ_OK)
        status = fq_reader_open_qcow2(s->source, s->source, s->below ? s->below : s->raw, NULL, &o, NULL, &s->reader, &error);
    CHECK(status == FQ_OK || status == FQ_ERR_L1_EOF || status == FQ_ERR_SOURCE);
    return status == FQ_OK;
}

static void close_stack(stack *s)
{
    fq_reader_close(s->reader);
    fq_reader_close(s->below);
    fq_reader_close(s->raw);
    fq_source_free(s->source);
}

/* A reader's bytes, in a buffer of just that length; in one read, or in pieces, which stop at the first that fails. */
static fq_status read_window(fq_reader *r, uint64_t off, size_t nbytes, size_t piece, uint8_t *to, fq_error *error)
{
    for (size_t at = 0, n; at < nbytes; at += n) {
        fq_iovec iov[4];
        uint8_t *buf;
        fq_status status;

        n = nbytes - at < piece ? nbytes - at : piece;
        buf = malloc(n);
        CHECK(buf);
        iov[0] = (fq_iovec){buf, n / 3, 0};
        iov[1] = (fq_iovec){NULL, 0, n / 3};
        iov[2] = (fq_iovec){buf + n / 3, n / 5, n / 3};
        iov[3] = (fq_iovec){buf + n / 3 + n / 5, n - n / 3 - n / 5, n / 3 + n / 5};
        status = piece >= nbytes ? read_at(r, buf, n, off + at, error) : fq_reader_preadv(r, iov, 4, off + at, NULL, error);
        if (status == FQ_OK)
            memcpy(to + at, buf, n);
        free(buf);
        if (status != FQ_OK) {
            CHECK(error->status == status && status != FQ_ERR_ARGUMENT);
            CHECK(error->guest_off >= off + at && error->guest_off < ((off + at + n + 511) & ~UINT64_C(511))); /* of a sector */
            return status;
        }
    }
    return FQ_OK;
}

/* What is wrong first is told, however it is met. */
static void check_same_error(const fq_error *a, const fq_error *b)
{
    CHECK(a->status == b->status && a->guest_off == b->guest_off && a->host_off == b->host_off);
    CHECK(a->value == b->value && a->depth == b->depth && a->in_data_file == b->in_data_file);
}

/* What a digest is given: the bytes of the disk, in their order. expected: NULL where they cannot all be read. */
typedef struct digested {
    const uint8_t *expected;
    size_t nbytes, at;
    bool wrong;
} digested;

static int digest(void *user, const uint8_t *bytes, uint64_t nbytes)
{
    digested *d = user;

    if (nbytes > d->nbytes - d->at)
        d->wrong = true;
    for (size_t i = 0; d->expected && !d->wrong && i < nbytes; i++)
        d->wrong = d->expected[d->at + i] != (bytes ? bytes[i] : 0);
    d->at += d->wrong ? 0 : (size_t)nbytes;
    return 0;
}

/* at: NULL where nothing is wrong. */
static void check_export(const image *m, fq_reader *r, uint64_t off, const uint8_t *expected, size_t nbytes, const fq_error *at)
{
    static int fd = -1;
    static uint8_t found[WINDOW_NBYTES_MAX];
    const bool reads_zero = m->plan >> 16 & 1;
    const fq_target target = {emptied(&fd), (m->plan >> 17 & 3) == 0 ? 0 : UINT64_C(256) << (m->plan >> 17 & 3) * 2, reads_zero,
                              m->plan >> 19 & 1};
    digested seen = {at ? NULL : expected, nbytes, 0, false};
    const fq_request request = {&seen, NULL, m->plan >> 27 & 1 ? digest : NULL};
    uint64_t written;
    fq_error error;
    fq_status status;

    CHECK(ftruncate(fd, (off_t)(off + nbytes)) == 0);
    if (!reads_zero) {
        memset(found, 0xaa, nbytes);
        CHECK(pwrite(fd, found, nbytes, (off_t)off) == (ssize_t)nbytes);
    }
    status = fq_export(r, off, nbytes, &target, &written, &request, &error);
    CHECK((status == FQ_OK) == !at && (at || !request.digest || seen.at == nbytes));
    CHECK(!seen.wrong);
    if (at) {
        check_same_error(at, &error);
        return;
    }
    CHECK(pread(fd, found, nbytes, (off_t)off) == (ssize_t)nbytes && memcmp(found, expected, nbytes) == 0);
}

static void compare_window(const image *m, fq_reader *plain, fq_reader *other, uint64_t off, size_t nbytes)
{
    static uint8_t expected[WINDOW_NBYTES_MAX], found[WINDOW_NBYTES_MAX];
    static const size_t pieces[] = {SIZE_MAX, 1000, 4096, 33333};
    const size_t piece = pieces[m->plan >> 20 & 3];
    fq_error at, at_other;
    const fq_status status = read_window(plain, off, nbytes, SIZE_MAX, expected, &at);

    for (int times = 0; times < 2; times++) { /* the second time there is something in the cache */
        memset(found, 0xaa, nbytes);
        CHECK((read_window(other, off, nbytes, times ? 20000 : piece, found, &at_other) == FQ_OK) == (status == FQ_OK));
        if (status == FQ_OK)
            CHECK(memcmp(expected, found, nbytes) == 0);
        else
            check_same_error(&at, &at_other);
    }
    if (off + nbytes <= WINDOW_NBYTES_MAX)
        check_export(m, other, off, expected, nbytes, status == FQ_OK ? NULL : &at);
}

/* The starts of extents are where things happen. */
static void compare_extents(const image *m, fq_reader *plain, fq_reader *other, uint64_t size)
{
    fq_extent e[EXTENTS_MAX], f[EXTENTS_MAX];
    fq_error error, error_of_other;
    size_t count, count_of_other, nbytes = 0;
    const fq_status status = fq_reader_map(plain, 0, size, e, EXTENTS_MAX, &count, NULL, &error);

    CHECK(fq_reader_map(other, 0, size, f, EXTENTS_MAX, &count_of_other, NULL, &error_of_other) == status);
    if ((m->plan >> 2 & 3) < 2) /* holes are those of a file that has them */
        CHECK(count == count_of_other && memcmp(e, f, count * sizeof(*e)) == 0);
    for (size_t i = 0; i < count && nbytes < READ_NBYTES_MAX; i++) {
        const uint64_t before = e[i].guest_off < 700 ? e[i].guest_off : 700, off = e[i].guest_off - before;
        const uint64_t wanted = m->plan >> 22 & 1 ? WINDOW_NBYTES_MAX : WINDOW_NBYTES;
        const size_t n = (size_t)(size - off < wanted ? size - off : wanted);

        CHECK(e[i].nbytes > 0 && e[i].guest_off < size && e[i].nbytes <= size - e[i].guest_off);
        CHECK(i == 0 ? e[i].guest_off == 0 : e[i].guest_off == e[i - 1].guest_off + e[i - 1].nbytes);
        if (i > 0 && e[i].guest_off + 512 < e[i - 1].guest_off + n)
            continue;
        compare_window(m, plain, other, off, n);
        nbytes += n;
    }
}

/* A snapshot shares the cache with its disk, and must not get the other's bytes. */
static void compare_snapshot(const image *m, stack *plain, stack *other)
{
    const fq_reader_options o = options_of_snapshot(m, true), p = options_of_snapshot(m, false);
    const size_t nbytes = o.size < WINDOW_NBYTES ? (size_t)o.size : WINDOW_NBYTES;
    fq_reader *alone = NULL, *sibling = NULL;
    fq_error error;
    const fq_status status = fq_reader_open_qcow2(plain->source, NULL, NULL, NULL, &o, NULL, &alone, &error);

    CHECK(fq_reader_open_qcow2(other->source, NULL, NULL, other->reader, &p, NULL, &sibling, &error) == status);
    if (status == FQ_OK && nbytes > 0)
        compare_window(m, alone, sibling, 0, nbytes);
    fq_reader_close(sibling);
    fq_reader_close(alone);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    counted_file first, second;
    stack plain, other;
    bool opened;
    image m;

    if (!read_header(data, nbytes, &m))
        return -1;
    first = (counted_file){m.file, -1};
    second = (counted_file){m.file, -1};
    opened = open_stack(&m, &first, true, &plain);
    CHECK(open_stack(&m, &second, false, &other) == opened);
    if (opened) {
        compare_extents(&m, plain.reader, other.reader, m.size);
        if (m.size > 0)
            compare_window(&m, plain.reader, other.reader, m.size - (m.size < 5000 ? m.size : 5000),
                           m.size < 5000 ? (size_t)m.size : 5000);
        if (m.plan >> 15 & 1)
            compare_snapshot(&m, &plain, &other);
    }
    close_stack(&other);
    close_stack(&plain);

    /* And with a file that fails at some read, and from then on: it ends. */
    if (opened && m.plan >> 24 & 7) {
        static uint8_t to[WINDOW_NBYTES];
        const size_t n = m.size < WINDOW_NBYTES ? (size_t)m.size : WINDOW_NBYTES;
        fq_error error;

        second.left = (int)(m.plan >> 24 & 7);
        m.plan &= ~UINT64_C(12);
        if (open_stack(&m, &second, false, &other) && n > 0)
            read_window(other.reader, 0, n, 5000, to, &error);
        close_stack(&other);
    }
    return 0;
}
