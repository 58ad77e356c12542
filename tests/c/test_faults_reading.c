/*
 * test_faults_reading.c - reads, maps and checks while memory and the source fail, at every place where they can; and callbacks
 * that do not keep to what they are asked
 *
 * An operation opens what it needs, and returns the first status that is not FQ_OK; its bytes are right if all are.
 */
#include "faults.h"

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

static void test_reading(void)
{
    static fq_status (*const operations[])(setting *s) = {op_descriptor, op_chain, op_callback, op_remote, op_check};

    for (unsigned threads = 1; threads <= 3; threads += 2)
        for (int codec = 0; codec < FQ_CODEC_COUNT; codec++) {
            image m = make_image((fq_codec)codec);
            const int fd = temporary_file(m.file, m.nbytes);

            m.size = SIZE;
            for (fault f = 0; f < (codec == FQ_CODEC_DEFLATE_LIBZ ? NO_THREAD : WRITE_EIO); f++)
                for (size_t i = 0; i < sizeof(operations) / sizeof(*operations) && f != NO_THREAD; i++) {
                    setting s = {.m = &m, .fd = fd, .threads = threads};

                    strike_everywhere(operations[i], &s, f);
                }
            close(fd);
            free_image(&m);
        }
}

typedef struct rogue {
    memory at;
    int answer; /* what the nth call answers: more than was asked for, -1, or 0 */
    int nth;
    atomic_int calls;
} rogue;

enum { TOO_MUCH = 1, FAILS, ENDS, ANSWERS };

static const char *const rogue_names[ANSWERS] = {NULL, "too much", "fails", "ends"};
static unsigned long rogue_answers[ANSWERS];

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
            for (int n = 1, reached = 1; reached; n += EACH) {
                rogue r = {.at = {.m = &m}, .answer = answer, .nth = n};
                const setting s = {.m = &m, .threads = threads};
                fq_source *source =
                    remote ? fq_source_remote(read_rogue_ranges, &r, m.nbytes) : fq_source_callback(read_rogue, &r, m.nbytes);
                fq_error error;
                fq_status status;

                atomic_store(&armed, true);
                status = read_all(&s, source, &error);
                reached = atomic_load(&r.calls) >= n;
                rogue_answers[answer] += reached;
                CHECK(status == FQ_OK || is_right(READ_NOTHING, status, &error) || status == FQ_ERR_SOURCE);
                CHECK(answer == ENDS || status == FQ_OK || status == FQ_ERR_SOURCE);
                CHECK(reached || status == FQ_OK);
                fq_source_free(source);
            }
    free_image(&m);
}

int main(void)
{
    test_reading();
    test_rogues(1);
    test_rogues(3);
    give_back_scratches();
    tell_injected("faults of reading");
    for (int answer = TOO_MUCH; answer < ANSWERS; answer++)
        printf("%8lu callback: %s\n", rogue_answers[answer], rogue_names[answer]);
    return 0;
}
