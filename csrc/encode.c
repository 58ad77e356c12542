/*
 * encode.c - one cluster to one stream, by libz and libzstd
 *
 * Deflate streams keep to distances of 4 KiB, which is the window that QEMU writes with, and all that readers which inflate by
 * streaming have to give. libz is set as QEMU sets it, so at its default level it makes the same streams. (libdeflate, the fastest
 * at its size, always uses distances up to 32 KiB.)
 *
 * A stream has to be smaller than its cluster: the caller gives less room than that, and stores the cluster as it is where the room
 * does not do.
 */
#include "internal.h"

#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

static void *open_libz(int level)
{
    z_stream *z = calloc(1, sizeof(*z));

    if (z && deflateInit2(z, level, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK) {
        free(z);
        return NULL;
    }
    return z;
}

static void close_libz(void *state)
{
    deflateEnd(state);
    free(state);
}

static fq_status run_libz(void *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    z_stream *z = state;
    int ret;

    if (deflateReset(z) != Z_OK)
        return FQ_ERR_ARGUMENT;
    z->next_in = (Bytef *)in;
    z->avail_in = (uInt)in_nbytes;
    z->next_out = out;
    z->avail_out = (uInt)room;
    ret = deflate(z, Z_FINISH);
    *out_nbytes = ret == Z_STREAM_END ? room - z->avail_out : 0;
    return ret == Z_STREAM_END || ret == Z_OK || ret == Z_BUF_ERROR ? FQ_OK : FQ_ERR_ARGUMENT;
}

/* As zconf.h has it: of the window and the hash chains, and 16 KiB for the rest. */
static size_t state_nbytes_libz(int level, size_t in_nbytes)
{
    (void)level, (void)in_nbytes;
    return (1 << (12 + 2)) + (1 << (9 + 9)) + (16 << 10);
}

static void *open_zstd(int level)
{
    ZSTD_CCtx *zstd = ZSTD_createCCtx();

    if (zstd && ZSTD_isError(ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, level))) {
        ZSTD_freeCCtx(zstd);
        return NULL;
    }
    return zstd;
}

static void close_zstd(void *state)
{
    ZSTD_freeCCtx(state);
}

static fq_status run_zstd(void *state, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t room, size_t *out_nbytes)
{
    const size_t n = ZSTD_compress2(state, out, room, in, in_nbytes);

    *out_nbytes = ZSTD_isError(n) ? 0 : n;
    if (!ZSTD_isError(n) || ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall)
        return FQ_OK;
    return ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation ? FQ_ERR_NOMEM : FQ_ERR_ARGUMENT;
}

/* From 1 to 18 times the cluster, by the level; libzstd tells of a state that was used. */
static size_t state_nbytes_zstd(int level, size_t in_nbytes)
{
    ZSTD_CCtx *zstd = open_zstd(level);
    uint8_t *zeroes = calloc(2, in_nbytes);
    size_t nbytes = 0;

    if (zstd && zeroes) {
        ZSTD_compress2(zstd, zeroes + in_nbytes, in_nbytes, zeroes, in_nbytes);
        nbytes = ZSTD_sizeof_CCtx(zstd);
    }
    free(zeroes);
    ZSTD_freeCCtx(zstd);
    return nbytes;
}

const fq_encoder fq_encoder_libz = {1, 9, open_libz, close_libz, state_nbytes_libz, run_libz};
const fq_encoder fq_encoder_zstd = {1, 19, open_zstd, close_zstd, state_nbytes_zstd, run_zstd};
