/*
 * test_threads.c - many threads, read-ahead, cancelling and fork, without Python; above all for TSan
 */
#include "material.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

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
    const fq_request request = {.user = &polls, .poll = stop_at_once};
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

/* A map whose tables are read slowly, and never kept, takes long enough for the poll to come. */
static void test_cancelled_map(void)
{
    enum { L1_ENTRIES = 65, ENTRIES = 512 / 8, L2 = 1024 };
    uint8_t file[L2 + 512];
    const image m = {.file = file, .nbytes = sizeof(file), .size = (size_t)L1_ENTRIES * ENTRIES * 512};
    memory at = {.m = &m};
    fq_source *slow = fq_source_callback(read_slowly, &at, m.nbytes), *source = fq_source_callback(read_memory, &at, m.nbytes);
    fq_reader_options options = {
        .geometry = {.version = 3, .cluster_bits = 9, .codec = FQ_CODEC_DEFLATE},
        .size = m.size,
        .l1_entries = L1_ENTRIES,
        .largest_cluster = 512,
        .threads = 1,
    };
    int polls = 0;
    const fq_request request = {.user = &polls, .poll = stop_at_once}, without_poll = {.user = &polls};
    fq_reader *reader;
    fq_extent extent;
    fq_error error;
    size_t count;

    for (unsigned i = 0; i < L1_ENTRIES; i++)
        store_be64(file + 8 * i, L2);
    for (unsigned i = 0; i < ENTRIES; i++)
        store_be64(file + L2 + 8 * i, FQ_L2_COMPRESSED | 512);
    CHECK(fq_reader_open_qcow2(slow, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(fq_reader_map(reader, 0, m.size, &extent, 1, &count, &request, &error) == FQ_ERR_CANCELLED);
    CHECK(polls == 1);
    fq_reader_close(reader);
    fq_source_free(slow);
    options.table_cache_nbytes = 1 << 20;
    CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    CHECK(fq_reader_map(reader, 0, m.size, &extent, 1, &count, &without_poll, &error) == FQ_OK);
    CHECK(count == 1 && extent.nbytes == m.size && extent.kind == FQ_COMPRESSED);
    fq_reader_close(reader);
    fq_source_free(source);
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

typedef struct quitter {
    memory at;
    fq_reader *reader;
    pthread_t thread;
    uint8_t *whole;
    atomic_int quits, inside; /* other threads in the callback */
} quitter;

/* The interpreter ends threads so that come back to it when it is shut down. */
static int read_and_quit(void *opaque, void *user, fq_range *ranges, size_t count)
{
    quitter *q = opaque;
    int ret;

    if (pthread_equal(pthread_self(), q->thread)) {
        if (atomic_load(&q->inside) > 0) {
            atomic_store(&q->quits, 1);
            pthread_exit(NULL);
        }
        return read_memory_ranges(&q->at, user, ranges, count);
    }
    atomic_fetch_add(&q->inside, 1);
    usleep(50000);
    ret = read_memory_ranges(&q->at, user, ranges, count);
    atomic_fetch_sub(&q->inside, 1);
    return ret;
}

static void *quitter_main(void *arg)
{
    quitter *q = arg;
    fq_error error;

    q->thread = pthread_self();
    for (;;)
        read_at(q->reader, q->whole, q->at.m->size, 0, &error);
    return NULL;
}

static void *wipe_stack(void *arg)
{
    volatile uint8_t bytes[256 << 10];

    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = 0xff;
    return arg;
}

/* A callback ends the thread that reads, while others are at work for it: they do not touch a stack that is not there any more. */
static void test_thread_that_is_ended(void)
{
    static quitter q; /* which nothing here outlives */
    static image m;
    pthread_attr_t attr;
    pthread_t thread;
    fq_source *source;

    m = make_image(FQ_CODEC_DEFLATE);
    for (size_t i = CLUSTERS; i < 6 * CLUSTERS; i++) /* enough for several threads */
        memcpy(m.file + CLUSTER + 8 * i, m.file + CLUSTER + 8 * (i % CLUSTERS), 8);
    m.size *= 6;
    q.at.m = &m;
    q.whole = malloc(m.size);
    source = fq_source_remote(read_and_quit, &q, m.nbytes);
    q.reader = open_image(&m, source, NULL, 4, 0);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    CHECK(pthread_create(&thread, &attr, quitter_main, &q) == 0);
    while (!atomic_load(&q.quits))
        usleep(1000);
    for (int i = 0; i < 100; i++) {
        CHECK(pthread_create(&thread, NULL, wipe_stack, NULL) == 0);
        pthread_join(thread, NULL);
        usleep(2000);
    }
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
    test_threads();
    test_read_ahead(16 * CLUSTER);
    test_read_ahead(3 * CLUSTER);
    test_read_ahead(96 * CLUSTER); /* so much that blocks are made ready, too */
    test_cancel();
    test_cancelled_map();
    test_fork();
#ifdef __SANITIZE_ADDRESS__
    __lsan_do_leak_check();
#endif
    test_thread_that_is_ended(); /* which stays, with all that it holds: after it there is no looking for leaks */
    puts("threads: all tests passed");
    fflush(stdout);
    _exit(0);
}
