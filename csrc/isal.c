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

enum { LEVEL = 1, WORK_NBYTES = ISAL_DEF_LVL1_DEFAULT };

typedef struct isal {
    struct isal_zstream stream;
    _Alignas(16) uint8_t work[WORK_NBYTES];
} isal;

static size_t state_nbytes_isal(int level, size_t in_nbytes)
{
    (void)level, (void)in_nbytes;
    return sizeof(isal);
}

static void *open_isal(int level)
{
    (void)level;
    return calloc(1, sizeof(isal));
}

/*
 * In two calls, of which the first takes in one byte: what ISA-L (2.30 to 2.32) enters into its hash table for the third byte of an
 * input is, where one call goes that far, a hash of the stream's own address in the place of the bytes'. So the matches it finds
 * would depend on where the state lies in memory, and the same disk would make another file now and then. Of an input that is not
 * the last, ISAL_LOOK_AHEAD bytes wait for the next call, which hashes what is there.
 */
static fq_status run_isal(void *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    isal *e = state;
    struct isal_zstream *stream = &e->stream;
    const uint32_t first = ISAL_LOOK_AHEAD + 1 < in_nbytes ? ISAL_LOOK_AHEAD + 1 : (uint32_t)in_nbytes;
    int ret;

    isal_deflate_init(stream);
    stream->level = LEVEL;
    stream->level_buf = e->work;
    stream->level_buf_size = sizeof(e->work);
    stream->hist_bits = 12;
    stream->next_in = (uint8_t *)in;
    stream->next_out = out;
    stream->avail_out = (uint32_t)room;
    stream->avail_in = first;
    ret = isal_deflate(stream);
    stream->avail_in += (uint32_t)in_nbytes - first;
    stream->end_of_stream = 1;
    if (ret == COMP_OK)
        ret = isal_deflate(stream);
    leave_vectors();
    *out_nbytes = stream->internal_state.state == ZSTATE_END ? stream->total_out : 0;
    return ret == COMP_OK ? FQ_OK : FQ_ERR_ARGUMENT;
}

const fq_encoder fq_encoder_isal = {LEVEL, LEVEL, open_isal, free, state_nbytes_isal, run_isal};

const char *fq_version_isal(void)
{
#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)
    return TEXT(ISAL_MAJOR_VERSION) "." TEXT(ISAL_MINOR_VERSION) "." TEXT(ISAL_PATCH_VERSION);
}
#endif
