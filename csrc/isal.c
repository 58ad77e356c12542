/*
 * isal.c - one cluster to one stream, by ISA-L
 *
 * It is some ten times faster than libz, and has levels of its own; distances stay within 4 KiB here too: see encode.c. Only who
 * wants this encoder needs the library: the file belongs to a module apart, and its encoder is handed to fq_write.
 */
#include "internal.h"

#ifdef FQ_HAVE_ISAL
#include <isa-l.h>
#include <stdlib.h>
#ifdef __x86_64__
#include <immintrin.h>

/*
 * ISA-L returns with the upper halves of the vector registers in use. On some processors (measured: Zen 5) whatever comes next on
 * the thread, libz above all, then takes twice its time, until they are cleared.
 */
__attribute__((target("avx"))) static void clear_upper_halves(void)
{
    _mm256_zeroupper();
}

static void leave_vectors(void)
{
    if (__builtin_cpu_supports("avx"))
        clear_upper_halves();
}
#else
static void leave_vectors(void)
{
}
#endif

typedef struct isal {
    struct isal_zstream stream;
    uint32_t level, work_nbytes;
    _Alignas(16) uint8_t work[];
} isal;

static const uint32_t work_nbytes[] = {ISAL_DEF_LVL0_DEFAULT, ISAL_DEF_LVL1_DEFAULT, ISAL_DEF_LVL2_DEFAULT, ISAL_DEF_LVL3_DEFAULT};

static size_t state_nbytes_isal(int level, size_t in_nbytes)
{
    (void)in_nbytes;
    return sizeof(isal) + work_nbytes[level];
}

static void *open_isal(int level)
{
    isal *e = calloc(1, sizeof(*e) + work_nbytes[level]);

    if (e) {
        e->level = (uint32_t)level;
        e->work_nbytes = work_nbytes[level];
    }
    return e;
}

static fq_status run_isal(void *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    isal *e = state;
    int ret;

    isal_deflate_stateless_init(&e->stream);
    e->stream.level = e->level;
    e->stream.level_buf = e->work;
    e->stream.level_buf_size = e->work_nbytes;
    e->stream.hist_bits = 12;
    e->stream.end_of_stream = 1;
    e->stream.flush = NO_FLUSH;
    e->stream.next_in = (uint8_t *)in;
    e->stream.avail_in = (uint32_t)in_nbytes;
    e->stream.next_out = out;
    e->stream.avail_out = (uint32_t)room;
    ret = isal_deflate_stateless(&e->stream);
    leave_vectors();
    *out_nbytes = ret == COMP_OK ? e->stream.total_out : 0;
    return ret == COMP_OK || ret == STATELESS_OVERFLOW ? FQ_OK : FQ_ERR_ARGUMENT;
}

const fq_encoder fq_encoder_isal = {0, 3, open_isal, free, state_nbytes_isal, run_isal};

const char *fq_version_isal(void)
{
#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)
    return TEXT(ISAL_MAJOR_VERSION) "." TEXT(ISAL_MINOR_VERSION) "." TEXT(ISAL_PATCH_VERSION);
}
#endif
