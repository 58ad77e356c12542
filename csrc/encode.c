/*
 * encode.c - one cluster to one stream
 *
 * Deflate streams keep to distances of 4 KiB, which is the window that QEMU writes with, and all that readers which inflate by
 * streaming have to give. libz is set as QEMU sets it, so at its default level it makes the same streams. (libdeflate, the fastest
 * at its size, always uses distances up to 32 KiB.) ISA-L is some ten times faster, and has levels of its own.
 *
 * A stream has to be smaller than its cluster: the caller gives less room than that, and stores the cluster as it is where the room
 * does not do.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>
#ifdef FQ_HAVE_ISAL
#include <isa-l.h>
#endif

enum { WINDOW_BITS = 12 };

struct fq_encoder {
    fq_encoding encoding;
    z_stream libz;
    bool libz_ready;
    ZSTD_CCtx *zstd;
#ifdef FQ_HAVE_ISAL
    struct isal_zstream isal;
    uint32_t isal_level;
    uint8_t *isal_work;
    uint32_t isal_work_nbytes;
#endif
};

static fq_status open_libz(fq_encoder *e, int level)
{
    const int ret = deflateInit2(&e->libz, level, Z_DEFLATED, -WINDOW_BITS, 9, Z_DEFAULT_STRATEGY);

    if (ret != Z_OK)
        return ret == Z_MEM_ERROR ? FQ_ERR_NOMEM : FQ_ERR_ARGUMENT;
    e->libz_ready = true;
    return FQ_OK;
}

static fq_status open_zstd(fq_encoder *e, int level)
{
    e->zstd = ZSTD_createCCtx();
    if (!e->zstd)
        return FQ_ERR_NOMEM;
    return ZSTD_isError(ZSTD_CCtx_setParameter(e->zstd, ZSTD_c_compressionLevel, level)) ? FQ_ERR_ARGUMENT : FQ_OK;
}

#ifdef FQ_HAVE_ISAL
static fq_status open_isal(fq_encoder *e, int level)
{
    static const uint32_t work_nbytes[] = {ISAL_DEF_LVL0_DEFAULT, ISAL_DEF_LVL1_DEFAULT, ISAL_DEF_LVL2_DEFAULT,
                                           ISAL_DEF_LVL3_DEFAULT};

    e->isal_level = (uint32_t)level;
    e->isal_work_nbytes = work_nbytes[level];
    e->isal_work = calloc(1, e->isal_work_nbytes + 1);
    return e->isal_work ? FQ_OK : FQ_ERR_NOMEM;
}
#endif

fq_status fq_encoder_new(fq_encoding encoding, int level, fq_encoder **out)
{
    static const int levels[FQ_ENCODING_COUNT][2] = {
        [FQ_ENCODING_LIBZ] = {1, 9}, [FQ_ENCODING_ISAL] = {0, 3}, [FQ_ENCODING_ZSTD] = {1, 19}};
    fq_encoder *e;
    fq_status status = FQ_ERR_ARGUMENT;

    if ((unsigned)encoding >= FQ_ENCODING_COUNT || level < levels[encoding][0] || level > levels[encoding][1])
        return FQ_ERR_ARGUMENT;
    e = calloc(1, sizeof(*e));
    if (!e)
        return FQ_ERR_NOMEM;
    e->encoding = encoding;
    if (encoding == FQ_ENCODING_LIBZ)
        status = open_libz(e, level);
    else if (encoding == FQ_ENCODING_ZSTD)
        status = open_zstd(e, level);
#ifdef FQ_HAVE_ISAL
    else if (encoding == FQ_ENCODING_ISAL)
        status = open_isal(e, level);
#endif
    if (status != FQ_OK) {
        fq_encoder_free(e);
        return status;
    }
    *out = e;
    return FQ_OK;
}

void fq_encoder_free(fq_encoder *e)
{
    if (!e)
        return;
    if (e->libz_ready)
        deflateEnd(&e->libz);
    ZSTD_freeCCtx(e->zstd);
#ifdef FQ_HAVE_ISAL
    free(e->isal_work);
#endif
    free(e);
}

static fq_status run_libz(fq_encoder *e, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    int ret;

    if (deflateReset(&e->libz) != Z_OK)
        return FQ_ERR_ARGUMENT;
    e->libz.next_in = (Bytef *)in;
    e->libz.avail_in = (uInt)in_nbytes;
    e->libz.next_out = out;
    e->libz.avail_out = (uInt)room;
    ret = deflate(&e->libz, Z_FINISH);
    *out_nbytes = ret == Z_STREAM_END ? room - e->libz.avail_out : 0;
    return ret == Z_STREAM_END || ret == Z_OK || ret == Z_BUF_ERROR ? FQ_OK : FQ_ERR_ARGUMENT;
}

static fq_status run_zstd(fq_encoder *e, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    const size_t n = ZSTD_compress2(e->zstd, out, room, in, in_nbytes);

    *out_nbytes = ZSTD_isError(n) ? 0 : n;
    if (!ZSTD_isError(n) || ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall)
        return FQ_OK;
    return ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation ? FQ_ERR_NOMEM : FQ_ERR_ARGUMENT;
}

#ifdef FQ_HAVE_ISAL
static fq_status run_isal(fq_encoder *e, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    int ret;

    isal_deflate_stateless_init(&e->isal);
    e->isal.level = e->isal_level;
    e->isal.level_buf = e->isal_work;
    e->isal.level_buf_size = e->isal_work_nbytes;
    e->isal.hist_bits = WINDOW_BITS;
    e->isal.end_of_stream = 1;
    e->isal.flush = NO_FLUSH;
    e->isal.next_in = (uint8_t *)in;
    e->isal.avail_in = (uint32_t)in_nbytes;
    e->isal.next_out = out;
    e->isal.avail_out = (uint32_t)room;
    ret = isal_deflate_stateless(&e->isal);
    *out_nbytes = ret == COMP_OK ? e->isal.total_out : 0;
    return ret == COMP_OK || ret == STATELESS_OVERFLOW ? FQ_OK : FQ_ERR_ARGUMENT;
}
#endif

fq_status fq_encoder_run(fq_encoder *e, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    if (in_nbytes > UINT32_MAX / 2 || room > UINT32_MAX / 2)
        return FQ_ERR_ARGUMENT;
    switch (e->encoding) {
    case FQ_ENCODING_LIBZ:
        return run_libz(e, in, in_nbytes, out, room, out_nbytes);
    case FQ_ENCODING_ZSTD:
        return run_zstd(e, in, in_nbytes, out, room, out_nbytes);
#ifdef FQ_HAVE_ISAL
    case FQ_ENCODING_ISAL:
        return run_isal(e, in, in_nbytes, out, room, out_nbytes);
#endif
    default:
        return FQ_ERR_ARGUMENT;
    }
}

const char *fq_version_isal(void)
{
#ifdef FQ_HAVE_ISAL
#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)
    return TEXT(ISAL_MAJOR_VERSION) "." TEXT(ISAL_MINOR_VERSION) "." TEXT(ISAL_PATCH_VERSION);
#else
    return NULL;
#endif
}
