/*
 * layout.c - a whole L2 table decoded at once, for those who walk tables themselves
 *
 * The reader decodes an entry when it comes to it (l2.c); this is for other readers, which have a table's bytes and want its
 * columns.
 */
#include "layout.h"

void fq_l2_parse(const fq_geometry *g, const uint8_t *table, size_t entries, uint8_t *kind, uint64_t *host_off, uint32_t *in_nbytes)
{
    const unsigned subs = g->extended_l2 ? FQ_SUBCLUSTERS : 1;

    for (size_t i = 0; i < entries; i++) {
        const uint8_t *at = table + (i << fq_l2_entry_bits(g));
        const uint64_t entry = fq_load_be64(at), bitmap = g->extended_l2 ? fq_load_be64(at + 8) : 0;

        for (unsigned sub = 0; sub < subs; sub++) {
            fq_mapping m = {0};
            const fq_status status = fq_decode(g, entry, bitmap, sub, &m);

            *kind++ = (uint8_t)(status == FQ_OK ? (unsigned)m.kind : FQ_KIND_COUNT + (unsigned)status);
            *host_off++ = m.host_off;
            *in_nbytes++ = m.in_nbytes;
        }
    }
}
