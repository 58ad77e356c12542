/*
 * space.c - the file of an image that is being written: host clusters, L2 tables, refcounts
 *
 * The file grows at its end only. Streams are packed to the byte, as QEMU packs them: each where the one before ended, if that
 * cluster's refcount can count one more, and into the next cluster if that lies right behind. A plain cluster takes a place at the
 * end of the file, and the cluster that streams are packed into stays open for those that still fit.
 *
 * A reader over a network has to find the tables first, so they lie side by side behind the data: the L1 table, the L2 tables in
 * the order of the disk, the refcount table and its blocks. Of large disks they do not all fit into memory; then those that are
 * complete are written whenever there are many, in one stretch between the data.
 *
 * Bounds: those of the format on tables, 32 MiB for L1 and 8 MiB for the refcount table, and the budget for what is kept back.
 */
#include "internal.h"
#include "layout.h"

#include <stdlib.h>
#include <string.h>

enum {
    L1_ENTRIES_MAX = (32 << 20) / 8,
    REFCOUNT_TABLE_NBYTES_MAX = 8 << 20,
    TABLES_NBYTES = 16 << 20,
};

struct fq_space {
    int fd;
    fq_geometry geometry;
    unsigned cluster_bits, l2_bits; /* log2 of the bytes of a cluster, and of the entries of a table */
    uint32_t refcount_order;
    uint64_t refcount_max, per_block; /* refcounts in a block */
    uint64_t end;                     /* of the file */
    uint64_t open, open_refs;         /* where the next stream may go, 0 nowhere; and the refcount of that cluster */

    uint64_t *l1;
    size_t l1_count, l1_capacity;

    uint8_t *tables; /* L2 tables that are not written yet, ... */
    size_t tables_count, tables_capacity;
    uint64_t *tables_l1; /* ... and the L1 indices that they belong to */
    size_t tables_l1_capacity;

    uint8_t *counts; /* refcount blocks that are not written yet: the first is number blocks_count */
    size_t counts_capacity;
    uint64_t *blocks; /* where those are that are written */
    size_t blocks_count, blocks_capacity;

    size_t budget;
};

static fq_status no_memory(fq_error *error)
{
    return fq_fail(error, FQ_ERR_NOMEM, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
}

static fq_status too_large(fq_error *error)
{
    return fq_fail(error, FQ_ERR_TOO_LARGE, FQ_NOWHERE, FQ_NOWHERE, FQ_NOWHERE);
}

/* Make room for so many elements, new ones zeroes. `array` points to a pointer of whichever type. */
static bool grow(void *array, size_t *capacity, size_t count, size_t element_nbytes)
{
    const size_t more = *capacity * 2 > count ? *capacity * 2 : count;
    uint8_t *grown;

    if (count <= *capacity)
        return true;
    if (more > SIZE_MAX / element_nbytes)
        return false;
    memcpy(&grown, array, sizeof(grown));
    grown = realloc(grown, more * element_nbytes);
    if (!grown)
        return false;
    memset(grown + *capacity * element_nbytes, 0, (more - *capacity) * element_nbytes);
    memcpy(array, &grown, sizeof(grown));
    *capacity = more;
    return true;
}

static fq_status write_at(const fq_space *s, const uint8_t *p, size_t nbytes, uint64_t off, fq_error *error)
{
    size_t done;

    return fq_pwrite(s->fd, p, nbytes, off, &done, error);
}

/* ---- refcounts */

static void store_refcount(uint8_t *block, unsigned order, uint64_t index, uint64_t value)
{
    if (order < 3) {
        const unsigned per_byte = 8u >> order, shift = (unsigned)(index % per_byte) << order;
        const unsigned mask = ((1u << (1u << order)) - 1) << shift;

        block[index / per_byte] = (uint8_t)((block[index / per_byte] & ~mask) | (unsigned)value << shift);
        return;
    }
    for (size_t i = 0, nbytes = (size_t)1 << (order - 3); i < nbytes; i++)
        block[index * nbytes + i] = (uint8_t)(value >> 8 * (nbytes - 1 - i));
}

static fq_status set_refcount(fq_space *s, uint64_t host_off, uint64_t value, fq_error *error)
{
    const uint64_t cluster = host_off >> s->cluster_bits, first = s->blocks_count * s->per_block;
    const uint64_t block = (cluster - first) / s->per_block;

    if (block + s->blocks_count >= REFCOUNT_TABLE_NBYTES_MAX / 8)
        return too_large(error);
    if (!grow(&s->counts, &s->counts_capacity, (size_t)(block + 1), (size_t)1 << s->cluster_bits))
        return no_memory(error);
    store_refcount(s->counts, s->refcount_order, cluster - first, value);
    return FQ_OK;
}

/* Clusters at the end of the file, each with a refcount of 1. */
static fq_status take(fq_space *s, uint64_t clusters, uint64_t *host_off, fq_error *error)
{
    const uint64_t off = s->end;

    if (clusters > ((FQ_L2_OFFSET_MASK - off) >> s->cluster_bits))
        return too_large(error);
    for (uint64_t i = 0; i < clusters; i++) {
        const fq_status status = set_refcount(s, off + (i << s->cluster_bits), 1, error);

        if (status != FQ_OK)
            return status;
    }
    s->end += clusters << s->cluster_bits;
    *host_off = off;
    return FQ_OK;
}

/* Write `count` blocks to where they have been given a place. */
static fq_status write_blocks(fq_space *s, size_t count, uint64_t host_off, fq_error *error)
{
    const size_t nbytes = count << s->cluster_bits;
    const fq_status status = write_at(s, s->counts, nbytes, host_off, error);

    if (status != FQ_OK)
        return status;
    if (!grow(&s->blocks, &s->blocks_capacity, s->blocks_count + count, sizeof(*s->blocks)))
        return no_memory(error);
    for (size_t i = 0; i < count; i++)
        s->blocks[s->blocks_count++] = host_off + ((uint64_t)i << s->cluster_bits);
    memmove(s->counts, s->counts + nbytes, (s->counts_capacity << s->cluster_bits) - nbytes);
    memset(s->counts + (s->counts_capacity << s->cluster_bits) - nbytes, 0, nbytes);
    return FQ_OK;
}

/* Write the blocks whose counts do not change any more, if there are many. */
static fq_status relieve_counts(fq_space *s, fq_error *error)
{
    const uint64_t final = (s->open ? s->open : s->end) >> s->cluster_bits;
    const size_t count = (size_t)(final / s->per_block - s->blocks_count);
    uint64_t off;
    fq_status status;

    if (count << s->cluster_bits < s->budget)
        return FQ_OK;
    status = take(s, count, &off, error);
    return status == FQ_OK ? write_blocks(s, count, off, error) : status;
}

/* ---- tables */

static fq_status set_l1(fq_space *s, uint64_t index, uint64_t entry, fq_error *error)
{
    if (index >= L1_ENTRIES_MAX)
        return too_large(error);
    if (!grow(&s->l1, &s->l1_capacity, (size_t)index + 1, sizeof(*s->l1)))
        return no_memory(error);
    s->l1[index] = entry;
    if (index >= s->l1_count)
        s->l1_count = (size_t)index + 1;
    return FQ_OK;
}

static fq_status write_tables(fq_space *s, uint64_t host_off, fq_error *error)
{
    const size_t nbytes = s->tables_count << s->cluster_bits;
    fq_status status = write_at(s, s->tables, nbytes, host_off, error);

    for (size_t i = 0; i < s->tables_count && status == FQ_OK; i++)
        status = set_l1(s, s->tables_l1[i], FQ_L2_COPIED | (host_off + ((uint64_t)i << s->cluster_bits)), error);
    memset(s->tables, 0, nbytes);
    s->tables_count = 0;
    return status;
}

/* Write the tables, which are complete, if there are many. */
static fq_status relieve_tables(fq_space *s, fq_error *error)
{
    uint64_t off;
    fq_status status;

    if (s->tables_count << s->cluster_bits < s->budget)
        return FQ_OK;
    status = take(s, s->tables_count, &off, error);
    return status == FQ_OK ? write_tables(s, off, error) : status;
}

fq_status fq_space_map(fq_space *s, uint64_t cluster, uint64_t entry, uint64_t bitmap, fq_error *error)
{
    const uint64_t l1_index = cluster >> s->l2_bits, in_table = cluster & ((UINT64_C(1) << s->l2_bits) - 1);
    uint8_t *at;

    if (s->tables_count == 0 || s->tables_l1[s->tables_count - 1] != l1_index) {
        const fq_status status = relieve_tables(s, error);

        if (status != FQ_OK)
            return status;
        if (l1_index >= L1_ENTRIES_MAX)
            return too_large(error);
        if (!grow(&s->tables, &s->tables_capacity, s->tables_count + 1, (size_t)1 << s->cluster_bits) ||
            !grow(&s->tables_l1, &s->tables_l1_capacity, s->tables_count + 1, sizeof(*s->tables_l1)))
            return no_memory(error);
        s->tables_l1[s->tables_count++] = l1_index;
    }
    at = s->tables + ((s->tables_count - 1) << s->cluster_bits) + (in_table << fq_l2_entry_bits(&s->geometry));
    fq_store_be64(at, entry);
    if (s->geometry.extended_l2)
        fq_store_be64(at + 8, bitmap);
    return FQ_OK;
}

/* ---- places */

fq_space *fq_space_new(int fd, const fq_geometry *geometry, uint32_t refcount_order, size_t tables_nbytes)
{
    fq_space *s = calloc(1, sizeof(*s));
    fq_error error;
    uint64_t header;

    if (!s)
        return NULL;
    s->fd = fd;
    s->geometry = *geometry;
    s->cluster_bits = geometry->cluster_bits;
    s->l2_bits = s->cluster_bits - fq_l2_entry_bits(geometry);
    s->refcount_order = refcount_order;
    s->refcount_max = refcount_order == 6 ? INT64_MAX : (UINT64_C(1) << (1u << refcount_order)) - 1;
    s->per_block = UINT64_C(8) << s->cluster_bits >> refcount_order;
    s->budget = tables_nbytes ? tables_nbytes : TABLES_NBYTES;
    if (take(s, 1, &header, &error) != FQ_OK) {
        fq_space_free(s);
        return NULL;
    }
    return s;
}

void fq_space_free(fq_space *s)
{
    if (!s)
        return;
    free(s->l1);
    free(s->tables);
    free(s->tables_l1);
    free(s->counts);
    free(s->blocks);
    free(s);
}

fq_status fq_space_cluster(fq_space *s, uint64_t *host_off, fq_error *error)
{
    const fq_status status = relieve_counts(s, error);

    return status == FQ_OK ? take(s, 1, host_off, error) : status;
}

fq_status fq_space_packed(fq_space *s, size_t nbytes, uint64_t *host_off, fq_error *error)
{
    const uint64_t cluster_size = UINT64_C(1) << s->cluster_bits, in_cluster = s->open & (cluster_size - 1);
    const uint64_t room = in_cluster ? cluster_size - in_cluster : 0;
    const bool goes_on = room < nbytes && s->open + room == s->end;
    fq_status status = FQ_OK;
    uint64_t next = 0;

    if (room == 0 || s->open_refs == s->refcount_max || (room < nbytes && !goes_on)) {
        s->open = 0;
        status = fq_space_cluster(s, &s->open, error);
        s->open_refs = 1;
        *host_off = s->open;
        s->open += nbytes;
        return status;
    }
    *host_off = s->open;
    status = set_refcount(s, s->open, ++s->open_refs, error);
    s->open += nbytes;
    if (status == FQ_OK && room < nbytes) {
        status = take(s, 1, &next, error);
        s->open_refs = 1;
    }
    return status;
}

/* ---- the end */

/* The refcount blocks that are left count the table and themselves too. */
static fq_status finish_refcounts(fq_space *s, fq_written *written, fq_error *error)
{
    const uint64_t used = s->end >> s->cluster_bits, cluster_size = UINT64_C(1) << s->cluster_bits;
    uint64_t blocks = s->blocks_count, table, needed = blocks, off, table_nbytes;
    uint8_t *entries;
    fq_status status;

    do {
        blocks = needed;
        table = (blocks * 8 + cluster_size - 1) >> s->cluster_bits;
        needed = (used + table + (blocks - s->blocks_count) + s->per_block - 1) / s->per_block;
    } while (needed > blocks);
    status = take(s, table + blocks - s->blocks_count, &off, error);
    if (status != FQ_OK)
        return status;
    table_nbytes = table << s->cluster_bits;
    if (table_nbytes > REFCOUNT_TABLE_NBYTES_MAX)
        return too_large(error);
    status = write_blocks(s, (size_t)(blocks - s->blocks_count), off + table_nbytes, error);
    if (status != FQ_OK)
        return status;
    entries = calloc(1, (size_t)table_nbytes);
    if (!entries)
        return no_memory(error);
    for (size_t i = 0; i < blocks; i++)
        fq_store_be64(entries + 8 * i, s->blocks[i]);
    status = write_at(s, entries, (size_t)table_nbytes, off, error);
    free(entries);
    written->refcount_table_off = off;
    written->refcount_table_clusters = (uint32_t)table;
    return status;
}

fq_status fq_space_finish(fq_space *s, uint64_t size, fq_written *written, fq_error *error)
{
    const unsigned covers_bits = s->cluster_bits + s->l2_bits;
    const uint64_t needed = (size >> covers_bits) + ((size & ((UINT64_C(1) << covers_bits) - 1)) != 0);
    const uint64_t entries = needed ? needed : 1; /* of a table of none, a check does not know what it is */
    const uint64_t l1_clusters = (entries * 8 + (UINT64_C(1) << s->cluster_bits) - 1) >> s->cluster_bits;
    const size_t l1_room = (size_t)(l1_clusters << s->cluster_bits) / 8;
    uint64_t off;
    fq_status status;

    if (entries > L1_ENTRIES_MAX)
        return too_large(error);
    s->open = 0;
    status = take(s, l1_clusters + s->tables_count, &off, error);
    if (status != FQ_OK)
        return status;
    written->l1_off = off;
    written->l1_entries = (uint32_t)entries;
    if (s->tables_count > 0)
        status = write_tables(s, off + (l1_clusters << s->cluster_bits), error);
    if (status != FQ_OK)
        return status;
    if (!grow(&s->l1, &s->l1_capacity, l1_room, sizeof(*s->l1)))
        return no_memory(error);
    for (size_t i = 0; i < l1_room; i++)
        fq_store_be64((uint8_t *)&s->l1[i], s->l1[i]);
    status = write_at(s, (const uint8_t *)s->l1, l1_room * 8, off, error);
    if (status == FQ_OK)
        status = finish_refcounts(s, written, error);
    written->nbytes = s->end;
    return status;
}
