/*
 * l2.c - an L2 table, decoded at once and walked by a reader, which must agree
 *
 * The input is the geometry, in three bytes, how many bytes the disk ends before the table's, in four, and the table. The file has
 * the L1 table and the L2 table, and zeroes wherever else an entry may point.
 */
#include "fuzz.h"

enum { TABLE_NBYTES_MAX = 1 << 16, L2_OFF = 1 << 21 };

typedef struct table_file {
    const uint8_t *table;
    size_t nbytes;
} table_file;

static ptrdiff_t read_table_file(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off)
{
    const table_file *f = opaque;

    (void)user;
    memset(buf, 0, nbytes);
    if (host_off <= 5 && nbytes > 5 - host_off)
        buf[5 - host_off] = L2_OFF >> 16 & 0xff;
    if (host_off >= L2_OFF && host_off < L2_OFF + f->nbytes) {
        const size_t left = L2_OFF + f->nbytes - (size_t)host_off;

        memcpy(buf, f->table + (host_off - L2_OFF), left < nbytes ? left : nbytes);
    }
    return (ptrdiff_t)nbytes;
}

typedef struct columns {
    uint8_t *kind;
    uint64_t *host_off;
    uint32_t *in_nbytes;
} columns;

/* What the table says of one unit is what the reader's map says of it. An external file's clusters have their own places. */
static fq_status expected_of(const fq_geometry *g, const columns *c, size_t unit, fq_extent *e)
{
    const uint64_t unit_nbytes = UINT64_C(1) << fq_unit_bits(g);
    const uint64_t in_cluster = unit * unit_nbytes & (fq_cluster_size(g) - 1);
    bool placed;

    if (c->kind[unit] >= FQ_KIND_COUNT)
        return (fq_status)(c->kind[unit] - FQ_KIND_COUNT);
    e->kind = (fq_kind)c->kind[unit];
    placed = e->kind == FQ_DATA || e->kind == FQ_ZERO_ALLOC || e->kind == FQ_UNALLOCATED_ALLOC;
    e->host_off = placed ? c->host_off[unit] + in_cluster : FQ_NOWHERE;
    if (placed && g->external_data && c->host_off[unit] != unit * unit_nbytes - in_cluster)
        return FQ_ERR_OTHER_PLACE;
    return FQ_OK;
}

static void walk(fq_reader *reader, const fq_geometry *g, uint64_t size, const columns *c)
{
    const unsigned bits = fq_unit_bits(g);
    uint64_t at = 0;

    while (at < size) {
        fq_extent e[3], expected;
        fq_error error;
        size_t count;
        fq_status status = fq_reader_map(reader, at, size, e, 3, &count, NULL, &error);

        for (size_t i = 0; i < count; i++) {
            CHECK(e[i].guest_off == at && e[i].nbytes > 0 && e[i].nbytes <= size - at && e[i].depth == 0);
            for (uint64_t end = at + e[i].nbytes; at < end; at = ((at >> bits) + 1) << bits) {
                CHECK(expected_of(g, c, (size_t)(at >> bits), &expected) == FQ_OK);
                CHECK(e[i].kind == expected.kind);
                CHECK(e[i].host_off == FQ_NOWHERE ? expected.host_off == FQ_NOWHERE
                                                  : e[i].host_off + (at - e[i].guest_off) == expected.host_off);
            }
            at = e[i].guest_off + e[i].nbytes;
        }
        if (status == FQ_OK) {
            CHECK(count > 0);
            continue;
        }
        CHECK(error.guest_off == at && error.status == status);
        CHECK(expected_of(g, c, (size_t)(at >> bits), &expected) == status);
        at = ((at >> bits) + 1) << bits;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    input in = {data, nbytes};
    const unsigned flags = (unsigned)take_number(&in, 1), cluster_bits = 9 + (unsigned)take_number(&in, 1) % 13;
    const fq_geometry g = {flags & 1 ? 3 : 2, cluster_bits, flags & 2 && cluster_bits >= 14, flags & 4,
                           (fq_codec)(flags >> 3) % FQ_CODEC_COUNT};
    const unsigned threads = 1 + (unsigned)take_number(&in, 1) % 3;
    const uint64_t cut = take_number(&in, 4);
    const size_t table_nbytes = (size_t)1 << cluster_bits;
    const size_t entries = (in.left < TABLE_NBYTES_MAX ? in.left : TABLE_NBYTES_MAX) >> fq_l2_entry_bits(&g);
    const size_t in_table = table_nbytes >> fq_l2_entry_bits(&g), used = entries < in_table ? entries : in_table;
    const size_t subs = g.extended_l2 ? FQ_SUBCLUSTERS : 1, all = (used ? used : 1) * subs;
    const uint64_t whole = (uint64_t)used << cluster_bits, size = whole - (cut < whole ? cut : 0);
    columns c = {malloc(all), malloc(all * 8), malloc(all * 4)};
    uint8_t *table = malloc(used << fq_l2_entry_bits(&g) | 1); /* exactly, so that a sanitizer sees one byte too many */
    table_file f = {table, used << fq_l2_entry_bits(&g)};
    fq_source *source = fq_source_callback(read_table_file, &f, INT64_MAX);
    const fq_reader_options options = {.geometry = g,
                                       .size = size,
                                       .l1_entries = 1,
                                       .largest_cluster = table_nbytes,
                                       .cluster_cache_nbytes = 1 << 16,
                                       .table_cache_nbytes = 1 << 18,
                                       .threads = threads};
    fq_reader *reader = NULL;
    fq_error error;

    CHECK(c.kind && c.host_off && c.in_nbytes && table && source);
    memcpy(table, in.at, f.nbytes);
    fq_l2_parse(&g, table, used, c.kind, c.host_off, c.in_nbytes);
    for (size_t i = 0; i < used * subs; i++)
        CHECK(c.kind[i] == FQ_COMPRESSED ? c.in_nbytes[i] > 0 && c.in_nbytes[i] <= 2 * table_nbytes
                                         : c.kind[i] >= FQ_KIND_COUNT || c.in_nbytes[i] == 0);
    CHECK(fq_reader_open_qcow2(source, NULL, NULL, NULL, &options, NULL, &reader, &error) == FQ_OK);
    walk(reader, &g, size, &c);
    fq_reader_close(reader);
    fq_source_free(source);
    free(table);
    free(c.kind);
    free(c.host_off);
    free(c.in_nbytes);
    return 0;
}
