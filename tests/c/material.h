/*
 * material.h - images made in memory, and how the C tests read them
 *
 * Through callbacks and descriptors. Buffers end at a page that cannot be touched (guarded()), so that one byte too many ends the
 * program, also where a sanitizer does not look, as inside of libdeflate.
 */
#ifndef FASTQCOW_MATERIAL_H
#define FASTQCOW_MATERIAL_H

#include "internal.h"
#include "layout.h"
#include "testing.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

enum { BITS = 16, CLUSTER = 1 << BITS, CLUSTERS = 48, TABLES = 3 * CLUSTER };

/* nbytes that end where the process's memory does. */
static inline uint8_t *guarded(size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (nbytes + page - 1) / page;
    uint8_t *at = mmap(NULL, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(at != MAP_FAILED);
    CHECK(mprotect(at + pages * page, page, PROT_NONE) == 0);
    return at + pages * page - nbytes;
}

static inline void unguard(uint8_t *at, size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (nbytes + page - 1) / page;

    munmap(at + nbytes - pages * page, (pages + 1) * page);
}

static inline void fill(uint8_t *to, size_t nbytes, uint32_t seed)
{
    for (size_t i = 0; i < nbytes; i++) {
        seed = seed * 1103515245 + 12345;
        to[i] = (uint8_t)(seed >> 16 & 7) + 'a'; /* three bits of news a byte */
    }
}

/* With memory_level 1 a block ends every 127 symbols, with 9 not before a cluster does. */
static inline size_t deflate_raw(const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, int memory_level)
{
    z_stream z = {.next_in = (Bytef *)in, .avail_in = (uInt)in_nbytes, .next_out = out, .avail_out = (uInt)room};

    CHECK(deflateInit2(&z, 6, Z_DEFLATED, -12, memory_level, Z_DEFAULT_STRATEGY) == Z_OK);
    CHECK(deflate(&z, Z_FINISH) == Z_STREAM_END);
    deflateEnd(&z);
    return z.total_out;
}

static inline void store_be64(uint8_t *to, uint64_t value)
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
static inline image make_image(fq_codec codec)
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
                                       : deflate_raw(cluster, CLUSTER, m.file + at, CLUSTER, i % 2 ? 1 : 9);
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

static inline void free_image(image *m)
{
    free(m->file);
    free(m->contents);
}

typedef struct memory {
    const image *m;
    atomic_int fail; /* the reads from now on fail */
    atomic_int reads;
    atomic_int most_ranges; /* that one call had */
} memory;

static inline ptrdiff_t read_memory(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
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

static inline int read_memory_ranges(void *opaque, void *user, fq_range *ranges, size_t count)
{
    memory *at = opaque;
    int most = atomic_load(&at->most_ranges);

    while ((int)count > most && !atomic_compare_exchange_weak(&at->most_ranges, &most, (int)count))
        ;
    atomic_fetch_sub(&at->reads, (int)count - 1); /* one call is one read */
    for (size_t i = 0; i < count; i++) {
        const ptrdiff_t got = read_memory(opaque, user, ranges[i].buf, ranges[i].nbytes, ranges[i].host_off);

        if (got < 0)
            return -1;
        ranges[i].got = (size_t)got;
    }
    return 0;
}

static inline fq_reader *open_image(const image *m, fq_source *source, fq_reader *backing, unsigned threads, size_t cache)
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

static inline fq_status read_at(fq_reader *reader, uint8_t *to, size_t nbytes, uint64_t off, fq_error *error)
{
    const fq_iovec iov = {to, nbytes, 0};

    return fq_reader_preadv(reader, &iov, 1, off, NULL, error);
}

static inline int temporary_file(const uint8_t *bytes, size_t nbytes)
{
    char name[] = "/tmp/fastqcow-test-XXXXXX";
    const int fd = mkstemp(name);

    CHECK(fd >= 0);
    unlink(name);
    CHECK(pwrite(fd, bytes, nbytes, 0) == (ssize_t)nbytes);
    return fd;
}

#endif
