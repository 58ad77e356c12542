/*
 * inflate.c - one compressed cluster to one cluster
 *
 * Deflate is tried with libdeflate, which is over twice as fast as libz, or with our own inflater where it cannot be told
 * beforehand that libdeflate takes no stream that libz refuses (deflate.c says why). Both only know whole streams: they fail where
 * the stream goes on past the cluster, or stops without an end mark. QEMU takes both (it asks of libz only that the cluster be
 * full), so whatever they do not take is put to libz, and libz's verdict is the verdict. The second try costs time on damaged
 * clusters alone.
 *
 * A stream that is longer than a cluster goes to libz alone. No encoder keeps one, but somebody may make one to keep us busy: of
 * nothing but codes to be built, which takes libdeflate several times as long.
 *
 * The window given to libz is 15 bits where QEMU gives 12. With the whole output in one buffer libz reads distances out of that
 * buffer, never out of the window, so both take the same streams; 15 says what is meant.
 *
 * zstd is inflated a frame at a time with the one-call interface, which writes straight into the cluster. The streaming interface
 * that QEMU uses would allocate a window of up to 128 MiB where a frame asks for one. The verdicts are the same but for that
 * bound, which is therefore checked here: without a content size in the frame's header, QEMU takes windows up to 2^27 bytes.
 *
 * An inflater keeps all of their states, made on first use: making them costs as much as inflating a small cluster.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>
#ifdef FQ_HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif

enum { SLACK_NBYTES = 1024 }; /* a length is in whole sectors, of which the first and the last may be touched by a byte only */

struct fq_inflater {
    z_stream libz;
    bool libz_ready;
    ZSTD_DCtx *zstd;
#ifdef FQ_HAVE_LIBDEFLATE
    struct libdeflate_decompressor *libdeflate;
    fq_deflate *own;
#endif
};

fq_inflater *fq_inflater_new(void)
{
    return calloc(1, sizeof(fq_inflater));
}

void fq_inflater_free(fq_inflater *s)
{
    if (!s)
        return;
    if (s->libz_ready)
        inflateEnd(&s->libz);
    ZSTD_freeDCtx(s->zstd);
#ifdef FQ_HAVE_LIBDEFLATE
    if (s->libdeflate)
        libdeflate_free_decompressor(s->libdeflate);
    free(s->own);
#endif
    free(s);
}

static fq_status inflate_libz(fq_inflater *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    int ret;

    if (!s->libz_ready) {
        if (inflateInit2(&s->libz, -15) != Z_OK)
            return FQ_ERR_NOMEM;
        s->libz_ready = true;
    } else {
        inflateReset(&s->libz);
    }
    s->libz.next_in = (Bytef *)in;
    s->libz.avail_in = (uInt)in_nbytes;
    s->libz.next_out = out;
    s->libz.avail_out = (uInt)out_nbytes;
    ret = inflate(&s->libz, Z_FINISH);
    if (ret == Z_MEM_ERROR)
        return FQ_ERR_NOMEM;
    if (ret != Z_STREAM_END && ret != Z_BUF_ERROR)
        return FQ_ERR_DEFLATE;
    return s->libz.avail_out == 0 ? FQ_OK : FQ_ERR_INFLATED_SHORT;
}

#ifdef FQ_HAVE_LIBDEFLATE
static bool inflate_libdeflate(fq_inflater *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    if (!s->libdeflate && !(s->libdeflate = libdeflate_alloc_decompressor()))
        return false;
    return libdeflate_deflate_decompress(s->libdeflate, in, in_nbytes, out, out_nbytes, NULL) == LIBDEFLATE_SUCCESS;
}

static bool inflate_own(fq_inflater *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    if (!s->own && !(s->own = fq_deflate_new()))
        return false;
    return fq_deflate_run(s->own, in, in_nbytes, out, out_nbytes);
}
#endif

static fq_status inflate_deflate(fq_inflater *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
#ifdef FQ_HAVE_LIBDEFLATE
    if (in_nbytes <= out_nbytes + SLACK_NBYTES) {
        const bool is_one_block = fq_deflate_is_one_block(in, in_nbytes);

        if ((is_one_block ? inflate_libdeflate : inflate_own)(s, in, in_nbytes, out, out_nbytes))
            return FQ_OK;
    }
#endif
    return inflate_libz(s, in, in_nbytes, out, out_nbytes);
}

/* RFC 8878, 3.1.1.1: does this frame ask for a larger window than QEMU's decoder would give it? */
static bool zstd_window_too_large(const uint8_t *frame, size_t nbytes)
{
    const bool single_segment = nbytes > 4 && (frame[4] & 0x20);
    const bool is_frame = nbytes > 5 && frame[0] == 0x28 && frame[1] == 0xb5 && frame[2] == 0x2f && frame[3] == 0xfd;

    if (!is_frame || single_segment || frame[4] >> 6 != 0)
        return false;
    return (UINT64_C(1) << (10 + (frame[5] >> 3))) / 8 * (8 + (frame[5] & 7)) > (UINT64_C(1) << 27);
}

static fq_status inflate_zstd(fq_inflater *s, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    size_t in_pos = 0, out_pos = 0;

    if (!s->zstd && !(s->zstd = ZSTD_createDCtx()))
        return FQ_ERR_NOMEM;
    while (out_pos < out_nbytes) {
        size_t frame_nbytes, n;

        if (in_pos == in_nbytes)
            return FQ_ERR_INFLATED_SHORT;
        frame_nbytes = ZSTD_findFrameCompressedSize(in + in_pos, in_nbytes - in_pos);
        if (ZSTD_isError(frame_nbytes))
            return out_pos > 0 && in[in_pos] == 0 ? FQ_ERR_INFLATED_SHORT : FQ_ERR_ZSTD;
        if (zstd_window_too_large(in + in_pos, frame_nbytes))
            return FQ_ERR_ZSTD;
        n = ZSTD_decompressDCtx(s->zstd, out + out_pos, out_nbytes - out_pos, in + in_pos, frame_nbytes);
        if (ZSTD_isError(n) && ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation)
            return FQ_ERR_NOMEM;
        if (ZSTD_isError(n))
            return ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall ? FQ_ERR_INFLATED_LONG : FQ_ERR_ZSTD;
        in_pos += frame_nbytes;
        out_pos += n;
    }
    return FQ_OK;
}

fq_status fq_inflater_run(fq_inflater *s, fq_codec codec, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
    if (in_nbytes > UINT32_MAX / 2 || out_nbytes > UINT32_MAX / 2)
        return FQ_ERR_ARGUMENT;
    switch (codec) {
    case FQ_CODEC_DEFLATE:
        return inflate_deflate(s, in, in_nbytes, out, out_nbytes);
    case FQ_CODEC_DEFLATE_LIBZ:
        return inflate_libz(s, in, in_nbytes, out, out_nbytes);
    case FQ_CODEC_ZSTD:
        return inflate_zstd(s, in, in_nbytes, out, out_nbytes);
    default:
        return FQ_ERR_ARGUMENT;
    }
}

const char *fq_version_libdeflate(void)
{
#ifdef FQ_HAVE_LIBDEFLATE
    return LIBDEFLATE_VERSION_STRING;
#else
    return NULL;
#endif
}

const char *fq_version_libz(void)
{
    return zlibVersion();
}

const char *fq_version_libzstd(void)
{
    return ZSTD_versionString();
}
