/*
 * layout.h - the bit layouts of qcow2's tables (docs/interop/qcow2 of QEMU, "Cluster mapping")
 *
 * An entry is decoded once, here, into a kind, a place and a length; nothing else in the project looks at the bits. Static inline,
 * since the walk decodes one entry per cluster or subcluster, and with constants folded that is a handful of instructions.
 */
#ifndef FASTQCOW_LAYOUT_H
#define FASTQCOW_LAYOUT_H

#include "fastqcow.h"

#define FQ_L1_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define FQ_L2_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define FQ_L2_COPIED (UINT64_C(1) << 63)
#define FQ_L2_COMPRESSED (UINT64_C(1) << 62)
#define FQ_L2_ZERO UINT64_C(1)
#define FQ_L1_RESERVED_MASK UINT64_C(0x7f000000000001ff)
#define FQ_L2_RESERVED_MASK UINT64_C(0x3f000000000001fe)
#define FQ_REFCOUNT_OFFSET_MASK UINT64_C(0xfffffffffffffe00)
#define FQ_REFCOUNT_RESERVED_MASK UINT64_C(0x1ff)
#define FQ_BITMAP_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define FQ_BITMAP_RESERVED_MASK UINT64_C(0xff000000000001fe)
#define FQ_SUBCLUSTERS 32u

typedef struct fq_mapping {
    fq_kind kind;
    uint32_t in_nbytes; /* of a compressed cluster: up to the end of its last sector */
    uint64_t host_off;  /* of the cluster; 0 where it has no place */
} fq_mapping;

static inline uint64_t fq_load_be64(const uint8_t *p)
{
    return (uint64_t)p[0] << 56 | (uint64_t)p[1] << 48 | (uint64_t)p[2] << 40 | (uint64_t)p[3] << 32 | (uint64_t)p[4] << 24 |
           (uint64_t)p[5] << 16 | (uint64_t)p[6] << 8 | (uint64_t)p[7];
}

static inline void fq_store_be64(uint8_t *p, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(value >> (56 - 8 * i));
}

static inline uint64_t fq_cluster_size(const fq_geometry *g)
{
    return UINT64_C(1) << g->cluster_bits;
}

static inline unsigned fq_l2_entry_bits(const fq_geometry *g)
{
    return g->extended_l2 ? 4 : 3;
}

/* log2 of the unit that has a kind of its own: a cluster, or a subcluster. */
static inline unsigned fq_unit_bits(const fq_geometry *g)
{
    return g->extended_l2 ? g->cluster_bits - 5 : g->cluster_bits;
}

/*
 * The compressed descriptor has no alignment: its offset field starts at bit 0, so an odd offset is an offset and not the zero
 * flag. Its width and that of the sector count depend on the cluster size.
 */
static inline void fq_decode_compressed(const fq_geometry *g, uint64_t entry, fq_mapping *m)
{
    const unsigned shift = 62 - (g->cluster_bits - 8);
    const uint64_t more_sectors = (entry >> shift) & ((UINT64_C(1) << (g->cluster_bits - 8)) - 1);

    m->kind = FQ_COMPRESSED;
    m->host_off = entry & ((UINT64_C(1) << shift) - 1);
    m->in_nbytes = (uint32_t)((more_sectors + 1) * 512 - (m->host_off & 511));
}

/* The entry of a stream; 0 where it lies too far behind for an entry to say so. */
static inline uint64_t fq_encode_compressed(const fq_geometry *g, uint64_t host_off, size_t in_nbytes)
{
    const unsigned shift = 62 - (g->cluster_bits - 8);

    if (host_off >> shift)
        return 0;
    return FQ_L2_COMPRESSED | (((host_off & 511) + in_nbytes - 1) / 512) << shift | host_off;
}

/* `bitmap` and `sub` count for extended entries only. */
static inline fq_status fq_decode(const fq_geometry *g, uint64_t entry, uint64_t bitmap, unsigned sub, fq_mapping *m)
{
    bool placed;

    if (entry & FQ_L2_COMPRESSED) {
        fq_decode_compressed(g, entry, m);
        return g->external_data ? FQ_ERR_COMPRESSED_OUTSIDE : FQ_OK;
    }
    m->in_nbytes = 0;
    m->host_off = entry & FQ_L2_OFFSET_MASK;
    /* Offset 0 is the header's in an image's own file, but the first cluster's in an external one. */
    placed = m->host_off || (g->external_data && entry & FQ_L2_COPIED);
    if (g->extended_l2) {
        const uint32_t allocated = (uint32_t)bitmap, zero = (uint32_t)(bitmap >> 32);

        if (placed ? allocated & zero : allocated)
            return placed ? FQ_ERR_SUBCLUSTER_BOTH : FQ_ERR_SUBCLUSTER_NOWHERE;
        if (zero >> sub & 1)
            m->kind = placed ? FQ_ZERO_ALLOC : FQ_ZERO;
        else if (allocated >> sub & 1)
            m->kind = FQ_DATA;
        else
            m->kind = placed ? FQ_UNALLOCATED_ALLOC : FQ_UNALLOCATED;
    } else if (entry & FQ_L2_ZERO) {
        if (g->version < 3)
            return FQ_ERR_ZERO_IN_V2;
        m->kind = m->host_off ? FQ_ZERO_ALLOC : FQ_ZERO;
    } else {
        m->kind = placed ? FQ_DATA : FQ_UNALLOCATED;
    }
    return m->host_off & (fq_cluster_size(g) - 1) ? FQ_ERR_CLUSTER_UNALIGNED : FQ_OK;
}

#endif
